//! Requests about names in a directory: look up, create, remove, rename.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, linkat, mkdirat, mknodat, openat, readlinkat,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::{Share, caller, link_name};
use crate::fileserver::inodes::Inode;
use crate::fileserver::sockets::kind as socket_kind;
use crate::fileserver::wire::{Body, Reply, Request};

impl Share {
    pub(super) fn lookup(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let directory = self.inodes.get(request.node)?;
        let name = body.name()?;
        let path = open_name(&directory, name).map_err(|error| match error {
            // The host is out of descriptors; the server itself has some set aside. The guest's
            // kernel takes any error other than ENOMEM to mean that the name is gone, and detaches
            // what is mounted there.
            Errno::NFILE | Errno::MFILE => Errno::NOMEM,
            other => other,
        })?;
        self.put_entry((&directory, name), path, None, reply)?;
        Ok(())
    }

    pub(super) fn mkdir(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (mode, umask, name) = (body.u32()?, body.u32()?, body.name()?);
        let directory = self.inodes.get(request.node)?;
        let slot = self.slots.take()?;
        caller(request, umask).run(|| mkdirat(&directory, name, permissions(mode)))?;
        self.put_entry((&directory, name), open_name(&directory, name)?, Some(slot), reply)?;
        Ok(())
    }

    pub(super) fn mknod(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (mode, device, umask, _padding) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let name = body.name()?;
        let directory = self.inodes.get(request.node)?;
        let kind = FileType::from_raw_mode(mode);
        if kind == FileType::Socket
            && self.sockets.has_other_end(directory.place)
            && let Some(bound) = socket_kind(device)
        {
            return self.bind((&directory, name), (request, umask), (mode, bound), reply);
        }
        let create = || mknodat(&directory, name, kind, permissions(mode), decode_device(device));
        let slot = self.slots.take()?;
        caller(request, umask).run(create)?;
        self.put_entry((&directory, name), open_name(&directory, name)?, Some(slot), reply)?;
        Ok(())
    }

    pub(super) fn symlink(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (name, target) = (body.name()?, body.string()?);
        let directory = self.inodes.get(request.node)?;
        let slot = self.slots.take()?;
        caller(request, 0).run(|| symlinkat(target, &directory, name))?;
        self.put_entry((&directory, name), open_name(&directory, name)?, Some(slot), reply)?;
        Ok(())
    }

    pub(super) fn read_link(&self, request: &Request, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let inode = self.inodes.get(request.node)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        reply.put(readlinkat(&inode, "", Vec::new())?.as_bytes());
        Ok(())
    }

    pub(super) fn link(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (node, name) = (body.u64()?, body.name()?);
        let inode = self.inodes.get(node)?;
        let directory = self.inodes.get(request.node)?;
        // Without AT_EMPTY_PATH, which requires CAP_DAC_READ_SEARCH.
        let (from, follow) = (&self.proc_self_fd, AtFlags::SYMLINK_FOLLOW);
        let link = || linkat(from, link_name(&inode), &directory, name, follow);
        caller(request, 0).run(link)?;
        self.put_entry((&directory, name), open_name(&directory, name)?, None, reply)?;
        Ok(())
    }

    pub(super) fn unlink(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        unlinkat(self.inodes.get(request.node)?, body.name()?, AtFlags::empty())
    }

    pub(super) fn rmdir(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        unlinkat(self.inodes.get(request.node)?, body.name()?, AtFlags::REMOVEDIR)
    }

    pub(super) fn rename(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let directory = body.u64()?;
        self.rename_with(request, directory, RenameFlags::empty(), body)
    }

    pub(super) fn rename2(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let (directory, flags, _padding) = (body.u64()?, body.u32()?, body.u32()?);
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        self.rename_with(request, directory, flags, body)
    }

    fn rename_with(
        &self,
        request: &Request,
        directory: u64,
        flags: RenameFlags,
        body: &mut Body<'_>,
    ) -> Result<(), Errno> {
        let (from, to) = (self.inodes.get(request.node)?, self.inodes.get(directory)?);
        let (old, new) = (body.name()?, body.name()?);
        caller(request, 0).run(|| renameat_with(&from, old, &to, new, flags))
    }
}

/// Opens a name with `O_PATH`: neither opens the file nor follows a link.
pub(super) fn open_name(directory: &Inode, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

/// The permission bits of a mode, with set-id and sticky bits.
pub(super) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

/// FUSE carries device numbers in the kernel's 32-bit form.
fn decode_device(device: u32) -> u64 {
    let major = (device >> 8) & 0xfff;
    let minor = (device & 0xff) | ((device >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_their_32_bit_form() {
        for (major, minor) in [(1, 3), (8, 17), (259, 70_000), (4095, 1_048_575)] {
            let encoded = super::super::attributes::encode_device(major, minor);
            assert_eq!(decode_device(encoded), rustix::fs::makedev(major, minor));
        }
    }
}
