//! Requests about attributes: stat, chmod, chown, times, file systems.

use rustix::fs::{
    AtFlags, FileType, Gid, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    chmodat, chownat, fstatfs, ftruncate, utimensat,
};
use rustix::io::Errno;

use super::names::permissions;
use super::{Share, link_name};
use crate::fileserver::caller::stripping_set_id;
use crate::fileserver::inodes::{Inode, is_directory, is_mounted};
use crate::fileserver::wire::{Body, Reply, Request};

/// Which fields of SETATTR count, `FATTR_*`.
mod valid {
    pub(super) const MODE: u32 = 1;
    pub(super) const UID: u32 = 1 << 1;
    pub(super) const GID: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const ATIME: u32 = 1 << 4;
    pub(super) const MTIME: u32 = 1 << 5;
    pub(super) const HANDLE: u32 = 1 << 6;
    pub(super) const ATIME_NOW: u32 = 1 << 7;
    pub(super) const MTIME_NOW: u32 = 1 << 8;
    pub(super) const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FUSE_ATTR_SUBMOUNT`: the root of a file system of its own.
const SUBMOUNT: u32 = 1;

/// `struct fuse_setattr_in`.
struct Changes {
    valid: u32,
    handle: u64,
    size: u64,
    accessed: Timespec,
    modified: Timespec,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Changes {
    fn read(body: &mut Body<'_>) -> Result<Self, Errno> {
        let (valid, _padding, handle, size) = (body.u32()?, body.u32()?, body.u64()?, body.u64()?);
        let (_owner, atime, mtime, _ctime) = (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (body.u32()?, body.u32()?, body.u32()?);
        let (mode, _unused, uid, gid) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        Ok(Self {
            valid,
            handle,
            size,
            accessed: time(valid, (valid::ATIME, valid::ATIME_NOW), atime, atime_ns),
            modified: time(valid, (valid::MTIME, valid::MTIME_NOW), mtime, mtime_ns),
            mode,
            uid,
            gid,
        })
    }

    fn has(&self, fields: u32) -> bool {
        self.valid & fields != 0
    }
}

/// A time to set, in the form of `utimensat(2)`.
fn time(valid: u32, (given, now): (u32, u32), seconds: u64, nanoseconds: u32) -> Timespec {
    let (tv_sec, tv_nsec) = match (valid & given != 0, valid & now != 0) {
        (_, true) => (0, UTIME_NOW),
        (true, false) => (seconds.cast_signed(), nanoseconds.into()),
        (false, false) => (0, UTIME_OMIT),
    };
    Timespec { tv_sec, tv_nsec }
}

impl Share {
    pub(super) fn get_attributes(
        &self,
        request: &Request,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let inode = self.inodes.get(request.node)?;
        let attributes = inode.stat()?;
        put_valid(&inode, reply);
        self.put_attributes(&inode, &attributes, reply);
        Ok(())
    }

    /// STATX, which has the birth time.
    pub(super) fn get_extended_attributes(
        &self,
        request: &Request,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let inode = self.inodes.get(request.node)?;
        let stat = inode.stat()?;
        put_valid(&inode, reply);
        reply.put_u64s([0, 0]);
        // Of what the file system has: the basic attributes and the birth time.
        reply.put_u32s([stat.stx_mask & 0xfff, stat.stx_blksize]);
        reply.put_u64s([stat.stx_attributes.bits()]);
        reply.put_u32s([stat.stx_nlink, stat.stx_uid, stat.stx_gid, stat.stx_mode.into()]);
        reply.put_u64s([self.number(inode.place, &stat), stat.stx_size, stat.stx_blocks]);
        reply.put_u64s([stat.stx_attributes_mask.bits()]);
        for time in [stat.stx_atime, stat.stx_btime, stat.stx_ctime, stat.stx_mtime] {
            reply.put_u64s([time.tv_sec.cast_unsigned()]);
            reply.put_u32s([time.tv_nsec, 0]);
        }
        reply.put_u32s([stat.stx_rdev_major, stat.stx_rdev_minor, 0, 0]);
        reply.put(&[0; 14 * 8]);
        Ok(())
    }

    pub(super) fn set_attributes(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let changes = Changes::read(body)?;
        let inode = self.inodes.get(request.node)?;
        // Before the mode, because a change of the owner clears the set-id bits.
        if changes.has(valid::UID | valid::GID) {
            if changes.uid == u32::MAX || changes.gid == u32::MAX {
                return Err(Errno::INVAL);
            }
            let uid = changes.has(valid::UID).then(|| Uid::from_raw(changes.uid));
            let gid = changes.has(valid::GID).then(|| Gid::from_raw(changes.gid));
            chownat(&inode, "", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if changes.has(valid::MODE) {
            let mode = permissions(changes.mode);
            chmodat(&self.proc_self_fd, link_name(&inode), mode, AtFlags::empty())?;
        }
        if changes.has(valid::SIZE) {
            self.resize(&inode, &changes)?;
        }
        if changes.has(valid::ATIME | valid::ATIME_NOW | valid::MTIME | valid::MTIME_NOW) {
            let times =
                Timestamps { last_access: changes.accessed, last_modification: changes.modified };
            utimensat(&self.proc_self_fd, link_name(&inode), &times, AtFlags::empty())?;
        }
        self.get_attributes(request, reply)
    }

    fn resize(&self, inode: &Inode, changes: &Changes) -> Result<(), Errno> {
        if inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        let strip = changes.has(valid::KILL_SUIDGID);
        if changes.has(valid::HANDLE) {
            let handle = self.handles.get(changes.handle, inode.node)?;
            stripping_set_id(strip, || ftruncate(&handle, changes.size))
        } else {
            let file = self.reopen(inode, OFlags::WRONLY | OFlags::NONBLOCK)?;
            stripping_set_id(strip, || ftruncate(&file, changes.size))
        }
    }

    /// Writes `struct fuse_attr`.
    pub(super) fn put_attributes(&self, inode: &Inode, stat: &Statx, reply: &mut Reply<'_>) {
        reply.put_u64s([self.number(inode.place, stat), stat.stx_size, stat.stx_blocks]);
        let (atime, mtime, ctime) = (stat.stx_atime, stat.stx_mtime, stat.stx_ctime);
        reply.put_u64s([atime.tv_sec, mtime.tv_sec, ctime.tv_sec].map(i64::cast_unsigned));
        reply.put_u32s([atime.tv_nsec, mtime.tv_nsec, ctime.tv_nsec]);
        reply.put_u32s([stat.stx_mode.into(), stat.stx_nlink, stat.stx_uid, stat.stx_gid]);
        let device = encode_device(stat.stx_rdev_major, stat.stx_rdev_minor);
        let submount = self.is_submount(inode.place) && is_mounted(stat) && is_directory(stat);
        let flags = if submount { SUBMOUNT } else { 0 };
        reply.put_u32s([device, stat.stx_blksize, flags]);
    }

    pub(super) fn stat_file_system(
        &self,
        request: &Request,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let stat = fstatfs(self.inodes.get(request.node)?)?;
        reply.put_u64s([stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree]);
        let narrow = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        reply.put_u32s([narrow(stat.f_bsize), narrow(stat.f_namelen), narrow(stat.f_frsize), 0]);
        reply.put(&[0; 24]);
        Ok(())
    }
}

/// Writes how long the attributes that follow are valid, and padding.
fn put_valid(inode: &Inode, reply: &mut Reply<'_>) {
    let valid = inode.valid();
    reply.put_u64s([valid.as_secs()]);
    reply.put_u32s([valid.subsec_nanos(), 0]);
}

/// The kernel's 32-bit form of a device number.
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}
