//! Copies bytes between a caller's descriptors and the streams that lead into the guest.
//!
//! A descriptor is closed as soon as nobody can use it any more: when the container closes a pipe,
//! the caller's peers must see that, even those that only wait. A socket is closed, not shut down,
//! when the container closes it, because its caller may go on using it.
//!
//! Each direction is copied by a thread of its own, which waits before it reads: the caller shares
//! the open file description, so that it may or may not block. Bytes go through a buffer, although
//! the kernel could splice. A splice that waits for the container holds the lock of the caller's
//! pipe. A caller that reads what has arrived already would wait for that lock, and could not even
//! be killed.
//!
//! Copies can be halted between two bytes and resumed elsewhere: see [`super::linger`].

// UNSAFETY: a thread that waits in a system call is interrupted by a signal.
#![expect(unsafe_code, reason = "pthread_kill(3) and a signal handler")]

use std::io::{self, ErrorKind, Read};
use std::net::Shutdown as Side;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::net::{Shutdown, shutdown};

/// The most bytes that one step of a copy moves: what a pipe holds.
const CHUNK: usize = 64 << 10;
/// The other end is closed.
const GONE: PollFlags = PollFlags::HUP.union(PollFlags::ERR);
/// The signal that interrupts a thread's system call. It is never passed on to a container, and its
/// default action is to be ignored: signal(7).
const CALL_BACK: Signal = Signal::SIGURG;
/// How long a thread may take to leave its system call. One that waits for a disk cannot.
const COME_BACK: Duration = Duration::from_secs(1);

/// A caller's descriptor and the stream that leads into the guest.
#[derive(Debug)]
pub(crate) struct Ends {
    /// The caller's.
    pub(crate) caller: OwnedFd,
    /// The guest's.
    pub(crate) stream: UnixStream,
    /// The caller's is a socket, of which one direction can end alone.
    pub(crate) socket: bool,
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the caller into the guest.
    In,
    /// Out of the guest to the caller.
    Out,
}

/// Names one copy among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyId(usize);

/// Copies that run.
#[derive(Debug)]
pub(crate) struct Copies {
    list: Vec<Running>,
    halt: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Running {
    way: Way,
    progress: Arc<Progress>,
    thread: JoinHandle<Option<Halted>>,
}

/// How far a copy is, for the thread that waits for it.
#[derive(Debug)]
struct Progress {
    passed: AtomicU64,
    ended: AtomicBool,
    waiter: Thread,
}

/// A copy that was halted before its end.
#[derive(Debug)]
pub(crate) struct Halted {
    ends: Arc<Ends>,
    way: Way,
    /// Bytes that were read and are not written yet.
    pending: Vec<u8>,
    /// How many bytes were read since the beginning.
    read: u64,
}

impl Copies {
    /// No copies yet. The thread that starts them has to be the one that waits for them.
    pub(crate) fn new() -> Self {
        Self { list: Vec::new(), halt: Arc::default() }
    }

    /// Starts to copy.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(&mut self, ends: Arc<Ends>, way: Way) -> io::Result<CopyId> {
        self.resume(Halted { ends, way, pending: Vec::new(), read: 0 })
    }

