//! Sockets in directories that are shared with the host. Our kernel sends connections to those that
//! nobody inside has bound to a listening socket of this process, one for each type, once the host
//! has connected to its own: the connection's token is the header of the stream that the host opens.
//! A socket that sends datagrams to one of the host has such a connection of its own. For programs
//! of the host that connect to a socket inside, or send datagrams to it, the host asks by a call.

// UNSAFETY: the kernel's interface for this is ioctl(2), and a task waits on a socket of its own.
#![expect(unsafe_code, reason = "ioctl(2) and AsyncFd::register_with_interest have no safe form")]

use std::collections::HashMap;
use std::fs;
use std::future::pending;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::ConnectRequest;
use bulkhead_protocol::agent::host_socket::Kind;
use bulkhead_protocol::{SHARED_SOCKETS_DIR, StreamHeader};
use bulkhead_relay::{
    Content, FRAME_MAX, User, is_hung_up, parse_datagram, read_frame, receive_datagram, relay,
    send_now, write_frame,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::ioctl::{Getter, IntegerSetter, Setter, ioctl};
use rustix::net::sockopt::{set_socket_passcred, set_socket_send_buffer_size_force};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, UCred, accept_with, bind,
    connect, listen, shutdown, socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
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
    proxies: Vec<Arc<AsyncFd<OwnedFd>>>,
}

/// The ends inside of connections to the host.
#[derive(Debug, Default)]
struct Relayed {
    ends: HashMap<u64, OwnedFd>,
    last: u64,
}

/// A place among [`Relayed`].
struct Kept {
    number: u64,
    relayed: Arc<Mutex<Relayed>>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        lock(&self.relayed).ends.remove(&self.number);
    }
}

impl SharedSockets {
    /// Takes over connections to sockets that nobody inside has bound.
    pub(crate) fn serve(meeting: Meeting<VsockStream>) -> Self {
        let mut sockets = Self { meeting, ..Self::default() };
        for (name, kind, content) in [
            ("stream", SocketType::STREAM, Some(Content::Bytes)),
            ("packets", SocketType::SEQPACKET, Some(Content::Packets)),
            ("datagrams", SocketType::DGRAM, None),
        ] {
            match proxy(name, kind) {
                Ok(listener) => {
                    let listener = Arc::new(listener);
                    sockets.proxies.push(listener.clone());
                    tokio::spawn(sockets.clone().accept(listener, content));
                }
                // Where the agent is tested, the kernel is another one.
                Err(error) => tracing::warn!(%error, name, "sockets of the host are not reached"),
            }
        }
        sockets
    }

