//! Unix sockets whose names are in a directory of the host, `unix(7)`.
//!
//! For each that the guest binds, a socket is bound here in the same place, so that a process of the
//! host, or of another guest, finds somebody at the other end. The supervisor accepts its
//! connections, and takes datagrams. Where the guest connects to a name that it has not bound
//! itself, the supervisor connects to it. No byte that is sent over these connections comes here.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::Statx;
use rustix::io::Errno;
use rustix::net::{Shutdown, listen, shutdown};

use super::caller::Caller;
use super::config::{FsReport, Listening, SocketKind};
use super::inodes::device;
use super::places::Place;
use super::slots::Kept;
use crate::devices::rate_limit::guest_warn;
use crate::seqpacket;

/// How many sockets the guest may have bound at once.
const BOUND_MAX: usize = 1024;

/// The sockets that the guest has bound.
#[derive(Debug)]
pub(super) struct Sockets {
    /// To the supervisor; `None` where sockets are only names.
    control: Option<Arc<OwnedFd>>,
    bound: Mutex<HashMap<u64, Bound>>,
}

/// A file, through whichever mount it is seen.
type File = (u64, u64);

/// A socket of the host that is bound as one of the guest is. It is shut down when this is dropped:
/// the supervisor has it as well, and learns it by that.
#[derive(Debug)]
struct Bound {
    socket: Kept,
    kind: SocketKind,
    file: File,
    reported: bool,
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Cannot fail: it is a Unix socket.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

impl Sockets {
    pub(super) fn new(control: Option<Arc<OwnedFd>>) -> Self {
        Self { control, bound: Mutex::default() }
    }

    /// Whether somebody outside of the guest may be at the other end of a socket in this place.
    pub(super) fn has_other_end(&self, place: Place) -> bool {
        self.control.is_some() && place == Place::Shared
    }

    /// Whether the guest may bind one more socket.
    pub(super) fn has_room(&self) -> bool {
        let room = self.bound().len() < BOUND_MAX;
        if !room {
            guest_warn!("the guest has bound {BOUND_MAX} sockets in shared directories");
        }
        room
    }

    /// Keeps a socket that was bound for that of a node. One for datagrams takes them from now on.
    pub(super) fn keep(
        &self,
        node: u64,
        socket: Kept,
        kind: SocketKind,
        attributes: &Statx,
    ) -> Result<(), Errno> {
        let mut bound = Bound { socket, kind, file: file(attributes), reported: false };
        if kind == SocketKind::Datagram {
            self.report_bound(node, &mut bound)?;
        }
        self.bound().insert(node, bound);
        Ok(())
    }

    /// The guest's own node of the socket that it has bound to a file.
    pub(super) fn find(&self, attributes: &Statx) -> Option<u64> {
        let file = file(attributes);
        self.bound().iter().find(|(_, bound)| bound.file == file).map(|(node, _)| *node)
    }

    /// Lets the socket of a node listen, as a user: that is whom clients see as the server.
    pub(super) fn listen(&self, node: u64, backlog: i32, caller: Caller) -> Result<(), Errno> {
        let mut sockets = self.bound();
        let Some(bound) = sockets.get_mut(&node) else { return Ok(()) };
        caller.run(|| listen(&bound.socket, backlog))?;
        self.report_bound(node, bound)
    }

    fn report_bound(&self, node: u64, bound: &mut Bound) -> Result<(), Errno> {
        if !bound.reported {
            let report = FsReport::Listen(Listening { node, kind: bound.kind });
            self.report(&report, bound.socket.as_fd())?;
            bound.reported = true;
        }
        Ok(())
    }

    /// The guest has closed the socket of a node.
    pub(super) fn release(&self, node: u64) {
        let closed = self.bound().remove(&node);
        drop(closed);
    }

    /// The guest has gone.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.bound());
        drop(all);
    }

    /// Tells the supervisor.
    pub(super) fn report(
        &self,
        report: &FsReport,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(), Errno> {
        let control = self.control.as_ref().ok_or(Errno::CONNREFUSED)?;
        let json = serde_json::to_vec(report).map_err(|_| Errno::IO)?;
        seqpacket::send(control, &json, &[descriptor])
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    fn bound(&self) -> MutexGuard<'_, HashMap<u64, Bound>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kind of a socket with this type of `socket(2)`.
pub(super) fn kind(number: u32) -> Option<SocketKind> {
    let all = [SocketKind::Stream, SocketKind::Seqpacket, SocketKind::Datagram];
    all.into_iter().find(|kind| kind.socket_type().as_raw() == number)
}

fn file(attributes: &Statx) -> File {
    (device(attributes), attributes.stx_ino)
}

#[cfg(test)]
mod tests {
    use rustix::net::SocketType;

    use super::*;

    #[test]
    fn the_types_of_unix_sockets_have_a_kind() {
        let typed = |number| kind(number).map(|kind| (kind, kind.socket_type()));
        assert_eq!(typed(1), Some((SocketKind::Stream, SocketType::STREAM)));
        assert_eq!(typed(5), Some((SocketKind::Seqpacket, SocketType::SEQPACKET)));
        assert_eq!(typed(2), Some((SocketKind::Datagram, SocketType::DGRAM)));
        for other in [0, 3, u32::MAX] {
            assert_eq!(kind(other), None);
        }
    }

    #[test]
    fn a_socket_has_another_end_only_in_a_directory_of_the_host() {
        let (control, _) = seqpacket::pair().unwrap();
        let sockets = Sockets::new(Some(Arc::new(control)));
        assert!(sockets.has_other_end(Place::Shared));
        for place in [Place::Root, Place::MountPoints, Place::Own, Place::Alone] {
            assert!(!sockets.has_other_end(place), "{place:?}");
        }
        assert!(!Sockets::new(None).has_other_end(Place::Shared));
    }
}