    /// Goes on with a copy that was halted.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn resume(&mut self, copy: Halted) -> io::Result<CopyId> {
        let progress = Arc::new(Progress {
            passed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            waiter: thread::current(),
        });
        let (way, job) = (copy.way, Job { progress: progress.clone(), halt: self.halt.clone() });
        let thread = thread::Builder::new().name("copy".into()).spawn(move || job.run(copy))?;
        self.list.push(Running { way, progress, thread });
        Ok(CopyId(self.list.len() - 1))
    }

    /// The copies that carry the container's output, as wanted by [`Copies::wait`] until they end.
    pub(crate) fn outputs(&self) -> Vec<(CopyId, u64)> {
        let outputs = self.list.iter().enumerate().filter(|(_, copy)| copy.way == Way::Out);
        outputs.map(|(number, _)| (CopyId(number), u64::MAX)).collect()
    }

    /// Waits until each of these copies has passed on so many bytes, or has ended; gives up when
    /// nothing is passed on for `quiet`, and after `longest` in any case.
    pub(crate) fn wait(&self, wanted: &[(CopyId, u64)], quiet: Duration, longest: Duration) {
        let progress = |copy: CopyId| &self.list[copy.0].progress;
        let passed = |copy| progress(copy).passed.load(Ordering::Acquire);
        let (deadline, mut last) = (Instant::now() + longest, (0, Instant::now()));
        loop {
            let done = |(copy, bytes): &(CopyId, u64)| {
                progress(*copy).ended.load(Ordering::Acquire) || passed(*copy) >= *bytes
            };
            if wanted.iter().all(done) {
                return;
            }
            let (sum, now) =
                (wanted.iter().map(|(copy, _)| passed(*copy)).sum::<u64>(), Instant::now());
            if sum != last.0 {
                last = (sum, now);
            }
            let until = deadline.min(last.1 + quiet);
            if now >= until {
                return;
            }
            thread::park_timeout(until - now);
        }
    }

    /// Waits for the end of all.
    pub(crate) fn join(self) {
        for copy in self.list {
            // A thread that failed has nothing more to pass on.
            let _ = copy.thread.join();
        }
    }

    /// Halts all copies where they are; returns those that have not ended. No thread is left then,
    /// except one that cannot be interrupted.
    ///
    /// # Errors
    /// Never in practice.
    pub(crate) fn halt(self) -> io::Result<Vec<Halted>> {
        extern "C" fn nothing(_: libc::c_int) {}
        let action =
            SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, which is safe at any moment.
        unsafe { sigaction(CALL_BACK, &action) }?;
        self.halt.store(true, Ordering::Release);
        let deadline = Instant::now() + COME_BACK;
        let mut halted = Vec::new();
        for copy in self.list {
            while !copy.thread.is_finished() && Instant::now() < deadline {
                // Repeated, as a signal may come just before the system call that it is to
                // interrupt.
                // SAFETY: the thread was not joined, so its handle is valid, even if it has ended.
                unsafe { libc::pthread_kill(copy.thread.as_pthread_t(), CALL_BACK as libc::c_int) };
                thread::sleep(Duration::from_millis(1));
            }
            if copy.thread.is_finished() {
                halted.extend(copy.thread.join().ok().flatten());
            }
        }
        Ok(halted)
    }
}

impl Halted {
    /// If a reader on the host has stopped reading, takes what is on its way out of the guest, at
    /// most so many bytes: then the guest is not needed for them any more. Gives up when nothing
    /// comes for `quiet`.
    pub(crate) fn take_rest(&mut self, most: usize, quiet: Duration) {
        if self.way == Way::In || self.pending.is_empty() {
            return;
        }
        let mut buffer = vec![0; CHUNK];
        let quiet = Timespec::try_from(quiet).ok();
        while self.pending.len() < most {
            let mut ready = [PollFd::new(&self.ends.stream, PollFlags::IN)];
            match poll(&mut ready, quiet.as_ref()) {
                Err(Errno::INTR) => continue,
                Ok(count) if count > 0 => {}
                _ => return,
            }
            match (&self.ends.stream).read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    self.pending.extend_from_slice(&buffer[..count]);
                    self.read += count as u64;
                }
            }
        }
    }

    /// What it holds open.
    pub(crate) fn descriptors(&self) -> [&dyn AsFd; 2] {
        [&self.ends.caller, &self.ends.stream]
    }
}

/// One copy, in its thread.
struct Job {
    progress: Arc<Progress>,
    halt: Arc<AtomicBool>,
}

/// Why nothing was read.
enum Unread {
    /// The copy was halted.
    Halted,
    /// There is no more.
    End,
    /// The other end is closed.
    NobodyReads,
}

/// Why bytes were not written.
enum Unwritten {
    /// The copy was halted; so many bytes were written.
    Halted(usize),
    /// The other end is closed.
    Gone,
}

impl Job {
    /// Copies until the end, or until it is halted; returns what is left then.
    fn run(&self, mut copy: Halted) -> Option<Halted> {
        if !self.copy(&mut copy) {
            self.progress.waiter.unpark();
            return Some(copy);
        }
        // Closed before the end is reported: the caller's peers may wait for that.
        drop(copy);
        self.progress.ended.store(true, Ordering::Release);
        self.progress.waiter.unpark();
        None
    }