    /// Accepts connections with this content, or datagrams.
    async fn accept(self, listener: Arc<AsyncFd<OwnedFd>>, content: Option<Content>) {
        loop {
            let accepted = next(&listener).await.and_then(|connection| {
                let token = token(&connection)?;
                // At once: what waits to be accepted is looked at before this.
                let kept = self.keep(&connection)?;
                Ok((connection, token, kept))
            });
            match accepted {
                Ok((connection, token, kept)) => {
                    let sockets = self.clone();
                    tokio::spawn(async move {
                        sockets.pass_out(connection, token, content).await;
                        drop(kept);
                    });
                }
                // The connection went away before it was accepted, or no descriptors are left.
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    /// Relays a connection that a process has made, and that the host has made as well.
    async fn pass_out(
        &self,
        connection: UnixStream,
        token: StreamHeader,
        content: Option<Content>,
    ) {
        widen(&connection);
        match self.claim(token).await {
            Ok(stream) => match content {
                Some(content) => relay(content, connection, stream, None).await,
                None => pass_datagrams_out(&connection, &stream).await,
            },
            Err(error) => tracing::warn!(%error, "a connection to the host's socket was closed"),
        }
    }

    fn keep(&self, connection: &UnixStream) -> io::Result<Kept> {
        let end = connection.as_fd().try_clone_to_owned()?;
        let mut relayed = lock(&self.relayed);
        relayed.last += 1;
        let number = relayed.last;
        relayed.ends.insert(number, end);
        Ok(Kept { number, relayed: self.relayed.clone() })
    }

    /// Connects to a socket inside for a program of the host, and relays.
    ///
    /// # Errors
    /// Nobody listens, the server makes no room, or the host opens no stream.
    pub(crate) async fn connect(&self, request: ConnectRequest) -> io::Result<()> {
        let header =
            StreamHeader::from_bytes(&request.stream).ok_or(io::ErrorKind::InvalidInput)?;
        let (kind, content) = match request.kind() {
            Kind::Stream => (SocketType::STREAM, Some(Content::Bytes)),
            Kind::Seqpacket => (SocketType::SEQPACKET, Some(Content::Packets)),
            Kind::Datagram => (SocketType::DGRAM, None),
            Kind::Fifo | Kind::Abandoned => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        };
        let ConnectRequest { node, uid, gid, groups, .. } = request;
        let user = User { uid, gid, groups };
        let sender = user.credentials();
        let connection = connect_to(node, kind, user).await?;
        widen(&connection);
        let stream = self.claim(header).await?;
        match content {
            Some(content) => tokio::spawn(pass_in(content, connection, stream, sender)),
            None => tokio::spawn(pass_datagrams_in(connection, stream)),
        };
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
            while self.is_busy() {
                sleep(LOOK).await;
            }
        };
        if timeout(SETTLED, settled).await.is_err() {
            tracing::warn!("the host does not take what was sent to its sockets");
        }
    }

    fn is_busy(&self) -> bool {
        self.proxies.iter().any(is_waited_for) || lock(&self.relayed).ends.values().any(is_hung_up)
    }
}

fn lock(relayed: &Mutex<Relayed>) -> MutexGuard<'_, Relayed> {
    relayed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next connection to a proxy. Its other end is not asked for an address: who sends datagrams is
/// not connected.
async fn next(listener: &AsyncFd<OwnedFd>) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let accept = |listener: &OwnedFd| Ok(accept_with(listener, flags)?);
    let connection = listener.async_io(Interest::READABLE, accept).await?;
    UnixStream::from_std(StdStream::from(connection))
}

/// Whether a connection waits to be accepted.
fn is_waited_for(listener: &Arc<AsyncFd<OwnedFd>>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut watched = [PollFd::new(listener, PollFlags::IN)];
    poll(&mut watched, Some(&now)).is_ok_and(|count| count > 0)
}

/// Passes the datagrams of one socket on until that has ended and the host has sent all of them, or
/// the host takes no more.
async fn pass_datagrams_out(connection: &UnixStream, stream: &UnixStream) {
    let passed = async {
        let next = || receive_datagram(connection);
        while let Some(frame) = connection.async_io(Interest::READABLE, next).await? {
            write_frame(stream, &frame).await?;
        }
        shutdown(stream, Shutdown::Write)?;
        pending::<io::Result<()>>().await
    };
    tokio::select! {
        Err(error) = passed => tracing::debug!(%error, "a datagram did not reach the host's socket"),
        // Nothing comes but the end.
        _ = read_frame(stream, FRAME_MAX) => {}
    }
}

/// Sends datagrams to a socket inside until there are no more, or it is closed.
async fn pass_datagrams_in(connection: UnixStream, stream: UnixStream) {
    let passed = async {
        while let Some(frame) = read_frame(&stream, FRAME_MAX).await? {
            let (sender, datagram) = parse_datagram(&frame).ok_or(io::ErrorKind::InvalidData)?;
            let sender = Some(sender.credentials());
            let send = || send_now(sender, &connection, datagram);
            connection.async_io(Interest::WRITABLE, send).await?;
        }
        io::Result::Ok(())
    };
    if let Err(error) = passed.await {
        tracing::debug!(%error, "datagrams of the host reach nobody inside any more");
    }
}

async fn pass_in(content: Content, connection: UnixStream, stream: UnixStream, sender: UCred) {
    relay(content, connection, stream, Some(sender)).await;
}

/// A listening socket that stands for those of the host.
fn proxy(name: &str, kind: SocketType) -> io::Result<AsyncFd<OwnedFd>> {
    let directory = Path::new(SHARED_SOCKETS_DIR);
    fs::create_dir_all(directory)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let datagrams = kind == SocketType::DGRAM;
    // What comes from a socket for datagrams can be accepted, and has an end.
    let own = if datagrams { SocketType::SEQPACKET } else { kind };
    let socket = socket_with(AddressFamily::UNIX, own, flags, None)?;
    set_socket_passcred(&socket, datagrams)?;
    bind(&socket, &SocketAddrUnix::new(directory.join(name))?)?;
    listen(&socket, BACKLOG)?;
    // SAFETY: this request takes a number.
    let request = unsafe { IntegerSetter::<PROXY>::new_usize(kind.as_raw() as usize) };
    // SAFETY: as above.
    unsafe { ioctl(&socket, request) }?;
    // SAFETY: the socket is owned by what is made here, which never replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
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
