//! The serving loop: one packet in, one packet out, on several threads at once.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::buffer::{Buffer, Sleepers};
use super::caller;
use super::config::FsVerdict;
use super::share::{Outcome, Share};
use super::wire::{self, OUT_HEADER, Reply, ReplyHeader, Request};
use crate::devices::rate_limit::guest_warn;

/// How long to wait before sending again after the kernel had no memory: a packet needs much of it
/// in one piece.
const PAUSE: Duration = Duration::from_millis(2);

/// The longest packet that is copied to the short buffer, so that the reply gets the long one. A
/// longer packet, such as a write, has a reply that is shorter than this.
const SHORT: usize = 8 << 10;

/// What all threads share.
#[derive(Debug)]
pub(super) struct Service {
    share: Share,
    relay: Arc<OwnedFd>,
    sleepers: Sleepers,
}

impl Service {
    pub(super) fn new(share: Share, relay: OwnedFd) -> Self {
        let relay = Arc::new(relay);
        Self { share, sleepers: Sleepers::new(Arc::clone(&relay)), relay }
    }

    /// Serves until the monitor closes the relay socket.
    pub(super) fn run(&self) {
        if let Err(error) = caller::detach_thread(self.share.thread_directory()) {
            log::error!("cannot start a thread that serves: {error}");
            return;
        }
        // One buffer for the packet, the other for the reply. No request that is long has a long
        // reply, so one long buffer is enough.
        let (mut buffer, mut short) = (Buffer::new(wire::PACKET_MAX), vec![0; SHORT]);
        loop {
            let long = buffer.bytes();
            match recv(&*self.relay, &mut *long, RecvFlags::TRUNC) {
                Ok((_, 0)) => return,
                Ok((filled, total)) if filled == total => {
                    let used = if let (Some(packet), Some(from)) =
                        (short.get_mut(..filled), long.get(..filled))
                    {
                        packet.copy_from_slice(from);
                        self.answer(packet, Reply::new(long))
                    } else {
                        let packet = long.get(..filled).unwrap_or_default();
                        self.answer(packet, Reply::new(&mut short));
                        filled
                    };
                    if used > SHORT {
                        buffer.touched(&self.sleepers);
                    }
                }
                Ok((_, total)) => guest_warn!("dropped a packet of {total} bytes: no request"),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => buffer.release(&self.sleepers),
                Err(error) => {
                    log::error!("relay socket failed: {error}");
                    return;
                }
            }
        }
    }

    /// Answers locks that had to wait. Never returns.
    pub(super) fn run_locks(&self) -> ! {
        self.share.locks().run(|unique, result| self.send_empty(unique, result))
    }

    /// Tells the guest what others do to files that it watches.
    pub(super) fn run_watches(&self) {
        if let Err(error) = self.share.run_watches(|reply| self.send(reply)) {
            log::error!("cannot watch files: {error}");
        }
    }

    /// Tells the guest what happens to FIFOs that it waits for.
    pub(super) fn run_fifos(&self) {
        if let Err(error) = self.share.run_fifos(|reply| self.send(reply)) {
            log::error!("cannot wait for FIFOs: {error}");
        }
    }

    /// Answers a process that connects to a socket.
    pub(super) fn conclude(&self, verdict: FsVerdict) {
        let mut buffer = [0; OUT_HEADER + 8];
        let mut reply = Reply::new(&mut buffer);
        // No socket of the guest's own.
        reply.put_u64s([0]);
        let result = match verdict.error {
            0 => Ok(()),
            error => Err(Errno::from_raw_os_error(error)),
        };
        self.send(reply.message(verdict.request, result));
    }

    /// Answers one packet, and returns how many bytes the reply has.
    fn answer(&self, packet: &[u8], mut reply: Reply<'_>) -> usize {
        let Some(request) = Request::parse(packet) else {
            guest_warn!("dropped a packet of {} bytes: no header", packet.len());
            return 0;
        };
        let outcome = if request.len as usize == packet.len() {
            self.share.handle(&request, packet, &mut reply)
        } else if request.has_reply() {
            Outcome::Done(Err(Errno::INVAL))
        } else {
            Outcome::Silent
        };
        match outcome {
            Outcome::Done(result) => self.send(reply.message(request.unique, result)),
            Outcome::Interrupted(unique) => self.send_empty(unique, Err(Errno::INTR)),
            Outcome::Ended(waiting) => {
                if let Some(unique) = waiting {
                    self.send_empty(unique, Err(Errno::INTR));
                }
                self.send_empty(request.unique, Ok(()));
            }
            Outcome::Silent | Outcome::Later => {}
        }
        OUT_HEADER + reply.body_len()
    }

    fn send_empty(&self, unique: u64, result: Result<(), Errno>) {
        let mut header = ReplyHeader::failure(unique, Errno::IO);
        header.error = result.map_or_else(|errno| -errno.raw_os_error(), |()| 0);
        self.send(&header.bytes());
    }

    /// Waits while the monitor is slow to take replies, and while the kernel has no memory for one.
    fn send(&self, message: &[u8]) {
        loop {
            match send(&*self.relay, message, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(Errno::NOBUFS | Errno::NOMEM) => thread::sleep(PAUSE),
                Err(error) => return log::warn!("cannot send a reply: {error}"),
                Ok(_) => return,
            }
        }
    }
}
