//! User namespaces that hold mappings and nobody, for the kernel to map the owners of a mount by.
//!
//! A namespace is made by a process that enters it. Here that is a child which does nothing else,
//! and ends when its parent lets go of it, however that comes about.

// UNSAFETY: a process with threads may fork only if the child does no more than make system calls.
#![expect(unsafe_code, reason = "fork(2), and _exit(2) in the child")]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use oci_spec::runtime::LinuxIdMapping;
use rustix::io::{read, retry_on_intr, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// Makes one; it lives as long as its descriptor, or a mount that uses it.
///
/// # Errors
/// When the kernel makes no user namespace, or refuses the mappings.
pub(crate) fn with_mappings(
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
    // SAFETY: the child makes system calls on its stack and ends; it allocates and locks nothing.
    let child = match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            enter_and_wait(&theirs)
        }
        ForkResult::Parent { child } => child,
    };
    drop(theirs);
    let namespace = mapped(child, &ours, uids, gids);
    drop(ours);
    // It has nothing left to wait for.
    while waitpid(child, None) == Err(nix::Error::EINTR) {}
    namespace
}

/// The child: tells with one byte whether it is inside, and stays until the other end is closed.
fn enter_and_wait(parent: &OwnedFd) -> ! {
    let failed = unshare(CloneFlags::CLONE_NEWUSER).err().map_or(0, |error| error as i32);
    // Without a parent there is nothing to do but to end.
    let _ = write(parent, &failed.to_le_bytes());
    let _ = retry_on_intr(|| read(parent, &mut [0; 1]));
    // SAFETY: it ends the process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

fn mapped(
    child: Pid,
    link: &OwnedFd,
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> io::Result<OwnedFd> {
    let mut failed = [0; 4];
    if retry_on_intr(|| read(link, &mut failed))? != failed.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match i32::from_le_bytes(failed) {
        0 => {}
        number => return Err(io::Error::from_raw_os_error(number)),
    }
    fs::write(format!("/proc/{child}/uid_map"), lines(uids))?;
    fs::write(format!("/proc/{child}/gid_map"), lines(gids))?;
    Ok(File::open(format!("/proc/{child}/ns/user"))?.into())
}

/// As the kernel reads them: inside, outside, how many; user_namespaces(7).
fn lines(mappings: &[LinuxIdMapping]) -> String {
    let mut lines = String::new();
    for mapping in mappings {
        let (inside, outside) = (mapping.container_id(), mapping.host_id());
        // Writing to a string does not fail.
        let _ = writeln!(lines, "{inside} {outside} {}", mapping.size());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::MetadataExt as _;

    fn mappings(list: serde_json::Value) -> Vec<LinuxIdMapping> {
        serde_json::from_value(list).unwrap()
    }

    #[test]
    fn a_namespace_is_another_than_this_one_and_its_mappings_are_the_kernels_business() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let map = mappings(json!([
            {"containerID": 0, "hostID": 100_000, "size": 10},
            {"containerID": 10, "hostID": 5, "size": 1}
        ]));
        assert_eq!(lines(&map), "0 100000 10\n10 5 1\n");
        let namespace = File::from(with_mappings(&map, &map).unwrap()).metadata().unwrap();
        assert_ne!(namespace.ino(), fs::metadata("/proc/self/ns/user").unwrap().ino());
        let twice = mappings(json!([
            {"containerID": 0, "hostID": 1, "size": 10}, {"containerID": 5, "hostID": 50, "size": 1}
        ]));
        let error = with_mappings(&map, &twice).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
