//! Starts the jailed processes: each is PID 1 of a new pid namespace and has its control socket as
//! descriptor 3, `/dev/null` as standard input and output, and a log file as standard error.
//!
//! They enter their jails themselves (`bulkhead_vmm::jail`).

// UNSAFETY: the descriptor number of an inherited socket is set between fork and exec, and the
// descriptors that a caller left open are marked for closing.
#![expect(unsafe_code, reason = "pre_exec and close_range have no safe form in std or rustix")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use bulkhead_vmm::seqpacket;
use nix::sched::{CloneFlags, unshare};

use crate::state::process::Process;

/// The descriptor number of a jailed process's control socket.
const CONTROL: RawFd = 3;

/// A jailed process; dropping it kills it.
#[derive(Debug)]
pub struct Jailed {
    child: Child,
    /// Its pid on the host.
    pub process: Process,
}

/// What a jailed process is started from.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program's path.
    pub program: &'a Path,
    /// The pod's state directory: its only argument, which it ignores and `ps` shows.
    pub pod: &'a Path,
    /// Its standard error.
    pub log: File,
}

/// Starts a process; returns the supervisor's end of its control socket too.
///
/// # Errors
/// When it cannot be started.
pub fn jailed(launch: Launch<'_>) -> io::Result<(Jailed, OwnedFd)> {
    let (ours, theirs) = seqpacket::pair()?;
    // Not equal to `CONTROL`: dup2 onto the same number would keep close-on-exec.
    let theirs = rustix::io::fcntl_dupfd_cloexec(&theirs, CONTROL + 1)?;
    let mut command = Command::new(launch.program);
    command.arg(launch.pod).env_clear();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(launch.log);
    let number = theirs.as_raw_fd();
    // SAFETY: the closure makes one async-signal-safe system call and allocates nothing.
    unsafe { command.pre_exec(move || copy(number, CONTROL)) };
    // The children of this thread are in the new pid namespace; the supervisor itself is not.
    let spawning = thread::Builder::new().name("spawn".into()).spawn(move || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        command.spawn()
    })?;
    let child = spawning.join().unwrap_or_else(|_| Err(io::Error::other("thread failed")))?;
    drop(theirs);
    let process = Process::find(child.id())?;
    Ok((Jailed { child, process }, ours))
}

fn copy(number: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: dup2 accesses no memory. If it replaces a descriptor, that has no owner in this
    // process, which is about to execute another program.
    match unsafe { libc::dup2(number, to) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        // Both fail only if the child was already waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets a program inherit descriptors, with the numbers that they have in this process.
pub fn hand_down<'a>(command: &mut Command, descriptors: impl Iterator<Item = BorrowedFd<'a>>) {
    let numbers: Vec<_> = descriptors.map(|fd| fd.as_raw_fd()).collect();
    let keep = move || {
        numbers.iter().try_for_each(|number| {
            // SAFETY: fcntl with F_SETFD accesses no memory. The child has a copy of every
            // descriptor of this process, and for one that is missing fcntl returns an error.
            match unsafe { libc::fcntl(*number, libc::F_SETFD, 0) } {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
    };
    // SAFETY: the closure makes async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(keep) };
}

/// Lets a program inherit a descriptor with another number.
///
/// # Errors
/// When this process has no descriptors left.
pub fn hand_down_as(command: &mut Command, descriptor: OwnedFd, to: RawFd) -> io::Result<()> {
    // Not equal to the other number: dup2 onto the same number would keep close-on-exec.
    let descriptor = rustix::io::fcntl_dupfd_cloexec(&descriptor, to + 1)?;
    // SAFETY: the closure makes one async-signal-safe system call and allocates nothing.
    unsafe { command.pre_exec(move || copy(descriptor.as_raw_fd(), to)) };
    Ok(())
}

/// Sets close-on-exec on every descriptor but the standard streams, so that descriptors that the
/// caller left open are not inherited by the supervisor.
///
/// # Errors
/// When the kernel is older than 5.11.
pub fn close_inherited_on_exec() -> io::Result<()> {
    let (first, last) = (3, libc::c_uint::MAX);
    let flags = libc::c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).map_err(io::Error::other)?;
    // SAFETY: no descriptor is closed now, so no owner loses its descriptor.
    match unsafe { libc::close_range(first, last, flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn launch<'a>(program: &'a str, pod: &'a str) -> Launch<'a> {
        let log = tempfile::tempfile().unwrap();
        Launch { program: Path::new(program), pod: Path::new(pod), log }
    }

    #[test]
    #[ignore = "needs the test host"]
    fn a_jailed_process_has_its_socket_and_dies_with_its_owner() {
        let (jailed, control) = jailed(launch("/bin/sh", "/dev/null")).unwrap();
        let process = jailed.process;
        assert!(process.wait(Duration::from_secs(5)), "a shell without input ends");
        drop(jailed);
        assert!(!process.is_alive());
        assert!(seqpacket::receive(&control).unwrap().is_none(), "nobody else holds the socket");
    }

    #[test]
    #[ignore = "needs the test host"]
    fn a_program_that_is_missing_is_an_error() {
        let error = jailed(launch("/nonexistent", "pod")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
