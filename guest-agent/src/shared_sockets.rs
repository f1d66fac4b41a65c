//! Sockets in directories that are shared with the host. Our kernel sends connections to those that
//! nobody inside has bound to a listening socket of this process, one for each type, once the host
//! has connected to its own: the connection's token is the header of the stream that the host opens.
//! For programs of the host that connect to a socket inside, the host asks by a call.

// UNSAFETY: the kernel's interface for this is ioctl(2).
#![expect(unsafe_code, reason = "ioctl(2) has no safe form")]

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::ConnectRequest;
use bulkhead_protocol::agent::host_socket::Kind;
use bulkhead_protocol::{SHARED_SOCKETS_DIR, StreamHeader};
use bulkhead_relay::{Content, FRAME_MAX, User, is_hung_up, relay};
use rustix::io::Errno;
use rustix::ioctl::{Getter, NoArg, Setter, ioctl};
use rustix::net::sockopt::set_socket_send_buffer_size_force;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, UCred, bind, connect, listen,
    socket_with,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_vsock::VsockStream;

use crate::io::{Meeting, StreamKind};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// How long nothing is accepted after a failure, and how long a server without room is left alone.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a server may take to make room for a connection.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long what was sent may take to leave the guest once its senders have ended.
const SETTLED: Duration = Duration::from_secs(1);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// `SIOCUNIXPROXY` of our patch.
const PROXY: u32 = 0x89e8;
/// `SIOCUNIXTOKEN`.
const TOKEN: u32 = 0x89e9;
/// `SIOCUNIXNODE`.
const NODE: u32 = 0x89ea;

/// The connections through the wall. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedSockets {
    meeting: Meeting<VsockStream>,
    relayed: Arc<Mutex<Relayed>>,
}

/// The ends inside of connections to the host.
#[derive(Debug, Default)]
struct Relayed {
    ends: HashMap<u64, OwnedFd>,
    last: u64,
}

impl SharedSockets {
    /// Takes over connections to sockets that nobody inside has bound.
    pub(crate) fn serve(meeting: Meeting<VsockStream>) -> Self {
        let sockets = Self { meeting, relayed: Arc::default() };
        for (name, kind, content) in [
            ("stream", SocketType::STREAM, Content::Bytes),
            ("packets", SocketType::SEQPACKET, Content::Packets),
        ] {
            match proxy(name, kind) {
                Ok(listener) => drop(tokio::spawn(sockets.clone().accept(listener, content))),
                // Where the agent is tested, the kernel is another one.
                Err(error) => tracing::warn!(%error, name, "sockets of the host are not reached"),
            }
        }
        sockets
    }

