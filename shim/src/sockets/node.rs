//! One socket or FIFO of the host, as it was when the container was created. As under runc, a
//! container keeps this one when another takes its name.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::HostSocket;
use bulkhead_protocol::agent::host_socket::Kind;
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair,
};
use thiserror::Error;

use super::user::User;
use super::widen;
use crate::bundle::Shared;
use crate::machine::share::{self, ShareError};

/// How long a server may take to make room for a connection. The agent waits longer for the stream.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a socket or FIFO of the host cannot be used.
#[derive(Debug, Error)]
pub enum NodeError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] ShareError),
    /// It cannot be examined.
    #[error("cannot find out what kind of socket {} is", .0.display())]
    Look(PathBuf, #[source] io::Error),
}

/// A socket or FIFO.
#[derive(Debug)]
pub struct Node {
    pub(super) kind: Kind,
    /// A detached mount of it alone. It gives no access by itself.
    file: Arc<OwnedFd>,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Node {
    /// Finds out what the source of a mount is.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn find(entry: &Shared) -> Result<Self, NodeError> {
        let failed = |error: io::Error| NodeError::Look(entry.source.clone(), error);
        let file = share::alone_as(entry)?;
        let stat = fstat(&file).map_err(|error| failed(error.into()))?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => Kind::Fifo,
            _ => kind(&file).map_err(failed)?,
        };
        let (mode, uid, gid) = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
        Ok(Self { kind, file: Arc::new(file), mode, uid, gid })
    }

    pub(super) fn describe(&self) -> HostSocket {
        let Self { kind, mode, uid, gid, .. } = *self;
        HostSocket { kind: kind.into(), mode, uid, gid }
    }

    /// Connects to it as a user.
    pub(super) async fn connect(&self, user: User) -> io::Result<OwnedFd> {
        let kind = match self.kind {
            Kind::Stream => SocketType::STREAM,
            Kind::Seqpacket => SocketType::SEQPACKET,
            Kind::Datagram => SocketType::DGRAM,
            Kind::Fifo | Kind::Abandoned => return Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        widen(&socket);
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
        self.run(user, move |path| {
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        })
        .await
    }

    /// Does something with a path that leads to it, whatever has its name now, as a user.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        user: User,
        work: impl FnOnce(&str) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        // The path is that of a descriptor, which has to stay open.
        let file = self.file.clone();
        user.run(move || work(&path(&file))).await
    }

    /// Whether nobody can be reached at it, now and for ever: Linux binds no second socket to it.
    pub(super) fn is_abandoned(&self) -> bool {
        kind(&self.file).is_ok_and(|kind| kind == Kind::Abandoned)
    }
}

fn path(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// A socket whose calls do not wait.
fn open(kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, kind, flags, None)?)
}

/// The kind of a socket, by connections that its server does not see: connecting two sockets for
/// datagrams only changes the one, and a socket that is connected already is refused, but only after
/// Linux has compared the kinds (unix(7), `EPROTOTYPE`).
fn kind(file: &OwnedFd) -> io::Result<Kind> {
    let address = SocketAddrUnix::new(path(file))?;
    match connect(&open(SocketType::DGRAM)?, &address) {
        // Not permitted: it is connected to somebody else, and only takes datagrams from there.
        Ok(()) | Err(Errno::PERM) => return Ok(Kind::Datagram),
        Err(Errno::CONNREFUSED) => return Ok(Kind::Abandoned),
        Err(Errno::PROTOTYPE) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (connected, _other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    match connect(&connected, &address) {
        Err(Errno::PROTOTYPE) => Ok(Kind::Stream),
        _ => Ok(Kind::Seqpacket),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use rustix::fs::{Mode, OFlags};
    use rustix::net::{bind, listen};

    use super::*;

    fn kind_of(path: &std::path::Path) -> Kind {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        kind(&rustix::fs::open(path, flags, Mode::empty()).unwrap()).unwrap()
    }

    #[test]
    fn the_kind_of_a_socket_is_found_and_its_server_sees_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let stream = UnixListener::bind(path("stream")).unwrap();
        stream.set_nonblocking(true).unwrap();
        let datagrams = UnixDatagram::bind(path("datagrams")).unwrap();
        datagrams.set_nonblocking(true).unwrap();
        let packets = open(SocketType::SEQPACKET).unwrap();
        bind(&packets, &SocketAddrUnix::new(path("packets")).unwrap()).unwrap();
        // Nobody listens yet.
        assert_eq!(kind_of(&path("packets")), Kind::Seqpacket);
        listen(&packets, 1).unwrap();
        for (name, kind) in
            [("stream", Kind::Stream), ("packets", Kind::Seqpacket), ("datagrams", Kind::Datagram)]
        {
            assert_eq!(kind_of(&path(name)), kind);
        }
        assert_eq!(stream.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(datagrams.recv(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(rustix::net::accept(&packets).unwrap_err(), Errno::AGAIN);
        drop(stream);
        assert_eq!(kind_of(&path("stream")), Kind::Abandoned);
    }
}
