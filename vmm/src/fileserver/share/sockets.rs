//! Requests about sockets that others may have bound, or connect to.

use std::ffi::CStr;
use std::os::fd::AsFd as _;

use rustix::fs::{FileType, fchmod};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, bind, socket_with};
use rustix::process::fchdir;

use super::names::{open_name, permissions};
use super::{Outcome, Share, caller};
use crate::fileserver::config::{ConnectWanted, FsReport, GROUPS_MAX, SocketKind};
use crate::fileserver::inodes::Inode;
use crate::fileserver::sockets::kind;
use crate::fileserver::wire::{Body, Reply, Request};

impl Share {
    /// MKNOD of a socket that the guest binds, with its type.
    pub(super) fn bind(
        &self,
        (directory, name): (&Inode, &CStr),
        (request, umask): (&Request, u32),
        (mode, kind): (u32, SocketKind),
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        if !self.sockets.has_room() {
            return Err(Errno::NOSPC);
        }
        let (slot, file_slot) = (self.slots.take()?, self.slots.take()?);
        let socket =
            socket_with(AddressFamily::UNIX, kind.socket_type(), SocketFlags::CLOEXEC, None)?;
        // Before anybody can send.
        set_socket_passcred(&socket, kind == SocketKind::Datagram)?;
        // What the file will have, as the umask allows.
        fchmod(&socket, permissions(mode))?;
        let address = SocketAddrUnix::new(name)?;
        // An address is a path of 107 bytes at most: only the name, from the directory.
        fchdir(directory)?;
        let bound = caller(request, umask).run(|| bind(&socket, &address));
        fchdir(&self.proc_self_fd)?;
        // FUSE knows the error of a name that exists by the name that mknod(2) has for it.
        bound.map_err(|error| if error == Errno::ADDRINUSE { Errno::EXIST } else { error })?;
        let path = open_name(directory, name)?;
        let inode = self.put_entry((directory, name), path, Some(file_slot), reply)?;
        self.sockets.keep(inode.node, slot.keep(socket), kind, &inode.stat()?)
    }

    /// Lets a socket listen that the guest has bound.
    pub(super) fn listen(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let backlog = i32::try_from(body.u32()?).unwrap_or(i32::MAX);
        self.sockets.listen(request.node, backlog, caller(request, 0))
    }

    /// Connects to a socket: finds the guest's own, or asks the supervisor.
    pub(super) fn connect(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        match self.begin_to_connect(request, body) {
            Ok(Some(node)) => {
                reply.put_u64s([node]);
                Outcome::Done(Ok(()))
            }
            Ok(None) => Outcome::Later,
            Err(error) => Outcome::Done(Err(error)),
        }
    }

    fn begin_to_connect(
        &self,
        request: &Request,
        body: &mut Body<'_>,
    ) -> Result<Option<u64>, Errno> {
        let (token, type_, count) = (body.array()?, body.u32()?, body.u32()? as usize);
        let inode = self.inodes.get(request.node)?;
        if inode.kind != FileType::Socket || !self.sockets.has_other_end(inode.place) {
            return Err(Errno::CONNREFUSED);
        }
        if let Some(node) = self.sockets.find(&inode.stat()?) {
            return Ok(Some(node));
        }
        if count > GROUPS_MAX {
            return Err(Errno::INVAL);
        }
        let groups = (0..count).map(|_| body.u32()).collect::<Result<_, _>>()?;
        let kind = kind(type_).ok_or(Errno::PROTOTYPE)?;
        let Request { uid, gid, unique, .. } = *request;
        let wanted = ConnectWanted { request: unique, token, kind, uid, gid, groups };
        self.sockets.report(&FsReport::Connect(wanted), inode.as_fd())?;
        Ok(None)
    }
}
