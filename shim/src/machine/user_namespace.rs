//! User namespaces without processes, whose id mappings the kernel uses for idmapped mounts.
//!
//! A process creates a user namespace by entering it. Here a child process does only that. It exits
//! when its parent closes the socket between them or ends.

// UNSAFETY: a process with threads may fork only if the child makes nothing but system calls.
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

/// Makes a user namespace. It exists as long as its descriptor, or a mount that uses it.
///
/// # Errors
/// When the kernel does not allow another user namespace, or refuses the mappings.
pub(crate) fn with_mappings(
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
    // SAFETY: the child only makes system calls with data on its stack and exits; it allocates and
    // locks nothing.
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
    // The child exits now that its socket is closed.
    while waitpid(child, None) == Err(nix::Error::EINTR) {}
    namespace
}

/// Runs in the child: enters the namespace, writes 0 or the errno to the parent, and waits until
/// the parent closes its end.
fn enter_and_wait(parent: &OwnedFd) -> ! {
    let failed = unshare(CloneFlags::CLONE_NEWUSER).err().map_or(0, |error| error as i32);
    // If the parent is gone, the read below returns at once and the child exits.
    let _ = write(parent, &failed.to_le_bytes());
    let _ = retry_on_intr(|| read(parent, &mut [0; 1]));
    // SAFETY: _exit ends the process without running exit handlers of the parent.
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

/// The lines of `uid_map` or `gid_map`: id inside, id outside, length; user_namespaces(7).
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
    #[ignore = "needs the test host"]
    fn a_namespace_is_another_than_this_one_and_its_mappings_are_the_kernels_business() {
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
