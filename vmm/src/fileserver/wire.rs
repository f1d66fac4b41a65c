//! FUSE messages as bytes, `linux/fuse.h`: headers, fields, the bounds of a packet.
//!
//! One packet on the relay socket is one message. The relay device and the file server both check
//! the headers, and neither believes the other's. All fields are little-endian, as on every machine
//! that this runs on.

use std::ffi::CStr;

use rustix::io::Errno;

/// The most file data in one message, in bytes.
pub(crate) const DATA_MAX: u32 = 256 << 10;
/// The longest message: data, and what stands before it.
pub(crate) const PACKET_MAX: usize = DATA_MAX as usize + 4096;
/// Length of the header of a request.
pub(crate) const IN_HEADER: usize = 40;
/// Length of the header of a reply.
pub(crate) const OUT_HEADER: usize = 16;
/// Where in an INTERRUPT request the number of the interrupted one stands.
pub(crate) const INTERRUPT_UNIQUE: usize = IN_HEADER;

/// What a request asks for, `enum fuse_opcode`.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
    /// Our own: see [`crate::fileserver`]'s watches.
    pub(crate) const WATCH: u32 = 2048;
    pub(crate) const WATCH_EVENTS: u32 = 2049;
    /// Our own: see [`crate::fileserver`]'s FIFOs.
    pub(crate) const FIFO_POLL: u32 = 2064;
    pub(crate) const FIFO_EVENTS: u32 = 2065;
    /// Our own: see [`crate::fileserver`]'s sockets.
    pub(crate) const SOCKET_CONNECT: u32 = 2050;
    pub(crate) const SOCKET_LISTEN: u32 = 2051;
    pub(crate) const SOCKET_RELEASE: u32 = 2052;
}

/// How long the host may take for a request: the slowest first.
///
/// The file server has a fixed number of threads ([`THREADS_MIN`](super::config::THREADS_MIN) at
/// least). So the relay limits how many requests of a class and of the slower ones are in flight,
/// such that a thread is left for each quicker class, and holds the others back: an `fsync` that
/// takes seconds delays no read, and a dead disk no lookup elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// Waits for the disk, or moves any amount of data.
    Sync,
    /// Changes files or directories: may wait for memory, for a journal, for the disk.
    Write,
    /// Reads data, or closes: may wait for the disk.
    Read,
    /// Names, attributes and locks, mostly in the host's memory; requests without a reply.
    Look,
}

impl Class {
    /// The classes of which the relay holds back requests.
    pub(crate) const BOUNDED: [Self; 3] = [Self::Sync, Self::Write, Self::Read];

    /// How many requests of this class and the slower ones the file server is given at once.
    pub(crate) const fn at_once(self) -> u8 {
        match self {
            Self::Sync => 2,
            Self::Write => 4,
            Self::Read => 5,
            Self::Look => u8::MAX,
        }
    }
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Length of the whole message, with this header.
    pub(crate) len: u32,
    /// What is asked, [`opcode`].
    pub(crate) opcode: u32,
    /// Names the request in its reply.
    pub(crate) unique: u64,
    /// The inode that it is about.
    pub(crate) node: u64,
    /// User id of the caller.
    pub(crate) uid: u32,
    /// Group id of the caller.
    pub(crate) gid: u32,
}

impl Request {
    /// Reads the header of a message; `None` when it is shorter than one.
    pub(crate) fn parse(message: &[u8]) -> Option<Self> {
        let header = message.first_chunk::<IN_HEADER>()?;
        Some(Self {
            len: u32_at(header, 0)?,
            opcode: u32_at(header, 4)?,
            unique: u64_at(header, 8)?,
            node: u64_at(header, 16)?,
            uid: u32_at(header, 24)?,
            gid: u32_at(header, 28)?,
        })
    }

    /// How long the host may take for it.
    pub(crate) const fn class(&self) -> Class {
        match self.opcode {
            opcode::FSYNC | opcode::FSYNCDIR | opcode::FALLOCATE | opcode::COPY_FILE_RANGE => {
                Class::Sync
            }
            opcode::WRITE
            | opcode::SETATTR
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::TMPFILE
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::SYMLINK
            | opcode::LINK
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::IOCTL => Class::Write,
            opcode::READ | opcode::LSEEK | opcode::FLUSH | opcode::RELEASE | opcode::RELEASEDIR => {
                Class::Read
            }
            _ => Class::Look,
        }
    }

    /// Whether the guest's kernel expects an answer.
    pub(crate) const fn has_reply(&self) -> bool {
        !matches!(self.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT)
    }
}

