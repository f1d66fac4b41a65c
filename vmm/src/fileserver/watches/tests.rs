//! What a watch tells: what other processes do, and nothing that this one does.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, openat};
use tempfile::TempDir;

use super::*;
use crate::fileserver::inodes::ROOT;
use crate::fileserver::slots::Slots;
use crate::fileserver::wire::{u32_at, u64_at};

/// A directory that is served, with a directory `d` and files `d/kept` and `file`.
struct Watched {
    directory: TempDir,
    inodes: Arc<Inodes>,
    watches: Arc<Watches>,
    replies: Receiver<Vec<u8>>,
}

impl Watched {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        fs::create_dir(directory.path().join("d")).unwrap();
        for name in ["d/kept", "file"] {
            File::create(directory.path().join(name)).unwrap();
        }
        let inodes = Inodes::new(open(directory.path()), Slots::new(1000, 1)).unwrap();
        let inodes = Arc::new(inodes);
        let links = openat(CWD, "/proc/self/fd", OFlags::CLOEXEC, Mode::empty()).unwrap();
        let watches = Watches::new(Arc::new(links));
        let (sender, replies) = channel();
        let (all, running) = (Arc::clone(&inodes), Arc::clone(&watches));
        // Ends with the process: nothing tells it to end, as in the file server.
        thread::spawn(move || {
            running.run(&all, |reply| sender.send(reply.to_vec()).unwrap_or_default())
        });
        Self { directory, inodes, watches, replies }
    }

    fn inode(&self, path: &str) -> Arc<Inode> {
        let path = open(&self.directory.path().join(path));
        self.inodes.remember((&*self.inodes.get(ROOT).unwrap(), c"x"), path, None).unwrap().0
    }

    fn watch(&self, path: &str) -> Arc<Inode> {
        let inode = self.inode(path);
        self.watches.watch(&inode, u32::MAX).unwrap();
        inode
    }

    /// Another process does this; returns what is told until it is quiet: nodes, masks, names.
    fn told(&self, script: &str) -> Vec<(u64, u32, String)> {
        let mut shell = Command::new("sh");
        assert!(
            shell.current_dir(&self.directory).args(["-c", script]).status().unwrap().success()
        );
        let mut told = Vec::new();
        loop {
            let _ = self.watches.wait(1);
            let Ok(reply) = self.replies.recv_timeout(Duration::from_millis(300)) else { break };
            told.extend(reports(&reply[OUT_HEADER..]));
        }
        told.into_iter().map(|report| (report.node, report.mask, text(&report.name))).collect()
    }
}

