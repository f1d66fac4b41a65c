//! Requests about the contents of a file: open, read, write and the like.
//!
//! `O_DIRECT` has an effect in the guest only, whose page cache is bypassed. Here the host's page
//! cache is used, because the data in a message is not aligned. `O_APPEND` is honoured write by
//! write, because one open file of the guest sends both appending writes and the pages of a
//! mapping.

use std::ffi::CStr;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync,
    openat, seek,
};
use rustix::io::{Errno, ReadWriteFlags, dup, pread, pwrite, pwritev2, read, write};
use rustix::time::{ClockId, clock_gettime};

use super::names::{open_name, permissions};
use super::{Share, caller};
use crate::fileserver::caller::stripping_set_id;
use crate::fileserver::inodes::Inode;
use crate::fileserver::slots::{Kept, Slot};
use crate::fileserver::wire::{Body, DATA_MAX, Reply, Request};

/// `FOPEN_KEEP_CACHE`: the pages that the guest has of this file are still valid.
const KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_FLUSH_CHANGES` of our guest's kernel: no FLUSH from who has only read.
const FLUSH_CHANGES: u32 = 1 << 30;
/// `FOPEN_UNSHARED` of our guest's kernel: nobody else uses this file.
pub(super) const UNSHARED: u32 = 1 << 31;
/// `FUSE_OPEN_KILL_SUIDGID`.
const OPEN_KILL_SUIDGID: u32 = 1;
/// `FUSE_WRITE_CACHE`: pages of a mapping, not a call of `write`.
const WRITE_CACHE: u32 = 1;
/// `FUSE_WRITE_KILL_SUIDGID`.
const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_RELEASE_FLUSH`.
const RELEASE_FLUSH: u32 = 1;
/// `FUSE_FSYNC_FDATASYNC`.
const DATA_ONLY: u32 = 1;
/// The most that one COPY_FILE_RANGE copies, so that no thread is busy with it for long.
const COPY_MAX: u64 = 16 << 20;
/// How long ago a file must have changed so that the next change is sure to have another change
/// time: file times tick only every few milliseconds.
const SETTLED_NS: i128 = 50_000_000;

