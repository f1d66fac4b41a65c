//! Requests about extended attributes, `xattr(7)`.
//!
//! The host allows `trusted.*` only to CAP_SYS_ADMIN, which the server does not have; the guest's
//! kernel allows it to the guest's. overlayfs keeps its marks there. So these attributes have
//! another name on the host, which the guest cannot use itself: a process without privileges may
//! set any `user.*`, but not overlayfs's marks.

use std::ffi::{CStr, CString};

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use super::{Share, link_name};
use crate::fileserver::caller::stripping_set_id;
use crate::fileserver::wire::{Body, Reply, Request};

/// `FUSE_SETXATTR_ACL_KILL_SGID`.
const ACL_KILL_SGID: u32 = 1;
/// The longest value of an attribute, and the longest list of names.
const XATTR_MAX: usize = 64 << 10;
/// What the names of trusted attributes begin with in the guest.
const TRUSTED: &[u8] = b"trusted.";
/// What stands before them on the host.
const PREFIX: &[u8] = b"user.bulkhead.";

// The paths are relative to the thread's working directory, which is `/proc/self/fd`.
impl Share {
    pub(super) fn set_xattr(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let (size, flags, extended, _padding) =
            (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let (name, value) = (on_host(body.string()?)?, body.bytes(size)?);
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let inode = self.inodes.get(request.node)?;
        stripping_set_id(extended & ACL_KILL_SGID != 0, || {
            setxattr(link_name(&inode), &name, value, flags)
        })
    }

    pub(super) fn get_xattr(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (size, _padding, name) = (body.u32()?, body.u32()?, on_host(body.string()?)?);
        let inode = self.inodes.get(request.node)?;
        if size == 0 {
            return put_len(getxattr_query(link_name(&inode), &name)?, reply);
        }
        let room = reply.room(XATTR_MAX.min(size as usize));
        let len = getxattr(link_name(&inode), &name, room)?;
        reply.filled(len);
        Ok(())
    }

    pub(super) fn list_xattrs(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (size, _padding) = (body.u32()? as usize, body.u32()?);
        let inode = self.inodes.get(request.node)?;
        let mut names = vec![0; XATTR_MAX];
        let len = listxattr(link_name(&inode), names.as_mut_slice())?;
        names.truncate(len);
        let names = in_guest(&names);
        if size == 0 {
            return put_len(names.len(), reply);
        }
        if size < names.len() {
            return Err(Errno::RANGE);
        }
        reply.put(&names);
        Ok(())
    }

    pub(super) fn remove_xattr(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let inode = self.inodes.get(request.node)?;
        removexattr(link_name(&inode), &on_host(body.string()?)?)
    }
}

/// The host's name of an attribute of the guest.
fn on_host(name: &CStr) -> Result<CString, Errno> {
    let bytes = name.to_bytes();
    if bytes.starts_with(PREFIX) {
        return Err(Errno::PERM);
    }
    let prefix = if bytes.starts_with(TRUSTED) { PREFIX } else { b"" };
    CString::new([prefix, bytes].concat()).map_err(|_| Errno::INVAL)
}

/// The guest's names in a list of the host, each of which ends in NUL.
fn in_guest(names: &[u8]) -> Vec<u8> {
    let each = names.split_inclusive(|byte| *byte == 0);
    each.flat_map(|name| name.strip_prefix(PREFIX).unwrap_or(name)).copied().collect()
}

/// Writes `struct fuse_getxattr_out`: how long a value is.
fn put_len(len: usize, reply: &mut Reply<'_>) -> Result<(), Errno> {
    reply.put_u32s([u32::try_from(len).map_err(|_| Errno::OVERFLOW)?, 0]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_attributes_have_another_name_on_the_host() {
        assert_eq!(on_host(c"user.a").unwrap().as_c_str(), c"user.a");
        let name = on_host(c"trusted.overlay.opaque").unwrap();
        assert_eq!(name.as_c_str(), c"user.bulkhead.trusted.overlay.opaque");
        assert_eq!(in_guest(b"user.a\0user.bulkhead.trusted.b\0"), b"user.a\0trusted.b\0");
    }

    #[test]
    fn the_guest_cannot_use_that_name() {
        assert_eq!(on_host(c"user.bulkhead.trusted.overlay.opaque"), Err(Errno::PERM));
    }
}
