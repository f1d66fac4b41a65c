//! One system call for many runs of guest memory.
//!
//! The standard library's vectored calls take `&[u8]`, which guest memory must never be: a vCPU can
//! change it at any time. The functions here pass addresses to the kernel instead. The slices,
//! which [`super::queue::Buffers`] checked, bound what is read or written.

// UNSAFETY: the kernel is given pointers into guest memory; no safe wrapper takes volatile memory.
#![expect(unsafe_code, reason = "vectored system calls on volatile memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::volatile_memory::PtrGuardMut;

/// The most runs that one call takes, `IOV_MAX` of Linux.
pub(crate) const RUNS_MAX: usize = 1024;

/// Receives from a socket into guest memory without waiting; 0 at the end of the stream.
pub(crate) fn receive(socket: impl AsFd, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = Vectors::new(slices);
    let mut message = vectors.message();
    let fd = socket.as_fd().as_raw_fd();
    retry(|| {
        // SAFETY: the message's vectors name guest memory that stays mapped while `slices` lives;
        // no Rust reference to it exists.
        unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) }
    })
}

/// Sends guest memory to a socket without waiting and without SIGPIPE.
pub(crate) fn send(socket: impl AsFd, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = Vectors::new(slices);
    let message = vectors.message();
    let fd = socket.as_fd().as_raw_fd();
    retry(|| {
        // SAFETY: as in `receive`; the kernel only reads.
        unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// Reads from `offset` of a file into guest memory; 0 at the end of the file.
pub(crate) fn read_at(
    file: impl AsFd,
    slices: &[VolatileSlice<'_>],
    offset: i64,
) -> io::Result<usize> {
    let vectors = Vectors::new(slices);
    let fd = file.as_fd().as_raw_fd();
    retry(|| {
        // SAFETY: as in `receive`.
        unsafe { libc::preadv(fd, vectors.list.as_ptr(), vectors.count(), offset) }
    })
}

/// Writes guest memory at `offset` of a file.
pub(crate) fn write_at(
    file: impl AsFd,
    slices: &[VolatileSlice<'_>],
    offset: i64,
) -> io::Result<usize> {
    let vectors = Vectors::new(slices);
    let fd = file.as_fd().as_raw_fd();
    retry(|| {
        // SAFETY: as in `receive`; the kernel only reads.
        unsafe { libc::pwritev(fd, vectors.list.as_ptr(), vectors.count(), offset) }
    })
}

/// The iovecs for the kernel, and what keeps them valid. They are reused by the next call, so that
/// a packet costs no allocation.
#[derive(Default)]
pub(crate) struct Vectors {
    list: Vec<libc::iovec>,
    /// Held so that the memory stays mapped.
    guards: Vec<PtrGuardMut>,
}

impl Vectors {
    fn new(slices: &[VolatileSlice<'_>]) -> Self {
        let mut vectors = Self::default();
        vectors.add(slices.get(..RUNS_MAX).unwrap_or(slices));
        vectors
    }

    /// Reads a packet into guest memory, and the end that does not fit there into `rest`. There
    /// must be fewer than [`RUNS_MAX`] slices.
    pub(crate) fn read(
        &mut self,
        file: impl AsFd,
        slices: &[VolatileSlice<'_>],
        rest: &mut [u8],
    ) -> io::Result<usize> {
        self.clear();
        self.add(slices);
        self.list.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        let fd = file.as_fd().as_raw_fd();
        retry(|| {
            // SAFETY: as in `receive`; `rest` is borrowed for as long.
            unsafe { libc::readv(fd, self.list.as_ptr(), self.count()) }
        })
    }

    /// Writes a packet: `front`, then guest memory. There must be fewer than [`RUNS_MAX`] slices.
    pub(crate) fn write(
        &mut self,
        file: impl AsFd,
        front: &[u8],
        slices: &[VolatileSlice<'_>],
    ) -> io::Result<usize> {
        self.clear();
        let iov_base = front.as_ptr().cast_mut().cast();
        self.list.push(libc::iovec { iov_base, iov_len: front.len() });
        self.add(slices);
        let fd = file.as_fd().as_raw_fd();
        retry(|| {
            // SAFETY: as in `receive`; the kernel only reads.
            unsafe { libc::writev(fd, self.list.as_ptr(), self.count()) }
        })
    }

    fn clear(&mut self) {
        self.list.clear();
        self.guards.clear();
    }

    fn add(&mut self, slices: &[VolatileSlice<'_>]) {
        for slice in slices {
            let guard = slice.ptr_guard_mut();
            self.list.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() });
            self.guards.push(guard);
        }
    }

    /// A message with these iovecs and nothing else.
    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all zeroes is a valid empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.list.as_mut_ptr();
        message.msg_iovlen = self.list.len();
        message
    }

    fn count(&self) -> libc::c_int {
        // Never above RUNS_MAX.
        libc::c_int::try_from(self.list.len()).unwrap_or(0)
    }
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
