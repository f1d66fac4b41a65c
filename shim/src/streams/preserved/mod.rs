//! The descriptors that a container's process gets from the caller beside its standard streams
//! (`--preserve-fds`), at the same numbers. This module finds out what each of them is, or why it
//! cannot be passed into a machine.
//!
//! Ends of pipes and connected sockets are streams, which the stand-in copies (`super::copy`).
//! Files are shared with the guest until it has opened them. Memory devices are the guest's own.
//! Everything else belongs to the host's kernel and is refused.

// UNSAFETY: a number on which a caller left a descriptor is made an owned one.
#![expect(unsafe_code, reason = "inherited descriptors are only known by their numbers")]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bulkhead_protocol::DESCRIPTORS_MAX;
use rustix::fs::{
    FileType, OFlags, SeekFrom, Stat, StatVfsMountFlags, fcntl_getfl, fstat, fstatfs, fstatvfs,
    major, minor, seek,
};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};
use rustix::termios::isatty;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::copy::{Copies, Ends, Way};
use crate::machine::share;

/// The number of the first of these descriptors.
pub const FIRST: RawFd = 3;

/// File systems whose regular files are views of the host's kernel, by their numbers in statfs(2).
const VIEWS: [(u32, &str); 12] = [
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup"),
    (0x6e73_6673, "namespace"),
    (0x5049_4446, "pidfd"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0xcafe_4a11, "bpf"),
    (0x7363_6673, "securityfs"),
    (0x5345_434d, "secret memory"),
    (0x1980_0202, "message queue"),
];

/// Why descriptors are not passed.
#[derive(Debug, Error)]
pub enum PreservedError {
    /// More than a process gets.
    #[error("--preserve-fds {0}: at most {DESCRIPTORS_MAX} descriptors are passed")]
    TooMany(u32),
    /// One of them is not open.
    #[error("--preserve-fds {count}: descriptor {number} is not open; open it or pass fewer")]
    Closed {
        /// How many were asked for.
        count: u32,
        /// The first that is missing.
        number: RawFd,
    },
    /// It cannot be passed into a machine.
    #[error("descriptor {number} is {what}, {why}")]
    Refused {
        /// Which.
        number: RawFd,
        /// What it is.
        what: String,
        /// Why it cannot be passed, and what to do instead.
        why: &'static str,
    },
    /// It cannot be examined.
    #[error("descriptor {0}")]
    Look(RawFd, #[source] io::Error),
    /// It is a file that the file server cannot get.
    #[error("descriptor {number} is {name}, which cannot be shared with the guest")]
    Share {
        /// Which.
        number: RawFd,
        /// Its path.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a descriptor is to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DescriptorKind {
    /// The read end of a pipe.
    Reading,
    /// The write end of a pipe.
    Writing,
    /// A connected socket that carries a stream of bytes.
    Socket,
    /// A file.
    File {
        /// Where the next byte is read or written.
        offset: u64,
        /// It is on a read-only mount, or open for reading only.
        read_only: bool,
    },
    /// A directory.
    Directory {
        /// It is on a read-only mount, or open for reading only.
        read_only: bool,
    },
    /// A device that the guest has itself, by its path.
    Device(String),
}

impl DescriptorKind {
    /// Whether the guest opens it anew, through the share.
    #[must_use]
    pub const fn is_shared(&self) -> bool {
        matches!(self, Self::File { .. } | Self::Directory { .. })
    }

    /// Whether a stream carries its bytes.
    #[must_use]
    pub const fn is_stream(&self) -> bool {
        matches!(self, Self::Reading | Self::Writing | Self::Socket)
    }
}

/// One descriptor as it is described to the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// What it is.
    pub kind: DescriptorKind,
    /// Access mode and status flags, as open(2) has them.
    pub flags: u32,
}

/// Descriptors that a caller left to this process, in the order of their numbers.
#[derive(Debug, Default)]
pub struct Preserved(Vec<Taken>);

/// One of them.
#[derive(Debug)]
struct Taken {
    descriptor: Descriptor,
    fd: OwnedFd,
    /// A detached mount of it alone, if it is a file or directory.
    mount: Option<OwnedFd>,
}

impl Preserved {
    /// Takes the descriptors from [`FIRST`] on. To be called once, before anything is opened.
    ///
    /// # Errors
    /// When one is missing, or cannot be passed.
    pub fn take(count: u32) -> Result<Self, PreservedError> {
        if usize::try_from(count).map_or(true, |count| count > DESCRIPTORS_MAX) {
            return Err(PreservedError::TooMany(count));
        }
        let numbers = (FIRST..).take(usize::try_from(count).unwrap_or(DESCRIPTORS_MAX));
        if let Some(number) = numbers.clone().find(|number| !is_open(*number)) {
            return Err(PreservedError::Closed { count, number });
        }
        // SAFETY: it is open, and inherited: what this process has opened itself has taken lower
        // numbers, or nothing was opened. Each is taken once, so nobody else owns it.
        let owned = numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) });
        let owned: Vec<_> = owned.collect();
        owned.into_iter().map(Taken::look).collect::<Result<_, _>>().map(Self)
    }

    /// What they are.
    #[must_use]
    pub fn list(&self) -> Vec<Descriptor> {
        self.0.iter().map(|taken| taken.descriptor.clone()).collect()
    }

    /// The files among them, each as a mount of its own.
    #[must_use]
    pub fn mounts(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().filter_map(|taken| taken.mount.as_ref()).map(AsFd::as_fd).collect()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The descriptors, for a program that is to inherit them.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|taken| taken.fd.as_fd())
    }

    /// Starts to copy those that are streams. The others stay open as long as this value lives, with
    /// the locks that they may hold.
    pub(crate) fn relay(
        &mut self,
        mut streams: impl Iterator<Item = UnixStream>,
        copies: &mut Copies,
    ) -> io::Result<()> {
        for taken in std::mem::take(&mut self.0) {
            let ways: &[Way] = match taken.descriptor.kind {
                DescriptorKind::Reading => &[Way::In],
                DescriptorKind::Writing => &[Way::Out],
                DescriptorKind::Socket => &[Way::In, Way::Out],
                _ => {
                    self.0.push(Taken { mount: None, ..taken });
                    continue;
                }
            };
            let stream = streams.next().ok_or(io::ErrorKind::InvalidData)?;
            let ends = Arc::new(Ends { caller: taken.fd, stream, socket: ways.len() == 2 });
            ways.iter().try_for_each(|way| copies.start(ends.clone(), *way).map(drop))?;
        }
        Ok(())
    }
}