impl Share {
    pub(super) fn open(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (flags, open_flags) = (body.u32()?, body.u32()?);
        let inode = self.inodes.get(request.node)?;
        match inode.kind {
            FileType::RegularFile => {}
            FileType::Fifo => return self.open_fifo(&inode, flags, reply),
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::NXIO),
        }
        let flags = open_mode(flags);
        let strip = open_flags & OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC);
        let slot = self.slots.take()?;
        let file = stripping_set_id(strip, || self.reopen(&inode, flags))?;
        let cache = if self.cache_is_good(&inode)? { KEEP_CACHE } else { 0 };
        self.put_open(&inode, slot.keep(file), cache, reply);
        Ok(())
    }

    pub(super) fn create(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (flags, mode, umask, open_flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let name = body.name()?;
        let directory = self.inodes.get(request.node)?;
        // Taken before the file is created, after which both are needed.
        let slots = (self.slots.take()?, self.slots.take()?);
        // First with O_EXCL: opening a file that another user created has other rules.
        let exclusive =
            open_mode(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create = || openat(&directory, name, exclusive, permissions(mode));
        match caller(request, umask).run(create) {
            Ok(file) => self.put_created((&directory, name), file, slots, reply),
            Err(Errno::EXIST) if flags & OFlags::EXCL.bits() == 0 => {
                let strip = open_flags & OPEN_KILL_SUIDGID != 0;
                let place = (&*directory, name);
                self.put_existing(place, (open_mode(flags), strip), slots, reply)
            }
            Err(error) => Err(error),
        }
    }

    /// Opens an existing file, and counts a lookup of it only if that works.
    fn put_existing(
        &self,
        place: (&Inode, &CStr),
        (flags, strip): (OFlags, bool),
        (slot, open_slot): (Slot, Slot),
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let path = open_name(place.0, place.1)?;
        let (inode, _) = self.inodes.remember(place, path, Some(slot))?;
        let open = || {
            if inode.kind != FileType::RegularFile {
                // The name has changed since the guest looked it up; ESTALE makes it look again.
                return Err(Errno::STALE);
            }
            let file = stripping_set_id(strip, || self.reopen(&inode, flags))?;
            Ok((file, inode.stat()?))
        };
        let (file, attributes) = open().inspect_err(|_| self.inodes.forget(inode.node, 1))?;
        self.put_known_entry(&inode, &attributes, reply);
        self.put_open(&inode, open_slot.keep(file), 0, reply);
        Ok(())
    }

    /// TMPFILE: a file without a name, that can be given one.
    pub(super) fn create_unnamed(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (flags, mode, umask) = (body.u32()?, body.u32()?, body.u32()?);
        let directory = self.inodes.get(request.node)?;
        if directory.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        // O_EXCL: the caller decides whether the file may be given a name later.
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let flags = open_mode(flags) | OFlags::TMPFILE | OFlags::CLOEXEC | exclusive;
        let slots = (self.slots.take()?, self.slots.take()?);
        let create = || openat(&directory, ".", flags, permissions(mode));
        let file = caller(request, umask).run(create)?;
        self.put_created((&directory, c""), file, slots, reply)
    }

    fn put_created(
        &self,
        place: (&Inode, &CStr),
        file: OwnedFd,
        (slot, open_slot): (Slot, Slot),
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        // Opened through the file itself: its name may be another file's by now.
        let path = self.reopen(&file, OFlags::PATH)?;
        let inode = self.put_entry(place, path, Some(slot), reply)?;
        self.put_open(&inode, open_slot.keep(file), 0, reply);
        Ok(())
    }

    /// Writes `struct fuse_open_out`.
    pub(super) fn put_open(&self, inode: &Inode, file: Kept, flags: u32, reply: &mut Reply<'_>) {
        let unshared = if inode.place.is_unshared() { UNSHARED } else { 0 };
        reply.put_u64s([self.handles.insert(inode.node, inode.kind, file)]);
        reply.put_u32s([flags | FLUSH_CHANGES | unshared, 0]);
    }

    /// Whether the pages that the guest has cached since it last opened this file are still valid:
    /// nobody has changed the file since. If the guest wrote to the file itself, it loses its pages
    /// once.
    fn cache_is_good(&self, inode: &Inode) -> Result<bool, Errno> {
        let changed = inode.stat()?.stx_ctime;
        let now = clock_gettime(ClockId::Realtime);
        let nanoseconds =
            |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        let age = nanoseconds(now.tv_sec, now.tv_nsec)
            - nanoseconds(changed.tv_sec, changed.tv_nsec.into());
        // 34 bits of seconds and 30 of nanoseconds; 0 means that the next change could be missed.
        let stamp = if age < SETTLED_NS {
            0
        } else {
            changed.tv_sec.cast_unsigned() << 30 | u64::from(changed.tv_nsec)
        };
        let cached = inode.cached.swap(stamp, Ordering::Relaxed);
        Ok(stamp != 0 && cached == stamp)
    }

    pub(super) fn read(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        let handle = self.handles.get(handle, request.node)?;
        let room = reply.room(size.min(DATA_MAX) as usize);
        let len = match handle.kind {
            FileType::Fifo => read(&handle, room)?,
            _ => pread(&handle, room, offset)?,
        };
        reply.filled(len);
        Ok(())
    }

    pub(super) fn write(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (handle, offset) = (body.u64()?, body.u64()?);
        let (size, write_flags, _owner) = (body.u32()?, body.u32()?, body.u64()?);
        let (flags, _padding) = (body.u32()?, body.u32()?);
        let data = body.bytes(size)?;
        let handle = self.handles.get(handle, request.node)?;
        let append = flags & OFlags::APPEND.bits() != 0 && write_flags & WRITE_CACHE == 0;
        let write = || {
            if handle.kind == FileType::Fifo {
                write(&handle, data)
            } else if append {
                pwritev2(&handle, &[IoSlice::new(data)], offset, ReadWriteFlags::APPEND)
            } else {
                pwrite(&handle, data, offset)
            }
        };
        let written = stripping_set_id(write_flags & WRITE_KILL_SUIDGID != 0, write)?;
        // At most `size`, which is a u32.
        reply.put_u32s([u32::try_from(written).unwrap_or(size), 0]);
        Ok(())
    }

    pub(super) fn seek(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        const DATA: u32 = 3;
        const HOLE: u32 = 4;
        let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
        let handle = self.handles.get(handle, request.node)?;
        let position = match whence {
            DATA => SeekFrom::Data(offset),
            HOLE => SeekFrom::Hole(offset),
            // The guest handles the others itself.
            _ => return Err(Errno::INVAL),
        };
        reply.put_u64s([seek(&handle, position)?]);
        Ok(())
    }

    pub(super) fn allocate(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let (handle, offset, len, mode) = (body.u64()?, body.u64()?, body.u64()?, body.u32()?);
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        fallocate(self.handles.get(handle, request.node)?, mode, offset, len)
    }

    pub(super) fn copy_range(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (from, mut from_offset) = (body.u64()?, body.u64()?);
        let (node, to, mut to_offset) = (body.u64()?, body.u64()?, body.u64()?);
        let len = body.u64()?.min(COPY_MAX);
        let from = self.handles.get(from, request.node)?;
        let to = self.handles.get(to, node)?;
        let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        let copied =
            copy_file_range(&from, Some(&mut from_offset), &to, Some(&mut to_offset), len)?;
        reply.put_u32s([u32::try_from(copied).map_err(|_| Errno::OVERFLOW)?, 0]);
        Ok(())
    }

    /// FLUSH: a process closed a descriptor of a file that it may have changed, or of which the
    /// guest has locks; the process loses its own.
    pub(super) fn flush(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let (handle, _unused, _padding) = (body.u64()?, body.u32()?, body.u32()?);
        let handle = self.handles.get(handle, request.node)?;
        self.locks.release(request.node, body.u64()?);
        // Some file systems write back when any descriptor closes.
        drop(dup(&handle)?);
        Ok(())
    }

    pub(super) fn release(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let (number, _flags, release_flags) = (body.u64()?, body.u32()?, body.u32()?);
        if release_flags & RELEASE_FLUSH != 0 {
            self.locks.release(request.node, body.u64()?);
        }
        let handle = self.handles.remove(number, request.node)?;
        if handle.locked_ranges.load(Ordering::Relaxed) {
            self.locks.release_handle(number);
        }
        // Closing the file releases its lock of the whole file.
        drop(handle);
        self.locks.wake();
        Ok(())
    }

    pub(super) fn sync(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let (handle, flags) = (body.u64()?, body.u32()?);
        let handle = self.handles.get(handle, request.node)?;
        sync(&handle, flags & DATA_ONLY != 0)
    }
}

fn sync(file: impl AsFd, data_only: bool) -> Result<(), Errno> {
    if data_only { fdatasync(file) } else { fsync(file) }
}

/// The guest's open flags that are meant for the host.
fn open_mode(flags: u32) -> OFlags {
    let meant = OFlags::ACCMODE
        | OFlags::TRUNC
        | OFlags::NONBLOCK
        | OFlags::DSYNC
        | OFlags::SYNC
        | OFlags::NOATIME
        | OFlags::LARGEFILE;
    (OFlags::from_bits_retain(flags) & meant) - OFlags::PATH
}