fn open(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn text(name: &[u8]) -> String {
    String::from_utf8(name.to_vec()).unwrap()
}

/// As the guest's kernel reads them.
fn reports(mut body: &[u8]) -> Vec<Report> {
    let mut reports = Vec::new();
    while let Some(node) = u64_at(body, 0) {
        let (mask, cookie) = (u32_at(body, 8).unwrap(), u32_at(body, 12).unwrap());
        let length = u32_at(body, 16).unwrap() as usize;
        reports.push(Report { node, mask, cookie, name: body[24..24 + length].to_vec() });
        body = &body[24 + length.next_multiple_of(8)..];
    }
    reports
}

fn of(node: u64, events: &[(u32, &str)]) -> Vec<(u64, u32, String)> {
    events.iter().map(|(mask, name)| (node, *mask, (*name).to_owned())).collect()
}

#[test]
fn a_directory_is_told_what_others_do_in_it() {
    let watched = Watched::new();
    let node = watched.watch("d").node;
    let created =
        [(bit::CREATE, "new"), (bit::OPEN, "new"), (bit::MODIFY, "new"), (bit::CLOSE_WRITE, "new")];
    assert_eq!(watched.told("echo x > d/new"), of(node, &created));
    let told = watched.told("mv d/new d/old; mkdir d/sub; rm d/old; rmdir d/sub");
    let expected = [
        (bit::MOVED_FROM, "new"),
        (bit::MOVED_TO, "old"),
        (bit::CREATE | bit::DIRECTORY, "sub"),
        (bit::DELETE, "old"),
        (bit::DELETE | bit::DIRECTORY, "sub"),
    ];
    assert_eq!(told, of(node, &expected));
    assert_eq!(watched.told("rm d/kept; touch d/kept; :> file").last().unwrap().2, "kept");
}

#[test]
fn what_this_process_does_is_not_told() {
    let watched = Watched::new();
    let node = watched.watch("d").node;
    fs::write(watched.directory.path().join("d/own"), "x").unwrap();
    fs::remove_file(watched.directory.path().join("d/own")).unwrap();
    assert_eq!(watched.told("chmod 600 d/kept"), of(node, &[(bit::ATTRIB, "kept")]));
}

#[test]
fn a_file_is_told_of_itself_until_it_is_removed() {
    let watched = Watched::new();
    let file = watched.watch("file");
    let written = [(bit::OPEN, ""), (bit::MODIFY, ""), (bit::CLOSE_WRITE, "")];
    assert_eq!(watched.told("echo x >> file"), of(file.node, &written));
    let removed = [(bit::ATTRIB, ""), (bit::DELETE_SELF, "")];
    assert_eq!(watched.told("rm file"), of(file.node, &removed));
}

#[test]
fn a_watch_ends_with_its_inode_or_before() {
    let watched = Watched::new();
    let (kept, directory) = (watched.watch("d/kept"), watched.watch("d"));
    assert_eq!(watched.told("chmod 600 d/kept").len(), 2, "the file and its directory");
    watched.watches.watch(&directory, 0).unwrap();
    let expected = of(kept.node, &[(bit::ATTRIB, "")]);
    assert_eq!(watched.told("chmod 644 d/kept; mkdir d/more"), expected);
    watched.inodes.forget(kept.node, 1);
    drop(kept);
    assert_eq!(watched.told("chmod 600 d/kept"), []);
    assert_eq!(watched.watches.state().count, 0);
    assert!(watched.watches.state().nodes.is_empty());
}

#[test]
fn a_long_report_comes_in_several_replies() {
    let watched = Watched::new();
    watched.watch("d");
    let long = "n".repeat(200);
    let told = watched.told(&format!("for i in $(seq 100); do mkdir d/{long}$i; done"));
    let created = told.iter().filter(|(_, mask, _)| mask & bit::CREATE != 0);
    assert_eq!(created.count(), 100);
}

#[test]
fn one_request_waits_and_can_be_ended() {
    let watched = Watched::new();
    assert_eq!(watched.watches.wait(1), Err(Errno::INVAL), "nothing is watched");
    watched.watch("d");
    watched.watches.wait(2).unwrap();
    assert_eq!(watched.watches.wait(3), Err(Errno::BUSY));
    assert_eq!(watched.watches.stop(), Some(2));
    assert_eq!(watched.watches.stop(), None);
}

#[test]
fn a_name_that_is_there_was_deleted_first() {
    let both = bit::CREATE | bit::DELETE | bit::MODIFY;
    let order = |there| event::one_by_one(both, there).collect::<Vec<_>>();
    assert_eq!(order(true), [bit::DELETE, bit::CREATE, bit::MODIFY]);
    assert_eq!(order(false), [bit::CREATE, bit::MODIFY, bit::DELETE]);
}

#[test]
fn an_event_that_is_cut_off_is_not_read_further() {
    let mut event = vec![0_u8; 24];
    event[0] = 60;
    event[8] = 2;
    // A record that claims more than there is.
    event.extend([2, 0, 200, 0]);
    event.extend([0; 32]);
    for length in 0..event.len() {
        assert_eq!(Event::take(&mut &event[..length]), None, "{length}");
    }
    let mut rest = &event[..];
    let read = Event::take(&mut rest).unwrap();
    assert_eq!((read.mask, read.subjects.len(), rest.len()), (2, 0, 0));
}