impl Taken {
    fn look(fd: OwnedFd) -> Result<Self, PreservedError> {
        let descriptor = describe(fd.as_fd())?;
        let mount = match descriptor.kind {
            DescriptorKind::File { read_only, .. } => Some((read_only, false)),
            DescriptorKind::Directory { read_only } => Some((read_only, true)),
            _ => None,
        };
        let cloned = |(read_only, recursive)| share::alone(fd.as_fd(), read_only, recursive);
        let mount = mount.map(cloned).transpose().map_err(|source| {
            let number = fd.as_raw_fd();
            PreservedError::Share { number, name: name(number), source }
        })?;
        Ok(Self { descriptor, fd, mount })
    }
}

/// Takes a descriptor that was left on a number. To be called once for each, before anything is
/// opened.
#[must_use]
pub fn inherited(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: it is open and inherited, and taken once, so nobody else owns it.
    is_open(number).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

fn is_open(number: RawFd) -> bool {
    // SAFETY: the borrow lasts for one system call, which sets the close-on-exec flag and fails if
    // the number is not open.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_setfd(fd, FdFlags::CLOEXEC).is_ok()
}

/// What a descriptor is, if it can be passed.
fn describe(fd: BorrowedFd<'_>) -> Result<Descriptor, PreservedError> {
    let number = fd.as_raw_fd();
    let failed = |error: rustix::io::Errno| PreservedError::Look(number, error.into());
    let refused = |what: &str, why| {
        let what = what.to_owned();
        Err(PreservedError::Refused { number, what, why })
    };
    let stat = fstat(fd).map_err(failed)?;
    let flags = fcntl_getfl(fd).map_err(failed)?;
    if flags.contains(OFlags::PATH) {
        let why = "which gives no access; open it for reading or writing";
        return refused("open with O_PATH", why);
    }
    let mode = flags & OFlags::RWMODE;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo if mode == OFlags::RDONLY => DescriptorKind::Reading,
        FileType::Fifo if mode == OFlags::WRONLY => DescriptorKind::Writing,
        FileType::Fifo => {
            let why = "and a stream into the machine has one direction; open each end by itself";
            return refused("a FIFO that is open for reading and writing", why);
        }
        FileType::Socket => match describe_socket(fd) {
            Ok(()) => DescriptorKind::Socket,
            Err((what, why)) => return refused(what, why),
        },
        FileType::CharacterDevice => match memory_device(stat.st_rdev) {
            Some(path) => DescriptorKind::Device(path.to_owned()),
            None if isatty(fd) => {
                let why = "and a container has one of its own; ask for it with process.terminal";
                return refused("a terminal", why);
            }
            None => return refused("a device", "which the guest does not have; close it"),
        },
        FileType::BlockDevice => {
            return refused("a block device", "which is no stream; list it in linux.devices");
        }
        FileType::RegularFile | FileType::Directory => {
            if let Some(view) = view(fd).map_err(failed)? {
                let why = "which shows the host's kernel; use the guest's own inside";
                return refused(&format!("of the {view} file system"), why);
            }
            describe_file(fd, &stat, flags).map_err(failed)?
        }
        _ => {
            let name = name(number);
            let why = "which only the host's kernel knows; close it, or pass a pipe or a socket";
            return refused(&name, why);
        }
    };
    if kind.is_shared() && name(number).starts_with("/memfd:") {
        let why = "which is memory of the host's; put its bytes into a file or a pipe";
        return refused("a memfd", why);
    }
    if kind.is_shared() && !has_name(number, &stat) {
        let why = "which cannot be shared; keep its name, or pass its bytes through a pipe";
        return refused("a file without a name", why);
    }
    Ok(Descriptor { kind, flags: flags.bits() })
}

