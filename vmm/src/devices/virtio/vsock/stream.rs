//! The host end of one stream: moves bytes between its socket and guest memory.
//!
//! The socket is watched edge-triggered for as long as it is open, so nothing is ever re-armed. An
//! edge sets `readable` and `writable`, and a call that would block clears one of them. A stream
//! that waits for the guest, for a buffer or for credit, thus costs no wake-up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use vm_memory::VolatileSlice;

use super::super::queue::{Buffers, GuestMemory, QueueError};
use super::super::vectored;
use super::connection::{Connection, Incoming, Outgoing};

/// Bytes copied at once when the socket does not take what the guest sent.
const CHUNK_BYTES: usize = 4096;

/// A connection and its socket.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) state: Connection,
    /// `None` once no byte moves any more.
    socket: Option<OwnedFd>,
    readable: bool,
    writable: bool,
    /// The host was told that the guest sends no more.
    write_ended: bool,
    /// The host was told that the guest reads no more.
    read_ended: bool,
    /// The stream is in the muxer's line already.
    pub(super) queued: bool,
}

impl Stream {
    pub(super) fn new(state: Connection, socket: OwnedFd) -> Self {
        Self {
            state,
            socket: Some(socket),
            readable: true,
            writable: true,
            write_ended: false,
            read_ended: false,
            queued: false,
        }
    }

    /// What to send to the guest next.
    pub(super) fn next(&self) -> Option<Outgoing> {
        self.state.next(self.readable && self.socket.is_some())
    }

    /// Nothing is left to do for either side.
    pub(super) fn is_over(&self) -> bool {
        self.state.ended_by_guest() && self.socket.is_none()
    }

    /// Only the guest's reset is missing.
    pub(super) fn is_closing(&self) -> bool {
        self.socket.is_none()
    }

    /// The socket's state changed.
    pub(super) fn on_edge(&mut self) {
        self.readable = true;
        self.writable = true;
        if self.state.reads_no_more() {
            self.check_hang_up();
        }
        self.flush();
    }

    /// Passes `len` bytes of the guest on, or keeps them; `false` when it may not send them.
    pub(super) fn deliver(
        &mut self,
        memory: &GuestMemory,
        payload: &mut Buffers,
        len: usize,
    ) -> Result<bool, QueueError> {
        match self.state.judge(len) {
            Incoming::Violation => return Ok(false),
            Incoming::Discard => self.state.note_forwarded(len),
            Incoming::Deliver => {
                let slices = payload.slices(memory, len)?;
                let taken = self.write(&slices);
                self.keep(&slices, taken);
            }
        }
        self.settle();
        Ok(true)
    }

    /// Reads into `room`; `None` when there is nothing now, or never again.
    pub(super) fn read(&mut self, room: &[VolatileSlice<'_>]) -> Option<usize> {
        let socket = self.socket.as_ref()?;
        match vectored::receive(socket, room) {
            Ok(0) => self.state.note_host_end(),
            Ok(count) => return Some(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return None;
            }
            // After a peer that closed without reading all, there is an error in place of the end.
            Err(_) => {
                self.state.note_host_end();
                self.state.note_host_gone();
            }
        }
        self.check_hang_up();
        self.settle();
        None
    }

    /// Writes the backlog, as far as the socket takes it.
    fn flush(&mut self) {
        while self.writable
            && let Some(socket) = &self.socket
        {
            let (chunk, _) = self.state.backlog().as_slices();
            if chunk.is_empty() {
                // A stream that stalled once must not keep its buffer for ever.
                self.state.backlog().shrink_to_fit();
                break;
            }
            match send(socket, chunk, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.state.backlog().drain(..count);
                    self.state.note_forwarded(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(_) => self.state.note_host_gone(),
            }
        }
        self.settle();
    }

    /// Sends guest bytes unless others wait before them; returns how many need not be kept.
    fn write(&mut self, slices: &[VolatileSlice<'_>]) -> usize {
        let Some(socket) = &self.socket else { return 0 };
        if !self.writable || !self.state.backlog().is_empty() {
            return 0;
        }
        match vectored::send(socket, slices) {
            Ok(count) => {
                self.state.note_forwarded(count);
                count
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                0
            }
            Err(_) => {
                self.state.note_host_gone();
                let all = slices.iter().map(VolatileSlice::len).sum();
                self.state.note_forwarded(all);
                all
            }
        }
    }

    /// Copies all but the first `skip` bytes to the backlog; `judge` has checked that they fit.
    fn keep(&mut self, slices: &[VolatileSlice<'_>], mut skip: usize) {
        let mut chunk = [0; CHUNK_BYTES];
        for slice in slices {
            let mut at = skip.min(slice.len());
            skip -= at;
            while at < slice.len()
                && let Ok(rest) = slice.offset(at)
            {
                let count = rest.copy_to(&mut chunk);
                self.state.backlog().extend(chunk.iter().take(count));
                at += count;
            }
        }
    }

    /// Notes whether the host closed its end altogether, which reading alone cannot tell.
    fn check_hang_up(&mut self) {
        let Some(socket) = &self.socket else { return };
        let mut watched = [PollFd::new(socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut watched, Some(&now)).is_ok()
            && watched[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
        {
            self.state.note_host_gone();
        }
    }

    /// Shuts down what the guest ended, and closes the socket when no byte moves any more.
    pub(super) fn settle(&mut self) {
        let Some(socket) = &self.socket else { return };
        let delivered = self.state.delivered_all();
        if self.state.ended_by_host() || (self.state.ended_by_guest() && delivered) {
            self.socket = None;
            return;
        }
        if delivered && !self.write_ended {
            end(socket, Shutdown::Write);
            self.write_ended = true;
        }
        if self.state.guest_deaf() && !self.read_ended {
            end(socket, Shutdown::Read);
            self.read_ended = true;
        }
    }
}

fn end(socket: impl AsFd, side: Shutdown) {
    // Fails only when the host is gone, which the next call finds out.
    let _ = shutdown(socket, side);
}
