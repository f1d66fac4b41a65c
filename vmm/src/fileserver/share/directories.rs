//! Requests about whole directories, `getdents64(2)`.
//!
//! A position is the host's own cookie, so a listing survives changes as it does on the host. For a
//! mount point, `readdir` returns the inode number of the directory below the mount, as on the
//! host.

use std::mem::MaybeUninit;

use rustix::fs::{FileType, OFlags, RawDir, RawDirEntry, SeekFrom, seek};
use rustix::io::Errno;

use super::Share;
use super::names::open_name;
use crate::fileserver::inodes::{Inode, device};
use crate::fileserver::wire::{Body, Reply, Request};

/// The least and the most that is read of a directory at once, in bytes; the longest entry fits
/// into the least.
const CHUNK_MIN: usize = 512;
const CHUNK_MAX: usize = 16 << 10;
/// Length of `struct fuse_entry_out`.
const ENTRY: usize = 128;
/// Length of `struct fuse_dirent` before the name.
const ENTRY_HEADER: usize = 24;

impl Share {
    pub(super) fn open_directory(
        &self,
        request: &Request,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let inode = self.inodes.get(request.node)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let slot = self.slots.take()?;
        let file = self.reopen(&inode, OFlags::RDONLY | OFlags::DIRECTORY)?;
        reply.put_u64s([self.handles.insert(request.node, FileType::Directory, slot.keep(file))]);
        reply.put_u32s([0, 0]);
        Ok(())
    }

    pub(super) fn read_directory(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let directory = self.inodes.get(request.node)?;
        let device = device(&directory.stat()?);
        self.list(request, body, reply, |entry, reply| {
            let number = self.number_of(directory.place, device, entry.ino());
            put_entry(entry, number, reply);
        })
    }

    /// READDIRPLUS: every entry is looked up as well, which counts as a lookup. Where the guest may
    /// not believe what it is told, it would have to look it up again.
    pub(super) fn read_directory_plus(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let directory = self.inodes.get(request.node)?;
        let device = device(&directory.stat()?);
        self.list(request, body, reply, |entry, reply| {
            let start = reply.body_len();
            let number = self.put_lookup(&directory, entry, reply).unwrap_or_else(|_| {
                // Node 0 says that the entry was not looked up.
                reply.truncate(start);
                reply.put(&[0; ENTRY]);
                self.number_of(directory.place, device, entry.ino())
            });
            put_entry(entry, number, reply);
        })
    }

    /// Looks an entry up; returns its inode number.
    fn put_lookup(
        &self,
        directory: &Inode,
        entry: &RawDirEntry<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<u64, Errno> {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") || directory.place.valid(false).is_zero() {
            return Err(Errno::INVAL);
        }
        let path = open_name(directory, name)?;
        let (inode, attributes) = self.inodes.remember((directory, name), path, None)?;
        self.put_known_entry(&inode, &attributes, reply);
        Ok(self.number(inode.place, &attributes))
    }

    /// Lists entries from the position asked for, until the size asked for is used up.
    fn list(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
        mut put: impl FnMut(&RawDirEntry<'_>, &mut Reply<'_>),
    ) -> Result<(), Errno> {
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
        let handle = self.handles.get(handle, request.node)?;
        // All readers of this handle share the host's position.
        let _position = handle.position.lock().map_err(|_| Errno::IO)?;
        seek(&handle, SeekFrom::Start(offset))?;
        let plus = request.opcode == crate::fileserver::wire::opcode::READDIRPLUS;
        let before_name = if plus { ENTRY + ENTRY_HEADER } else { ENTRY_HEADER };
        let size = size.min(reply.room(size).len());
        // About as much as fits into the reply: entries that do not fit are read again.
        let share = if plus { size / 4 } else { size };
        let mut chunk = vec![MaybeUninit::uninit(); share.clamp(CHUNK_MIN, CHUNK_MAX)];
        let mut entries = RawDir::new(&handle, &mut chunk);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if reply.body_len() == 0 => return Err(error),
                // Returns what was listed so far; the next request gets the error again.
                Err(_) => break,
            };
            let len = before_name + entry.file_name().count_bytes().next_multiple_of(8);
            if reply.body_len() + len > size {
                break;
            }
            put(&entry, reply);
        }
        Ok(())
    }
}

/// Writes `struct fuse_dirent`.
fn put_entry(entry: &RawDirEntry<'_>, number: u64, reply: &mut Reply<'_>) {
    let name = entry.file_name().to_bytes();
    reply.put_u64s([number, entry.next_entry_cookie()]);
    // The kernel's names are far below 4 GiB.
    let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
    reply.put_u32s([len, kind(entry.file_type())]);
    reply.put(name);
    let padding = name.len().next_multiple_of(8) - name.len();
    reply.put(&[0; 8][..padding]);
}

/// `DT_*`: the file type bits of a mode, shifted.
fn kind(kind: FileType) -> u32 {
    match kind {
        FileType::Unknown => 0,
        known => known.as_raw_mode() >> 12,
    }
}