    async fn accept(self, listener: UnixListener, content: Content) {
        loop {
            let accepted = listener.accept().await.and_then(|(connection, _)| {
                let token = token(&connection)?;
                Ok((connection, token))
            });
            match accepted {
                Ok((connection, token)) => {
                    tokio::spawn(self.clone().pass_out(connection, token, content));
                }
                // The connection went away before it was accepted, or no descriptors are left.
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    /// Relays a connection that a process has made, and that the host has made as well.
    async fn pass_out(self, connection: UnixStream, token: StreamHeader, content: Content) {
        widen(&connection);
        let Ok(end) = connection.as_fd().try_clone_to_owned() else { return };
        let number = {
            let mut relayed = self.relayed();
            relayed.last += 1;
            let number = relayed.last;
            relayed.ends.insert(number, end);
            number
        };
        match self.claim(token).await {
            Ok(stream) => relay(content, connection, stream, None).await,
            Err(error) => tracing::warn!(%error, "a connection to the host's socket was closed"),
        }
        self.relayed().ends.remove(&number);
    }

    /// Connects to a socket inside for a program of the host, and relays.
    ///
    /// # Errors
    /// Nobody listens, the server makes no room, or the host opens no stream.
    pub(crate) async fn connect(&self, request: ConnectRequest) -> io::Result<()> {
        let header =
            StreamHeader::from_bytes(&request.stream).ok_or(io::ErrorKind::InvalidInput)?;
        let (kind, content) = match request.kind() {
            Kind::Stream => (SocketType::STREAM, Content::Bytes),
            Kind::Seqpacket => (SocketType::SEQPACKET, Content::Packets),
            Kind::Datagram | Kind::Fifo | Kind::Abandoned => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        };
        let ConnectRequest { node, uid, gid, groups, .. } = request;
        let user = User { uid, gid, groups };
        let sender = user.credentials();
        let connection = connect_to(node, kind, user).await?;
        widen(&connection);
        let stream = self.claim(header).await?;
        tokio::spawn(pass_in(content, connection, stream, sender));
        Ok(())
    }

    async fn claim(&self, header: StreamHeader) -> io::Result<UnixStream> {
        let claimed = self.meeting.claim(header, StreamKind::HostSocket).await;
        let stream = OwnedFd::from(claimed.map_err(io::Error::other)?);
        UnixStream::from_std(StdStream::from(stream))
    }

    /// Waits until what processes have sent that have ended is on its way to the host, for a bounded
    /// time.
    pub(crate) async fn settle(&self) {
        let settled = async {
            while self.relayed().ends.values().any(is_hung_up) {
                sleep(LOOK).await;
            }
        };
        if timeout(SETTLED, settled).await.is_err() {
            tracing::warn!("the host does not take what was sent to its sockets");
        }
    }

    fn relayed(&self) -> MutexGuard<'_, Relayed> {
        self.relayed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn pass_in(content: Content, connection: UnixStream, stream: UnixStream, sender: UCred) {
    relay(content, connection, stream, Some(sender)).await;
}

/// A listening socket that stands for those of the host.
fn proxy(name: &str, kind: SocketType) -> io::Result<UnixListener> {
    let directory = Path::new(SHARED_SOCKETS_DIR);
    fs::create_dir_all(directory)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(directory.join(name))?)?;
    listen(&socket, BACKLOG)?;
    // SAFETY: this request takes no argument.
    let request = unsafe { NoArg::<PROXY>::new() };
    // SAFETY: as above.
    unsafe { ioctl(&socket, request) }?;
    UnixListener::from_std(StdListener::from(socket))
}

/// The token of a connection to a proxy.
fn token(connection: &UnixStream) -> io::Result<StreamHeader> {
    // SAFETY: this request writes 16 bytes.
    let request = unsafe { Getter::<TOKEN, [u8; StreamHeader::LEN]>::new() };
    // SAFETY: as above.
    let token = unsafe { ioctl(connection, request) }?;
    if token == [0; StreamHeader::LEN] {
        return Err(io::ErrorKind::NotConnected.into());
    }
    Ok(StreamHeader(token))
}

/// Connects to the socket of a node as a user, once its server has room.
async fn connect_to(node: u64, kind: SocketType, user: User) -> io::Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
        aim(&socket, node)?;
        let attempt = move || {
            // The node decides; the path only has to be one.
            connect(&socket, &SocketAddrUnix::new("/")?)?;
            Ok(socket)
        };
        match user.clone().run(attempt).await {
            Err(error) if is_full(&error) && Instant::now() < deadline => sleep(PAUSE).await,
            connected => return UnixStream::from_std(StdStream::from(connected?)),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::AGAIN.raw_os_error())
}

/// Lets the next connect(2) of a socket go to a node.
fn aim(socket: &OwnedFd, node: u64) -> io::Result<()> {
    // SAFETY: this request reads eight bytes.
    let request = unsafe { Setter::<NODE, u64>::new(node) };
    // SAFETY: as above.
    Ok(unsafe { ioctl(socket, request) }?)
}

/// Lets a socket take a packet of any length that is relayed.
fn widen(connection: &UnixStream) {
    // Fails only without the right to.
    let _ = set_socket_send_buffer_size_force(connection, 2 * FRAME_MAX);
}