    /// Copies; false if it was halted before the end.
    fn copy(&self, copy: &mut Halted) -> bool {
        let (ends, way) = (copy.ends.clone(), copy.way);
        let (from, to) = match way {
            Way::In => (ends.caller.as_fd(), ends.stream.as_fd()),
            Way::Out => (ends.stream.as_fd(), ends.caller.as_fd()),
        };
        let mut buffer = std::mem::take(&mut copy.pending);
        loop {
            match self.write(to, &buffer) {
                Ok(()) => {}
                Err(Unwritten::Halted(count)) => {
                    copy.pending = buffer.split_off(count);
                    return false;
                }
                Err(Unwritten::Gone) => {
                    ends.writing_failed(way);
                    return true;
                }
            }
            self.progress.passed.store(copy.read, Ordering::Release);
            self.progress.waiter.unpark();
            buffer.resize(CHUNK, 0);
            match self.read(from, &mut buffer, to) {
                Ok(count) => {
                    copy.read += count as u64;
                    buffer.truncate(count);
                }
                Err(Unread::Halted) => return false,
                Err(Unread::End) => {
                    ends.pass_end_on(way);
                    return true;
                }
                Err(Unread::NobodyReads) => {
                    ends.nobody_reads(way);
                    return true;
                }
            }
        }
    }

    /// Reads at least one byte, unless the other end is closed and nobody would take it.
    fn read(
        &self,
        from: BorrowedFd<'_>,
        buffer: &mut [u8],
        to: BorrowedFd<'_>,
    ) -> Result<usize, Unread> {
        loop {
            if self.is_halted() {
                return Err(Unread::Halted);
            }
            let mut watched =
                [PollFd::new(&from, PollFlags::IN), PollFd::new(&to, PollFlags::empty())];
            match poll(&mut watched, None) {
                Err(Errno::INTR) => continue,
                Err(_) => return Err(Unread::End),
                Ok(_) if watched[1].revents().intersects(GONE) => return Err(Unread::NobodyReads),
                Ok(_) if watched[0].revents().is_empty() => continue,
                Ok(_) => {}
            }
            match read(from, &mut *buffer) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok(count) if count > 0 => return Ok(count),
                // A connection that was reset has ended too.
                Ok(_) | Err(_) => return Err(Unread::End),
            }
        }
    }

    /// Writes all of it.
    fn write(&self, to: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Unwritten> {
        let mut written = 0;
        while let Some(left) = bytes.get(written..).filter(|left| !left.is_empty()) {
            if self.is_halted() {
                return Err(Unwritten::Halted(written));
            }
            match write(to, left) {
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // The next write tells what has happened.
                    let _ = poll(&mut [PollFd::new(&to, PollFlags::OUT)], None);
                }
                Err(_) => return Err(Unwritten::Gone),
            }
        }
        Ok(())
    }

    fn is_halted(&self) -> bool {
        self.halt.load(Ordering::Acquire)
    }
}

impl Ends {
    /// Passes the end of the stream on.
    fn pass_end_on(&self, way: Way) {
        match way {
            Way::In => drop(self.stream.shutdown(Side::Write)),
            Way::Out if self.socket && !self.is_closed_inside() => {
                let _ = shutdown(&self.caller, Shutdown::Write);
            }
            Way::Out => {}
        }
    }

    /// Tells the writer that nobody reads any more, before it writes again.
    fn nobody_reads(&self, way: Way) {
        match way {
            // Closing the caller's descriptor tells its peers.
            Way::In => {}
            // The other direction stays open: what a socket's peer has sent before still goes in.
            Way::Out if self.socket => drop(self.stream.shutdown(Side::Read)),
            Way::Out => drop(self.stream.shutdown(Side::Both)),
        }
    }

    /// The same, when only a failed write has shown it.
    fn writing_failed(&self, way: Way) {
        match way {
            Way::In if self.socket && !self.is_closed_inside() => {
                let _ = shutdown(&self.caller, Shutdown::Read);
            }
            _ => self.nobody_reads(way),
        }
    }

    /// Whether the container has closed its end, not only shut down one direction.
    fn is_closed_inside(&self) -> bool {
        let mut watched = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut watched, Some(&now)).is_err() || watched[0].revents().intersects(GONE)
    }
}

#[cfg(test)]
mod tests;
