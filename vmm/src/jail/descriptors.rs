//! Which descriptors a jailed process keeps, `close_range(2)`.

// UNSAFETY: closes descriptors that have owners, and takes over inherited ones.
#![expect(unsafe_code, reason = "close_range(2), inherited descriptors")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Closes every descriptor of the process but these. An object that owned one of the others must
/// never be used again: the caller has just started and knows what it holds.
///
/// # Errors
/// When the kernel has no `close_range`.
pub(crate) fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    kept.sort_unstable();
    let mut first = 0;
    for fd in kept {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: takes three integers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The descriptor under which a jailed process inherits its control socket.
pub(crate) const CONTROL: RawFd = 3;

/// Takes over the inherited control socket. To be called once, right after logging was started: if
/// there is none, the log says why.
pub(crate) fn inherited_control() -> Option<OwnedFd> {
    let explain = |error: &io::Error| {
        log::error!("no control socket, this program is started by bulkhead: {error}");
    };
    take_over_control().inspect_err(explain).ok()
}

fn take_over_control() -> io::Result<OwnedFd> {
    // SAFETY: only looks the descriptor up; nothing else has had the time to open one.
    let inherited = unsafe { BorrowedFd::borrow_raw(CONTROL) };
    rustix::net::sockopt::socket_type(inherited)?;
    rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, as was just seen, and the caller promises that nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(CONTROL) })
}
