//! The files of the share: what each FUSE request does to them, `linux/fuse.h`.
//!
//! Requests are answered by system calls on descriptors: a name is always looked up in a directory
//! that is held open, never through a path, and never follows a symbolic link. The guest's kernel
//! checks permissions (virtio-fs always mounts with `default_permissions`); here everything is
//! allowed that the jail's capabilities allow.
//!
//! What the guest may cache: names and attributes for a time that depends on who else may change
//! them ([`Place::valid`]), and file pages until the file changes. The host's processes may change
//! files too. So pages are dropped at an open that finds another change time ([`data`]), and all
//! data is written before the guest's `write` returns. Lookups of names that do not exist are not
//! cached.
//!
//! The guest opens devices, sockets and the FIFOs of its root itself; here they are only names. A
//! socket that it binds in a directory of the host is bound here as well ([`Sockets`]).

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, Mode, OFlags, Statx, openat};
use rustix::io::Errno;

use super::caller::Caller;
use super::fifos::Fifos;
use super::handles::Handles;
use super::inodes::{Inode, Inodes, device};
use super::places::Place;
use super::slots::{Slot, Slots};
use super::sockets::Sockets;
use super::watches::Watches;
use super::wire::{Body, DATA_MAX, Reply, Request, opcode};
use locks::Locks;

mod attributes;
mod data;
mod directories;
mod fifos;
mod flags;
pub(super) mod locks;
mod names;
mod sockets;
mod xattr;

/// The result of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// To be answered now; the body is in the reply.
    Done(Result<(), Errno>),
    /// Never answered.
    Silent,
    /// Answered later: when a lock is free, something has happened, or a socket is connected.
    Later,
    /// This other request is to be answered as interrupted.
    Interrupted(u64),
    /// Done; the request that waited for events, if there was one, is to be answered first.
    Ended(Option<u64>),
}

/// Everything that is served.
#[derive(Debug)]
pub(super) struct Share {
    /// `/proc/self/fd`, which is not reachable by a path.
    proc_self_fd: Arc<OwnedFd>,
    slots: Arc<Slots>,
    inodes: Inodes,
    handles: Handles,
    locks: Locks,
    watches: Arc<Watches>,
    fifos: Fifos,
    sockets: Sockets,
    /// The guest mounts each mount of the share as a file system of its own.
    submounts: AtomicBool,
}

impl Share {
    /// Serves the root directory of the process.
    pub(super) fn new(
        proc_self_fd: OwnedFd,
        slots: Arc<Slots>,
        sockets: Sockets,
    ) -> Result<Self, Errno> {
        let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let inodes = Inodes::new(root, Arc::clone(&slots))?;
        let proc_self_fd = Arc::new(proc_self_fd);
        let watches = Watches::new(Arc::clone(&proc_self_fd));
        let (handles, locks, fifos) = (Handles::default(), Locks::default(), Fifos::default());
        let submounts = AtomicBool::new(false);
        Ok(Self { proc_self_fd, slots, inodes, handles, locks, watches, fifos, sockets, submounts })
    }

    /// The working directory that [`Share::handle`] needs its thread to have.
    pub(super) fn thread_directory(&self) -> impl AsFd {
        &self.proc_self_fd
    }

    /// Answers requests that wait for events, see [`Watches::run`].
    pub(super) fn run_watches(&self, send: impl Fn(&[u8])) -> Result<(), Errno> {
        self.watches.run(&self.inodes, send)
    }

    /// Answers requests that wait for FIFOs, see [`Fifos::run`].
    pub(super) fn run_fifos(&self, send: impl Fn(&[u8])) -> Result<(), Errno> {
        self.fifos.run(send)
    }

    /// The waiting locks.
    pub(super) fn locks(&self) -> &Locks {
        &self.locks
    }

    /// Executes a request.
    pub(super) fn handle(
        &self,
        request: &Request,
        message: &[u8],
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let mut body = Body::of(message);
        match request.opcode {
            opcode::FORGET => self.forget(request, &mut body),
            opcode::BATCH_FORGET => self.batch_forget(&mut body),
            opcode::SETLKW => self.set_lock_and_wait(request, &mut body),
            opcode::INTERRUPT => self.interrupt(&mut body),
            // The guest is about to leave.
            opcode::WATCH if request.node == 0 => Outcome::Ended(self.watches.stop()),
            opcode::FIFO_POLL if request.node == 0 => Outcome::Ended(self.fifos.stop()),
            opcode::WATCH_EVENTS => later(self.watches.wait(request.unique)),
            opcode::FIFO_EVENTS => later(self.fifos.wait(request.unique)),
            opcode::SOCKET_CONNECT => self.connect(request, &mut body, reply),
            _ => Outcome::Done(self.answer(request, &mut body, reply)),
        }
    }

