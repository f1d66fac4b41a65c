//! The storage behind a block device.
//!
//! This module knows nothing of virtio: offsets and lengths are bytes, and the caller has checked
//! them against [`Disk::size`]. A disk does not grow.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, FileType, SeekFrom, fallocate, fdatasync, fstat, seek};
use rustix::io::{Errno, pwrite};
use vm_memory::VolatileSlice;

use super::super::vectored;

/// Zeroes written at once if the file system cannot make them itself.
const ZERO_BYTES: usize = 128 << 10;

/// The sectors of a disk.
pub(crate) trait Disk: Send + 'static {
    /// Bytes in all.
    fn size(&self) -> u64;

    /// Reads into `room` from `offset`; may read less than `room` holds.
    fn read_at(&self, room: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Writes `data` at `offset`; may write less than all of it.
    fn write_at(&self, data: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Makes what was written durable.
    fn flush(&self) -> io::Result<()>;

    /// Gives space back if that is possible; what the range reads as afterwards is undefined.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range read as zeroes; with `unmap` its space may be given back.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// A regular file or a block device of the host, byte for byte.
#[derive(Debug)]
pub(crate) struct RawDisk {
    file: File,
    size: u64,
}

impl RawDisk {
    /// Takes over a file; the disk keeps the size that the file has now.
    ///
    /// # Errors
    /// When it is neither a regular file nor a block device.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            let what = format!("disk is a {kind:?}, not a file or block device");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        // Seeking finds the size of a block device as well, for which `st_size` is 0.
        let size = seek(&file, SeekFrom::End(0))?;
        Ok(Self { file, size })
    }

    /// Tries to change the file's allocation; `false` when its file system cannot.
    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        match fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, room: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        vectored::read_at(&self.file, room, signed(offset)?)
    }

    fn write_at(&self, data: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        vectored::write_at(&self.file, data, signed(offset)?)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // A file system that cannot do this is no error: a discard promises nothing.
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len).map(drop)
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)? {
            return Ok(());
        }
        if self.allocate(FallocateFlags::ZERO_RANGE, offset, len)? {
            return Ok(());
        }
        write_zeroes(&self.file, offset, len)
    }
}

fn write_zeroes(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let zeroes = vec![0; ZERO_BYTES];
    let mut done = 0;
    while done < len {
        let now = usize::try_from(len - done).map_or(ZERO_BYTES, |left| left.min(ZERO_BYTES));
        match pwrite(&file, zeroes.get(..now).unwrap_or_default(), offset + done) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count as u64,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// File offsets are signed; larger ones do not exist.
fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}
