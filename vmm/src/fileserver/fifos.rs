//! FIFOs that others use too, `fifo(7)`.
//!
//! The pipe of a shared FIFO is the host's. The guest opens it here and reads and writes through
//! its handle, which never waits; who has to wait does so in the guest. Two requests are our own, by
//! a patch of the guest's kernel: FIFO_POLL asks what is possible now, and FIFO_EVENTS waits here
//! for what may end a process's waiting: `docs/decisions/0030-fifos-in-shared-directories.md`.
//!
//! An epoll(7) reports each change once, as the host's kernel would wake up a process of its own.
//! Changes wait there until the guest asks, so that they need no memory here.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, tee};

use super::handles::Handle;
use super::wire::{Body, OUT_HEADER, Reply};

/// `FUSE_POLL_SCHEDULE_NOTIFY`: report changes from now on.
const NOTIFY: u32 = 1;
/// `FUSE_FIFO_OPENED` of our guest's kernel: only say whether the other end was opened.
const OPENED: u32 = 1 << 31;
/// How many files one reply names, `FUSE_FIFO_FILES` of our patch.
const FILES: usize = 64;
/// Bytes with which a reply names a file.
const FILE: usize = size_of::<u64>();
const AT_ONCE: Option<&Timespec> = Some(&Timespec { tv_sec: 0, tv_nsec: 0 });

/// All FIFOs that processes of a guest wait for.
#[derive(Debug, Default)]
pub(super) struct Fifos {
    /// Created by the first that waits.
    changes: OnceLock<OwnedFd>,
    /// The FIFO_EVENTS that waits.
    waiting: Mutex<Option<u64>>,
    wake: Condvar,
}

/// FIFO_POLL, `struct fuse_poll_in`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) handle: u64,
    /// What the guest calls its open file.
    file: u64,
    flags: u32,
    events: PollFlags,
}

impl Question {
    pub(super) fn read(body: &mut Body<'_>) -> Result<Self, Errno> {
        let (handle, file, flags) = (body.u64()?, body.u64()?, body.u32()?);
        // The kernel has 32 bits, of which poll(2) knows 16.
        let [low, high, ..] = body.u32()?.to_le_bytes();
        let events = PollFlags::from_bits_truncate(u16::from_le_bytes([low, high]));
        Ok(Self { handle, file, flags, events })
    }
}

impl Fifos {
    /// Answers what is possible now: events of poll(2), or whether a writer has come.
    pub(super) fn answer(&self, question: Question, fifo: &Handle) -> Result<u32, Errno> {
        if question.flags & OPENED != 0 {
            return writer_came(fifo).map(u32::from);
        }
        if question.flags & NOTIFY != 0 {
            self.report(question.file, fifo)?;
        }
        Ok(u32::from(events_now(fifo, question.events)?.bits()))
    }

    /// Reports each change of an open FIFO until it is closed.
    fn report(&self, file: u64, fifo: &Handle) -> Result<(), Errno> {
        let data = epoll::EventData::new_u64(file);
        let changes = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        match epoll::add(self.changes()?, fifo, data, changes) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn changes(&self) -> Result<&OwnedFd, Errno> {
        if let Some(changes) = self.changes.get() {
            return Ok(changes);
        }
        let changes = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(self.changes.get_or_init(|| changes))
    }

    /// Lets a request wait for changes.
    pub(super) fn wait(&self, unique: u64) -> Result<(), Errno> {
        self.changes()?;
        let mut waiting = self.waiting();
        if waiting.is_some() {
            return Err(Errno::BUSY);
        }
        *waiting = Some(unique);
        self.wake.notify_one();
        Ok(())
    }

    /// Takes back the request that waits.
    pub(super) fn stop(&self) -> Option<u64> {
        self.waiting().take()
    }

    /// Answers the requests that wait: calls `send` with each reply. Returns if the host's kernel
    /// does not report.
    pub(super) fn run(&self, send: impl Fn(&[u8])) -> Result<(), Errno> {
        let mut events = Vec::with_capacity(FILES);
        loop {
            drop(self.wake.wait_while(self.waiting(), |waiting| waiting.is_none()));
            match epoll::wait(self.changes()?, spare_capacity(&mut events), None) {
                Ok(_) => self.reply(events.drain(..), &send),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Names the files that have changed. Without a request, their guest is gone.
    fn reply(&self, changed: impl Iterator<Item = epoll::Event>, send: impl Fn(&[u8])) {
        let mut buffer = [0; OUT_HEADER + FILES * FILE];
        let mut reply = Reply::new(&mut buffer);
        for event in changed {
            let file = event.data;
            reply.put_u64s([file.u64()]);
        }
        if let Some(unique) = self.stop() {
            send(reply.message(unique, Ok(())));
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<u64>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn events_now(fifo: impl AsFd, events: PollFlags) -> Result<PollFlags, Errno> {
    let mut fifo = [PollFd::new(&fifo, events)];
    poll(&mut fifo, AT_ONCE)?;
    Ok(fifo[0].revents())
}

/// Whether a process has a FIFO open for writing, or had since it was opened here for reading.
///
/// poll(2) tells of bytes and of the last writer's end, but not of a writer that has written
/// nothing yet. Neither may bytes be taken from the pipe. So they would be copied to another pipe:
/// where there are none, that fails with EAGAIN only if there is a writer.
fn writer_came(fifo: &Handle) -> Result<bool, Errno> {
    if !events_now(fifo, PollFlags::IN)?.is_empty() {
        return Ok(true);
    }
    let (_reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    match tee(fifo, writer, 1, SpliceFlags::NONBLOCK) {
        Ok(copied) => Ok(copied > 0),
        Err(Errno::AGAIN) => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
