//! Datagrams of a container to a socket of the host. Each is sent with the user that its sender has
//! inside.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::unix::net::UnixDatagram as StdDatagram;

use bulkhead_relay::{FRAME_MAX, parse_datagram, read_frame, send_now};
use tokio::io::Interest;
use tokio::net::{UnixDatagram, UnixStream};

use super::node::Node;
use super::user::{User, Users};

/// The most users whose sockets are kept for their next datagram.
const SENDERS_MAX: usize = 16;

/// Sends what comes until the guest ends the stream.
///
/// # Errors
/// The guest breaks the rules, or nobody receives any more.
pub(super) async fn pass_on(node: &Node, users: &Users, stream: &UnixStream) -> io::Result<()> {
    let mut senders: HashMap<(u32, u32), UnixDatagram> = HashMap::new();
    while let Some(frame) = read_frame(stream, FRAME_MAX).await? {
        let (User { uid, gid, .. }, datagram) =
            parse_datagram(&frame).ok_or(io::ErrorKind::InvalidData)?;
        let Ok(user) = users.find(uid, gid, &[]) else {
            tracing::debug!(uid, gid, "a datagram of a user that the container lacks was dropped");
            continue;
        };
        if senders.len() >= SENDERS_MAX && !senders.contains_key(&(uid, gid)) {
            senders.clear();
        }
        let sender = match senders.entry((uid, gid)) {
            Entry::Occupied(sender) => sender.into_mut(),
            Entry::Vacant(place) => match node.connect(user.clone()).await {
                Ok(socket) => {
                    let socket = StdDatagram::from(socket);
                    socket.set_nonblocking(true)?;
                    place.insert(UnixDatagram::from_std(socket)?)
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
                Err(error) => return Err(error),
            },
        };
        send(sender, user, datagram).await?;
    }
    Ok(())
}

/// Sends one datagram.
async fn send(socket: &UnixDatagram, sender: User, datagram: &[u8]) -> io::Result<()> {
    let sender = Some(sender.credentials());
    socket.async_io(Interest::WRITABLE, || send_now(sender, socket, datagram)).await.map(drop)
}
