//! FIFOs of a guest, with the other end in this process.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

use super::*;
use crate::fileserver::handles::Handles;
use crate::fileserver::slots::Slots;

const IN: PollFlags = PollFlags::IN;
const OUT: PollFlags = PollFlags::OUT;

/// A FIFO, and what a guest has open of it.
struct Fifo {
    path: PathBuf,
    handles: Handles,
    _directory: TempDir,
}

impl Fifo {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        Self { path, handles: Handles::default(), _directory: directory }
    }

    fn open(&self, options: &mut OpenOptions) -> File {
        options.custom_flags(libc::O_NONBLOCK).open(&self.path).unwrap()
    }

    fn writer(&self) -> File {
        self.open(OpenOptions::new().write(true))
    }

    fn kept(&self, options: &mut OpenOptions) -> Arc<Handle> {
        let file = Slots::new(100, 1).take().unwrap().keep(self.open(options).into());
        let number = self.handles.insert(7, FileType::Fifo, file);
        self.handles.get(number, 7).unwrap()
    }

    fn reader(&self) -> Arc<Handle> {
        self.kept(OpenOptions::new().read(true))
    }
}

fn question(flags: u32, events: PollFlags) -> Question {
    Question { handle: 0, file: 9, flags, events }
}

#[test]
fn a_writer_is_noticed_that_writes_nothing() {
    let fifo = Fifo::new();
    let reader = fifo.reader();
    assert!(!writer_came(&reader).unwrap());
    let writer = fifo.writer();
    assert!(writer_came(&reader).unwrap());
    drop(writer);
    assert!(writer_came(&reader).unwrap(), "it was there");
    assert!(!writer_came(&fifo.reader()).unwrap(), "but not for the next reader");
}

#[test]
fn looking_for_a_writer_takes_nothing_from_the_pipe() {
    let fifo = Fifo::new();
    let mut reader = fifo.open(OpenOptions::new().read(true));
    let kept = fifo.reader();
    fifo.writer().write_all(b"all of it").unwrap();
    assert!(writer_came(&kept).unwrap());
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "all of it");
}

#[test]
fn what_is_possible_is_what_poll_says() {
    let fifo = Fifo::new();
    let (fifos, reader) = (Fifos::default(), fifo.reader());
    assert_eq!(fifos.answer(question(0, IN), &reader), Ok(0));
    let writer = fifo.kept(OpenOptions::new().write(true));
    assert_eq!(fifos.answer(question(0, IN.union(OUT)), &writer), Ok(OUT.bits().into()));
    assert!(fifos.changes.get().is_none(), "nobody waits");
    fifo.writer().write_all(b"x").unwrap();
    assert_eq!(fifos.answer(question(0, IN.union(OUT)), &reader), Ok(IN.bits().into()));
}

#[test]
fn one_request_is_answered_for_each_change() {
    let fifo = Fifo::new();
    let fifos: &'static Fifos = Box::leak(Box::default());
    let reader = fifo.reader();
    let (replies, received) = channel();
    std::thread::spawn(move || fifos.run(|reply| replies.send(reply.to_vec()).unwrap()));
    assert_eq!(fifos.answer(question(NOTIFY, IN), &reader), Ok(0));
    fifos.wait(5).unwrap();
    assert_eq!(fifos.wait(6), Err(Errno::BUSY));
    assert!(received.recv_timeout(Duration::from_millis(200)).is_err(), "nothing has changed");
    let mut writer = fifo.writer();
    for unique in [5_u64, 6, 7] {
        writer.write_all(b"x").unwrap();
        let reply = received.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(reply.len(), OUT_HEADER + FILE);
        assert_eq!(reply[8..16], unique.to_le_bytes());
        assert_eq!(reply[16..], 9_u64.to_le_bytes());
        fifos.wait(unique + 1).unwrap();
    }
    assert_eq!(fifos.stop(), Some(8));
}
