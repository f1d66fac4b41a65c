//! The interpreter that the host's kernel holds open for a format, where no path leads to it any
//! more: `docker run --privileged tonistiigi/binfmt` registers interpreters of its own image, and
//! the container is gone afterwards.
//!
//! The kernel gives this file to nobody. So a file of the format is executed, and the process stops
//! before the first instruction: its program is the interpreter. None of it ever runs.

// UNSAFETY: what runs between fork(2) and execve(2) must be system calls only.
#![expect(unsafe_code, reason = "ptrace(2) in the child")]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::MountAttrFlags;
use rustix::process::{Signal as ParentSignal, set_parent_process_death_signal};

use super::entry::Entry;
use crate::machine::share;

/// The interpreter of a format that is in use. `newer` are the formats that the kernel tries before
/// it.
///
/// # Errors
/// A newer format is for the same files, or the kernel does not let us look.
pub(super) fn by_kernel(entry: &Entry, newer: &[Entry]) -> io::Result<File> {
    let hidden = || io::Error::other("newer formats are for the same files");
    let (content, extension) = entry.sample().ok_or_else(hidden)?;
    if newer.iter().any(|other| other.fits(&content, &extension)) {
        return Err(hidden());
    }
    // Most directories for such files are mounted so that nothing in them can be executed.
    let directory = share::mount_nowhere("tmpfs", &[], MountAttrFlags::MOUNT_ATTR_NOSUID)?;
    let name = match extension.is_empty() {
        true => b"sample".to_vec(),
        false => [b"sample.", &extension[..]].concat(),
    };
    let new = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(&directory, &name[..], new, Mode::from_raw_mode(0o700))?;
    File::from(file).write_all(&content)?;
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend(name);
    let mut child = start(path)?;
    let found = stopped(&child).and_then(|process| program(process, entry));
    let _ = child.kill();
    // A process that was killed ends.
    let _ = child.wait();
    found
}

/// Starts a program that stops before its first instruction. Its tracer is this thread, and it does
/// not outlive it.
fn start(path: Vec<u8>) -> io::Result<Child> {
    let mut command = Command::new(OsString::from_vec(path));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let before = || {
        set_parent_process_death_signal(Some(ParentSignal::KILL))?;
        Ok(ptrace::traceme()?)
    };
    // SAFETY: these are two system calls.
    unsafe { command.pre_exec(before) };
    command.spawn()
}

/// Waits until the program is there.
fn stopped(child: &Child) -> io::Result<Pid> {
    let process = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    loop {
        match waitpid(process, None) {
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP)) => return Ok(process),
            Err(nix::Error::EINTR) => {}
            Ok(other) => return Err(io::Error::other(format!("the process has {other:?}"))),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The program of a process, if that is the interpreter.
fn program(process: Pid, entry: &Entry) -> io::Result<File> {
    // An interpreter can have an interpreter of its own, whose path is first then.
    let arguments = fs::read(format!("/proc/{process}/cmdline"))?;
    if arguments.split(|byte| *byte == 0).next() != Some(&entry.format.interpreter[..]) {
        return Err(io::Error::other("another program runs instead"));
    }
    File::open(format!("/proc/{process}/exe"))
}
