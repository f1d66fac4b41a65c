//! Limits how many descriptors the guest can have the file server keep.
//!
//! Every inode that the guest remembers, every file that it has open and every owner of its locks
//! keeps one, for as long as the guest likes. When none is free, a request that would keep another
//! one fails with ENFILE before it has changed anything. Requests that keep nothing still succeed,
//! because some descriptors are set aside for them. Such a request is another lookup of a known
//! name: it opens a file as well, and an error would make the guest's kernel detach what is mounted
//! there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

/// The process's own descriptors: standard streams, control and relay socket, `/proc/self/fd`, the
/// group of watches and the epoll of FIFOs.
const OWN: u64 = 8;
/// The most descriptors that one request opens and does not keep, and one to spare.
const PER_THREAD: u64 = 3;

/// How many slots are free.
#[derive(Debug)]
pub(super) struct Slots(AtomicU64);

impl Slots {
    /// The slots of a process with at most `limit` descriptors and this many serving threads.
    pub(super) fn new(limit: u64, threads: u8) -> Arc<Self> {
        let set_aside = OWN + PER_THREAD * u64::from(threads);
        Arc::new(Self(AtomicU64::new(limit.saturating_sub(set_aside))))
    }

    /// Takes a slot, before the file is opened.
    pub(super) fn take(self: &Arc<Self>) -> Result<Slot, Errno> {
        let less = |free: u64| free.checked_sub(1);
        match self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
            Ok(_) => Ok(Slot(Arc::clone(self))),
            Err(_) => Err(Errno::NFILE),
        }
    }
}

/// Room for one descriptor; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Slot(Arc<Slots>);

impl Slot {
    /// Puts a file into the slot.
    pub(super) fn keep(self, file: OwnedFd) -> Kept {
        Kept { file, _slot: self }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A file that is kept open for the guest. It is closed before its slot is free.
#[derive(Debug)]
pub(super) struct Kept {
    file: OwnedFd,
    _slot: Slot,
}

impl AsFd for Kept {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_taken_than_there_are() {
        let slots = Slots::new(OWN + 4 * PER_THREAD + 2, 4);
        let first = slots.take().unwrap();
        let second = slots.take().unwrap();
        assert_eq!(slots.take().unwrap_err(), Errno::NFILE);
        drop(first);
        let kept = slots.take().unwrap().keep(std::fs::File::open("/dev/null").unwrap().into());
        assert_eq!(slots.take().unwrap_err(), Errno::NFILE);
        drop((second, kept));
        assert_eq!(slots.0.load(Ordering::Relaxed), 2);
        assert!(Slots::new(3, 32).take().is_err(), "a limit below what is set aside");
    }
}
