//! What goes on after the process that a stand-in stands for has ended: other processes of the
//! guest may still write to its streams, and a reader on the host may not have read yet what was
//! written before.
//!
//! Under runc such processes hold the caller's own pipes, and nobody waits for them. Here a child
//! of the stand-in does, so that the stand-in itself can end with the process. The child ends when
//! the streams do: at the latest with the machine, once all that came out of it has been read.

// UNSAFETY: fork(2), and closing by number what the child does not need.
#![expect(unsafe_code, reason = "fork(2), close_range(2) and _exit(2)")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::SigSet;
use nix::unistd::{ForkResult, fork};

use super::copy::{Copies, Halted};

/// Leaves a process behind that goes on with the copies and keeps `home` open; `null` is the null
/// device.
///
/// # Errors
/// When no process can be forked; the copies have ended then.
pub(super) fn leave_behind(
    copies: Vec<Halted>,
    home: Option<BorrowedFd<'_>>,
    null: &OwnedFd,
) -> io::Result<()> {
    if copies.is_empty() {
        return Ok(());
    }
    // SAFETY: the copies' threads have ended. Any other thread of this process waits for the
    // calling thread to end and holds no lock, so that the child may allocate and start threads.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(()),
        ForkResult::Child => {
            go_on(copies, home, null);
            // SAFETY: the process ends; what belongs to its parent is not dropped.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The life of the child.
fn go_on(copies: Vec<Halted>, home: Option<BorrowedFd<'_>>, null: &OwnedFd) {
    let _ = rustix::process::setsid();
    // Signals were blocked to be passed to the container. This process is to end by them.
    let _ = SigSet::empty().thread_set_mask();
    if let_go_of_the_rest(&copies, home, null).is_err() {
        return;
    }
    let mut resumed = Copies::new();
    if copies.into_iter().try_for_each(|copy| resumed.resume(copy).map(drop)).is_ok() {
        resumed.join();
    }
}

/// Closes every descriptor but `home` and those of the copies; the standard streams become the null
/// device.
fn let_go_of_the_rest(
    copies: &[Halted],
    home: Option<BorrowedFd<'_>>,
    null: &OwnedFd,
) -> io::Result<()> {
    rustix::stdio::dup2_stdin(null)?;
    rustix::stdio::dup2_stdout(null)?;
    rustix::stdio::dup2_stderr(null)?;
    let descriptors = copies.iter().flat_map(Halted::descriptors);
    let mut kept: Vec<_> =
        descriptors.map(|fd| fd.as_fd()).chain(home).map(|fd| fd.as_raw_fd()).collect();
    kept.sort_unstable();
    let mut next = 3;
    for number in kept.into_iter().map(i32::cast_unsigned).chain([libc::c_uint::MAX]) {
        if next < number {
            // SAFETY: what is closed belongs to values of the parent, which this process, a copy of
            // it, neither uses nor drops.
            unsafe { libc::close_range(next, number - 1, 0) };
        }
        next = next.max(number.saturating_add(1));
    }
    Ok(())
}
