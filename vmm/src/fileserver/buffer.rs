//! The long buffer of a serving thread, whose pages go back to the host when it has nothing to do.
//!
//! The kernel wakes threads that wait for packets in turn, so soon all of them have read a file, and
//! the pages that a read has touched would stay as long as the pod.

// UNSAFETY: rustix leaves the effect of madvise(2) to the caller.
#![expect(unsafe_code, reason = "madvise(2)")]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::mm::{Advice, madvise};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// How long a thread that has pages waits for a packet before it gives them back.
const IDLE: Duration = Duration::from_secs(2);

const PAGE_BYTES: usize = 4096;

/// A buffer of one thread.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    has_pages: bool,
}

impl Buffer {
    /// A buffer of `len` zeroes without pages.
    pub(super) fn new(len: usize) -> Self {
        Self { bytes: vec![0; len], has_pages: false }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Notes that more than a few bytes were used.
    pub(super) fn touched(&mut self, sleepers: &Sleepers) {
        if !self.has_pages {
            self.has_pages = true;
            sleepers.change(|held| held + 1);
        }
    }

    /// Gives the pages back: there was no packet for [`IDLE`].
    pub(super) fn release(&mut self, sleepers: &Sleepers) {
        if !self.has_pages {
            return;
        }
        self.has_pages = false;
        sleepers.change(|held| held - 1);
        // The pages that are the buffer's alone.
        let before = self.bytes.as_ptr().align_offset(PAGE_BYTES);
        let Some(pages) = self.bytes.get_mut(before..) else { return };
        let len = pages.len() / PAGE_BYTES * PAGE_BYTES;
        // SAFETY: these pages hold nothing but bytes of the buffer, which this thread alone uses,
        // and zero, which they read as from now on, is a byte.
        let released = unsafe { madvise(pages.as_mut_ptr().cast(), len, Advice::LinuxDontNeed) };
        if let Err(error) = released {
            log::warn!("cannot release pages: {error}");
        }
    }
}

/// The threads that wait for packets of one socket. While some have pages, the socket has a timeout,
/// so that they wake up; else it has none, and an idle pod costs no time.
#[derive(Debug)]
pub(super) struct Sleepers {
    socket: Arc<OwnedFd>,
    with_pages: Mutex<usize>,
}

impl Sleepers {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self { socket, with_pages: Mutex::default() }
    }

    fn change(&self, by: impl Fn(usize) -> usize) {
        let mut count = self.with_pages.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *count;
        *count = by(before);
        if (before > 0) == (*count > 0) {
            return;
        }
        let timeout = (*count > 0).then_some(IDLE);
        if let Err(error) = set_socket_timeout(&self.socket, Timeout::Recv, timeout) {
            log::warn!("cannot set the relay socket's timeout: {error}");
        }
    }
}