    fn answer(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        match request.opcode {
            opcode::INIT => self.init(body, reply),
            opcode::DESTROY => {
                self.reset();
                Ok(())
            }
            opcode::LOOKUP => self.lookup(request, body, reply),
            opcode::GETATTR => self.get_attributes(request, reply),
            opcode::STATX => self.get_extended_attributes(request, reply),
            opcode::SETATTR => self.set_attributes(request, body, reply),
            opcode::READLINK => self.read_link(request, reply),
            opcode::SYMLINK => self.symlink(request, body, reply),
            opcode::MKNOD => self.mknod(request, body, reply),
            opcode::MKDIR => self.mkdir(request, body, reply),
            opcode::UNLINK => self.unlink(request, body),
            opcode::RMDIR => self.rmdir(request, body),
            opcode::RENAME => self.rename(request, body),
            opcode::RENAME2 => self.rename2(request, body),
            opcode::LINK => self.link(request, body, reply),
            opcode::CREATE => self.create(request, body, reply),
            opcode::TMPFILE => self.create_unnamed(request, body, reply),
            opcode::OPEN => self.open(request, body, reply),
            opcode::READ => self.read(request, body, reply),
            opcode::WRITE => self.write(request, body, reply),
            opcode::LSEEK => self.seek(request, body, reply),
            opcode::FALLOCATE => self.allocate(request, body),
            opcode::COPY_FILE_RANGE => self.copy_range(request, body, reply),
            opcode::FLUSH => self.flush(request, body),
            opcode::FSYNC | opcode::FSYNCDIR => self.sync(request, body),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request, body),
            opcode::OPENDIR => self.open_directory(request, reply),
            opcode::READDIR => self.read_directory(request, body, reply),
            opcode::READDIRPLUS => self.read_directory_plus(request, body, reply),
            opcode::STATFS => self.stat_file_system(request, reply),
            opcode::SETXATTR => self.set_xattr(request, body),
            opcode::GETXATTR => self.get_xattr(request, body, reply),
            opcode::LISTXATTR => self.list_xattrs(request, body, reply),
            opcode::REMOVEXATTR => self.remove_xattr(request, body),
            opcode::GETLK => self.get_lock(request, body, reply),
            opcode::SETLK => self.set_lock(request, body),
            opcode::IOCTL => self.control(request, body, reply),
            opcode::FIFO_POLL => self.poll_fifo(request, body, reply),
            opcode::SOCKET_LISTEN => self.listen(request, &mut *body),
            opcode::SOCKET_RELEASE => {
                self.sockets.release(request.node);
                Ok(())
            }
            opcode::WATCH => self.watches.watch(&*self.inodes.get(request.node)?, body.u32()?),
            _ => Err(Errno::NOSYS),
        }
    }

    /// Negotiates, `struct fuse_init_in` and `fuse_init_out`.
    fn init(&self, body: &mut Body<'_>, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let (major, minor, readahead, low) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        if major != 7 || minor < MINOR_MIN {
            return Err(Errno::PROTO);
        }
        // A guest that negotiates has just started: no state of an earlier one counts.
        self.reset();
        self.submounts.store(low & WANTED & SUBMOUNTS != 0, Ordering::Relaxed);
        reply.put_u32s([7, MINOR, readahead.min(DATA_MAX), low & WANTED]);
        // Background requests: how many there may be, and from how many on the guest holds back.
        reply.put_u32s([BACKGROUND_MAX | (BACKGROUND_MAX * 3 / 4) << 16, DATA_MAX]);
        // Unit of times, in nanoseconds; the most pages in one request.
        reply.put_u32s([1, DATA_MAX / 4096]);
        reply.put(&[0; 32]);
        Ok(())
    }

    fn reset(&self) {
        self.locks.clear();
        // Whoever waited is gone.
        self.watches.stop();
        self.fifos.stop();
        self.sockets.clear();
        self.handles.clear();
        self.inodes.clear();
    }

    fn forget(&self, request: &Request, body: &mut Body<'_>) -> Outcome {
        if let Ok(count) = body.u64() {
            self.inodes.forget(request.node, count);
        }
        Outcome::Silent
    }

    fn batch_forget(&self, body: &mut Body<'_>) -> Outcome {
        // Ends with the message, whatever count it claims.
        let Ok(count) = body.u64() else { return Outcome::Silent };
        for _ in 0..count & 0xffff_ffff {
            let (Ok(node), Ok(lookups)) = (body.u64(), body.u64()) else { break };
            self.inodes.forget(node, lookups);
        }
        Outcome::Silent
    }

    /// Reopens an inode; the kernel follows the link to the file itself, whatever its name is.
    fn reopen(&self, inode: &impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = (flags | OFlags::CLOEXEC) - OFlags::NOFOLLOW - OFlags::CREATE;
        openat(&self.proc_self_fd, link_name(inode), flags, Mode::empty())
    }

    /// Writes `struct fuse_entry_out` for a file whose lookup the guest is to count. `place` is a
    /// directory that has the file and its name there; `slot` is used if the file is new.
    fn put_entry(
        &self,
        place: (&Inode, &CStr),
        path: OwnedFd,
        slot: Option<Slot>,
        reply: &mut Reply<'_>,
    ) -> Result<Arc<Inode>, Errno> {
        let (inode, attributes) = self.inodes.remember(place, path, slot)?;
        self.put_known_entry(&inode, &attributes, reply);
        Ok(inode)
    }

    fn put_known_entry(&self, inode: &Inode, attributes: &Statx, reply: &mut Reply<'_>) {
        let valid = inode.valid();
        // Node, generation, seconds for which name and attributes are valid; then nanoseconds.
        reply.put_u64s([inode.node, 0, valid.as_secs(), valid.as_secs()]);
        reply.put_u32s([valid.subsec_nanos(), valid.subsec_nanos()]);
        self.put_attributes(inode, attributes, reply);
    }

    /// The inode number that the guest sees for a file.
    fn number(&self, place: Place, attributes: &Statx) -> u64 {
        self.number_of(place, device(attributes), attributes.stx_ino)
    }

    /// The host's own number where the guest has a file system for each of the host's.
    fn number_of(&self, place: Place, device: u64, inode: u64) -> u64 {
        if self.is_submount(place) { inode } else { self.inodes.number(device, inode) }
    }

    /// Whether a file here is in a file system of the guest that is only for its mount.
    fn is_submount(&self, place: Place) -> bool {
        place.is_submount() && self.submounts.load(Ordering::Relaxed)
    }
}

