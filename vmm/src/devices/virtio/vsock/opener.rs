//! How the rest of the monitor asks for streams into the guest.
//!
//! Requests wait in a bounded queue that outlives the device's thread: those made before the driver
//! has started are served once it has. While no thread serves, nothing watches deadlines here, so
//! the holder of an [`Opener`] calls [`Opener::expire`] each time that it wakes up. A caller that
//! must not depend on that keeps a timeout of its own.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Requests that may wait for the device.
const WAITING_MAX: usize = 256;

/// Why there is no stream.
#[derive(Debug, Error)]
pub(crate) enum OpenError {
    /// Until the deadline nothing listened at the port.
    #[error("nothing listens at the guest's port")]
    Refused,
    /// The guest did not answer until the deadline.
    #[error("guest did not answer in time")]
    TimedOut,
    /// More streams than the device serves.
    #[error("too many streams")]
    Busy,
    /// The device failed or is gone.
    #[error("vsock device is gone")]
    Gone,
    /// The host could not make a socket.
    #[error("cannot make a socket pair")]
    Host(#[from] io::Error),
}

/// Takes the host's end of a stream, or the reason why there is none. Must not block.
pub(crate) type Answer = Box<dyn FnOnce(Result<OwnedFd, OpenError>) + Send>;

/// One stream, asked for.
pub(crate) struct OpenRequest {
    /// The guest's port.
    pub(crate) port: u32,
    /// When to give up; until then a refusal means that nothing listens yet.
    pub(crate) deadline: Instant,
    /// Called once, from any thread.
    pub(crate) answer: Answer,
}

impl fmt::Debug for OpenRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenRequest")
            .field("port", &self.port)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// Asks for streams, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Opener {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<VecDeque<OpenRequest>>,
    /// Readable while requests may be waiting.
    wake: EventFd,
}

impl Opener {
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { shared: Arc::new(Shared { waiting: Mutex::default(), wake }) })
    }

    /// Asks for a stream; the answer may come before this returns.
    pub(crate) fn open(&self, request: OpenRequest) {
        let mut waiting = self.lock();
        if waiting.len() >= WAITING_MAX {
            drop(waiting);
            return (request.answer)(Err(OpenError::Busy));
        }
        waiting.push_back(request);
        drop(waiting);
        self.wake();
    }

    /// Fails the requests that are past their deadline and returns the next deadline. Needed only
    /// while the device does not serve; calling it at any time does no harm.
    pub(crate) fn expire(&self, now: Instant) -> Option<Instant> {
        let mut waiting = self.lock();
        let (overdue, rest): (VecDeque<_>, VecDeque<_>) =
            waiting.drain(..).partition(|request| request.deadline <= now);
        let next = rest.iter().map(|request| request.deadline).min();
        *waiting = rest;
        drop(waiting);
        for request in overdue {
            (request.answer)(Err(OpenError::TimedOut));
        }
        next
    }

    /// What the device's thread waits for.
    pub(super) fn event(&self) -> &EventFd {
        &self.shared.wake
    }

    /// Everything that waits.
    pub(super) fn take(&self) -> VecDeque<OpenRequest> {
        // Nonblocking: a spurious wake-up finds nothing to clear.
        let _ = self.shared.wake.read();
        std::mem::take(&mut *self.lock())
    }

    /// Puts back the requests that the device had not finished when its driver left.
    pub(super) fn put_back(&self, requests: impl Iterator<Item = OpenRequest>) {
        self.lock().extend(requests);
        self.wake();
    }

    fn wake(&self) {
        if let Err(error) = self.shared.wake.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("cannot wake the vsock device: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<OpenRequest>> {
        self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