/// The header of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReplyHeader {
    /// Length of the whole message, with this header.
    pub(crate) len: u32,
    /// 0 or a negative errno.
    pub(crate) error: i32,
    /// The number of the request.
    pub(crate) unique: u64,
}

impl ReplyHeader {
    /// The header of an error, which has no body.
    pub(crate) const fn failure(unique: u64, errno: Errno) -> Self {
        Self { len: 16, error: -errno.raw_os_error(), unique }
    }

    /// Reads the header of a message; `None` when it is shorter than one.
    pub(crate) fn parse(message: &[u8]) -> Option<Self> {
        let header = message.first_chunk::<OUT_HEADER>()?;
        let error = u32_at(header, 4)?.cast_signed();
        Some(Self { len: u32_at(header, 0)?, error, unique: u64_at(header, 8)? })
    }

    /// The header's bytes.
    pub(crate) fn bytes(&self) -> [u8; OUT_HEADER] {
        let mut bytes = [0; OUT_HEADER];
        bytes[..4].copy_from_slice(&self.len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.error.to_le_bytes());
        bytes[8..].copy_from_slice(&self.unique.to_le_bytes());
        bytes
    }
}

/// The body of a request, read front to back.
#[derive(Debug)]
pub(super) struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    /// The body of a message whose header was read already.
    pub(super) fn of(message: &'a [u8]) -> Self {
        Self(message.get(IN_HEADER..).unwrap_or_default())
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string that ends in NUL.
    pub(super) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(string.count_bytes() + 1..).unwrap_or_default();
        Ok(string)
    }

    /// The name of a directory entry: never a path that leads elsewhere.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }

    /// A field of a fixed length.
    pub(super) fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN], Errno> {
        let (field, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*field)
    }

    /// What is left, which must be `len` bytes at least.
    pub(super) fn bytes(&mut self, len: u32) -> Result<&'a [u8], Errno> {
        self.0.get(..len as usize).ok_or(Errno::INVAL)
    }
}

/// A reply that is being written.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    buffer: &'a mut [u8],
    len: usize,
}

impl<'a> Reply<'a> {
    /// An empty reply, in a buffer that has room for a header at least.
    pub(super) fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, len: OUT_HEADER }
    }

    /// Bytes of body so far.
    pub(super) fn body_len(&self) -> usize {
        self.len - OUT_HEADER
    }

    /// Drops all but the first `len` bytes of body.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(OUT_HEADER + len);
    }

    /// Up to `len` bytes to be filled; [`Reply::filled`] says how many were.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.buffer.len().min(self.len.saturating_add(len));
        &mut self.buffer[self.len..end]
    }

    /// Adds `len` bytes that were put into [`Reply::room`].
    pub(super) fn filled(&mut self, len: usize) {
        self.len = self.buffer.len().min(self.len + len);
    }

    /// Appends bytes. What does not fit into a packet is cut off, but no reply is that long.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let room = self.room(bytes.len());
        let len = room.len();
        debug_assert_eq!(len, bytes.len(), "replies are bounded by what was asked for");
        room.copy_from_slice(&bytes[..len]);
        self.filled(len);
    }

    pub(super) fn put_u32s<const N: usize>(&mut self, fields: [u32; N]) {
        for field in fields {
            self.put(&field.to_le_bytes());
        }
    }

    pub(super) fn put_u64s<const N: usize>(&mut self, fields: [u64; N]) {
        for field in fields {
            self.put(&field.to_le_bytes());
        }
    }

    /// The message, with its header; an error has no body.
    pub(super) fn message(&mut self, unique: u64, result: Result<(), Errno>) -> &[u8] {
        let header = match result {
            Ok(()) => {
                // A packet is far below 4 GiB.
                let len = u32::try_from(self.len).unwrap_or(u32::MAX);
                ReplyHeader { len, error: 0, unique }
            }
            Err(errno) => {
                self.len = OUT_HEADER;
                ReplyHeader::failure(unique, errno)
            }
        };
        self.buffer[..OUT_HEADER].copy_from_slice(&header.bytes());
        &self.buffer[..self.len]
    }
}

/// The field at `offset`; `None` past the end.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// The field at `offset`; `None` past the end.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// Overwrites the field at `offset`; nothing past the end.
pub(crate) fn put_u64(bytes: &mut [u8], offset: usize, value: u64) {
    if let Some(field) = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
        *field = value.to_le_bytes();
    }
}

#[cfg(test)]
mod tests;