/// A request that waits, unless it cannot.
fn later(waits: Result<(), Errno>) -> Outcome {
    waits.map_or_else(|error| Outcome::Done(Err(error)), |()| Outcome::Later)
}

/// The name of a descriptor in `/proc/self/fd`.
fn link_name(file: &impl AsFd) -> String {
    use std::os::fd::AsRawFd;
    file.as_fd().as_raw_fd().to_string()
}

/// The ids under which something is created, with the umask of the request.
fn caller(request: &Request, umask: u32) -> Caller {
    Caller { uid: request.uid, gid: request.gid, umask }
}

/// The protocol's version 7.38, Linux 6.2, which has all that is answered here.
const MINOR: u32 = 38;
/// The oldest version that has the fields that are read here: Linux 4.20.
const MINOR_MIN: u32 = 28;
/// How many background requests (read-ahead, asynchronous direct writes) the guest has in flight.
const BACKGROUND_MAX: u32 = 64;
/// The features that are used if the guest has them, `FUSE_*` flags of INIT. Left out on purpose:
/// WRITEBACK_CACHE (the host would see writes late), ATOMIC_O_TRUNC, EXPORT_SUPPORT (so "." and
/// ".." are never looked up), and everything about DAX.
const WANTED: u32 = {
    let async_read = 1;
    let posix_locks = 1 << 1;
    let big_writes = 1 << 5;
    let dont_mask = 1 << 6;
    let flock_locks = 1 << 10;
    let auto_invalidate_data = 1 << 12;
    let readdirplus = 1 << 13;
    let readdirplus_auto = 1 << 14;
    let async_direct = 1 << 15;
    let parallel_directory_operations = 1 << 18;
    let posix_acl = 1 << 20;
    let max_pages = 1 << 22;
    let cache_symlinks = 1 << 23;
    let handle_killpriv_v2 = 1 << 28;
    let setxattr_ext = 1 << 29;

    async_read
        | posix_locks
        | big_writes
        | dont_mask
        | flock_locks
        | auto_invalidate_data
        | readdirplus
        | readdirplus_auto
        | async_direct
        | parallel_directory_operations
        | posix_acl
        | max_pages
        | cache_symlinks
        | SUBMOUNTS
        | handle_killpriv_v2
        | setxattr_ext
};
/// `FUSE_SUBMOUNTS`: the guest mounts directories that are marked as roots of file systems.
const SUBMOUNTS: u32 = 1 << 27;
