//! The flags of a file that `lsattr(1)` shows and `chattr(1)` sets, `ioctl_iflags(2)`, and those of
//! XFS, `ioctl_xfs_fsgetxattr(2)`. They and the length of what a FIFO holds are the only requests of
//! `ioctl(2)` that reach the host.
//!
//! The server has no CAP_LINUX_IMMUTABLE: a guest whose kernel is taken over must not leave files
//! that its host cannot remove.

// UNSAFETY: rustix has no wrapper for the requests with `struct fsxattr`.
#![expect(unsafe_code, reason = "ioctl(2)")]

use rustix::fs::{FileType, IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::{Errno, ioctl_fionread};
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

use super::Share;
use crate::fileserver::wire::{Body, Reply, Request};

/// The length of `struct fsxattr`.
const EXTENDED: usize = 28;
type Extended = [u8; EXTENDED];

/// The guest's requests. The first two name a `long` and pass an `int`.
const GET_FLAGS: Opcode = opcode::read::<libc::c_long>(b'f', 1);
const SET_FLAGS: Opcode = opcode::write::<libc::c_long>(b'f', 2);
const GET_EXTENDED: Opcode = opcode::read::<Extended>(b'X', 31);
const SET_EXTENDED: Opcode = opcode::write::<Extended>(b'X', 32);
/// `FIONREAD`, whose result is an `int`.
const FIFO_LENGTH: Opcode = 0x541b;

impl Share {
    /// IOCTL: `struct fuse_ioctl_in` and `fuse_ioctl_out`, each with the data behind it.
    pub(super) fn control(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (handle, _flags, command, _argument) =
            (body.u64()?, body.u32()?, body.u32()?, body.u64()?);
        let (_in_size, out_size) = (body.u32()?, body.u32()?);
        let file = self.handles.get(handle, request.node)?;
        // The result of the call and three fields for requests that are tried again.
        reply.put_u32s([0; 4]);
        match Opcode::from(command) {
            GET_FLAGS if out_size == 4 => reply.put_u32s([ioctl_getflags(&file)?.bits()]),
            SET_FLAGS => ioctl_setflags(&file, IFlags::from_bits_retain(body.u32()?))?,
            GET_EXTENDED if out_size as usize == EXTENDED => {
                // SAFETY: this is the request's number and what it writes, a `struct fsxattr`.
                let get = unsafe { Getter::<GET_EXTENDED, Extended>::new() };
                // SAFETY: any bytes are a value of that type.
                reply.put(&unsafe { ioctl(&file, get) }?);
            }
            SET_EXTENDED => {
                let flags: Extended = body.array()?;
                // SAFETY: this is the request's number and what it reads, a `struct fsxattr`.
                let set = unsafe { Setter::<SET_EXTENDED, Extended>::new(flags) };
                // SAFETY: the kernel checks every field.
                unsafe { ioctl(&file, set) }?;
            }
            FIFO_LENGTH if file.kind == FileType::Fifo && out_size == 4 => {
                let length = ioctl_fionread(&file)?;
                reply.put_u32s([u32::try_from(length).unwrap_or(u32::MAX)]);
            }
            _ => return Err(Errno::NOTTY),
        }
        Ok(())
    }
}