/// The path of a device that every Linux has, Documentation/admin-guide/devices.txt.
fn memory_device(number: u64) -> Option<&'static str> {
    match (major(number), minor(number)) {
        (1, 3) => Some("/dev/null"),
        (1, 5) => Some("/dev/zero"),
        (1, 7) => Some("/dev/full"),
        (1, 8) => Some("/dev/random"),
        (1, 9) => Some("/dev/urandom"),
        _ => None,
    }
}

/// Checks that a socket is a connected stream; otherwise says what it is, and why it is refused.
fn describe_socket(fd: BorrowedFd<'_>) -> Result<(), (&'static str, &'static str)> {
    let families =
        [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6, AddressFamily::VSOCK];
    if socket_type(fd) != Ok(SocketType::STREAM)
        || !socket_domain(fd).is_ok_and(|family| families.contains(&family))
    {
        let why = "whose messages a stream of bytes does not keep apart; pass a stream socket";
        return Err(("a socket that is no stream", why));
    }
    if socket_acceptconn(fd) == Ok(true) {
        let why = "which belongs to the host's network; listen in the container and publish its \
                   port, or pass connections";
        return Err(("a listening socket", why));
    }
    if getpeername(fd).is_err() {
        return Err(("a socket that is not connected", "and cannot be inside; connect it before"));
    }
    Ok(())
}

fn describe_file(
    fd: BorrowedFd<'_>,
    stat: &Stat,
    flags: OFlags,
) -> rustix::io::Result<DescriptorKind> {
    let read_only = fstatvfs(fd)?.f_flag.contains(StatVfsMountFlags::RDONLY)
        // The guest opens the file again, and must not get more access than the caller has.
        || flags & OFlags::RWMODE == OFlags::RDONLY;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => DescriptorKind::Directory { read_only },
        _ => DescriptorKind::File { offset: seek(fd, SeekFrom::Current(0))?, read_only },
    })
}

/// The name of the file's file system, if that is a view of the host's kernel.
fn view(fd: BorrowedFd<'_>) -> rustix::io::Result<Option<&'static str>> {
    let number = fstatfs(fd)?.f_type;
    let known = VIEWS.iter().find(|(magic, _)| i64::from(*magic) == number);
    Ok(known.map(|(_, name)| *name))
}

/// Whether a file is still at the path at which it was opened, as far as the kernel knows: one that was
/// deleted cannot become a mount.
fn has_name(number: RawFd, stat: &Stat) -> bool {
    let name = name(number);
    // A file's own name may end like that.
    !name.ends_with(" (deleted)")
        || rustix::fs::stat(name.as_str())
            .is_ok_and(|named| (named.st_dev, named.st_ino) == (stat.st_dev, stat.st_ino))
}

/// The kernel's name for it, such as `anon_inode:[eventpoll]`.
fn name(number: RawFd) -> String {
    let link = fs::read_link(format!("/proc/self/fd/{number}"));
    link.map_or_else(|_| "of no known kind".to_owned(), |name| name.display().to_string())
}

#[cfg(test)]
mod tests;
