//! Sockets in directories that a pod shares with the host. A program inside connects to whoever has
//! bound one on the host, and programs of the host connect to those that have been bound inside.
//!
//! The file server finds and binds them, because it has the files; here connections are made and
//! accepted, and relayed to the guest's agent. Each socket inside that sends datagrams has a
//! connection of its own, and each that gets some has one for all senders. Neither the guest nor the
//! file server is trusted: a connection is made to a socket that the file server has a descriptor
//! of, which is in the share, as a user that a container of the pod has. Connections and what they
//! hold are bounded as those of [`super`], together with them.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bulkhead_protocol::agent::ConnectRequest;
use bulkhead_protocol::agent::host_socket::Kind;
use bulkhead_protocol::{HOST_SOCKET_GROUPS_MAX, StreamHeader};
use bulkhead_relay::{
    Content, FRAME_MAX, Peer, parse_datagram, read_frame, receive_datagram, relay, send_now,
    write_frame,
};
use bulkhead_vmm::fileserver::config::{ConnectWanted, FsReport, FsVerdict, Listening, SocketKind};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::sockopt::socket_domain;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, UCred, accept_with, connect, socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::user::{User, Users};
use super::{ACCEPTED, in_tokio, widen};
use crate::machine::channel::watch;
use crate::machine::file_server::{Reports, Verdicts};
use crate::state::id::ContainerId;
use crate::supervisor::pod::{Pod, PodError};

/// How many sockets of a pod may listen or take datagrams. The file server keeps to less.
const LISTENERS_MAX: usize = 1100;

/// How long nothing is accepted after a failure.
const PAUSE: Duration = Duration::from_millis(10);

/// The users of all containers of a pod: its guest may be any of them.
#[derive(Debug, Default)]
pub struct Population(Mutex<Vec<(ContainerId, Users)>>);

impl Population {
    /// Adds those of a container.
    pub fn admit(&self, id: &ContainerId, users: Users) {
        let mut all = self.all();
        all.retain(|(other, _)| other != id);
        all.push((id.clone(), users));
    }

    /// Takes those of a container out.
    pub fn leave(&self, id: &ContainerId) {
        self.all().retain(|(other, _)| other != id);
    }

    /// The user with these ids, which the guest has named.
    fn find(&self, uid: u32, gid: u32, groups: &[u32]) -> io::Result<User> {
        let all = self.all();
        let mut found = all.iter().filter_map(|(_, users)| users.find(uid, gid, groups).ok());
        found.next().ok_or_else(|| io::ErrorKind::PermissionDenied.into())
    }

    fn all(&self) -> MutexGuard<'_, Vec<(ContainerId, Users)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves what the file server reports until it has ended, then waits for the connections to end.
pub async fn serve(pod: Weak<Pod>, mut reports: Reports) {
    let Some(room) = pod.upgrade().map(|pod| pod.connections.clone()) else { return };
    let service = Service { pod, room, verdicts: reports.verdicts(), relays: Relays::default() };
    let mut listeners = JoinSet::new();
    while let Some((report, descriptor)) = reports.next().await {
        while listeners.try_join_next().is_some() {}
        match report {
            FsReport::Connect(wanted) => service.begin_to_connect(wanted, descriptor),
            FsReport::Listen(socket) if listeners.len() < LISTENERS_MAX => {
                let service = service.clone();
                match socket.kind {
                    SocketKind::Datagram => listeners.spawn(service.take(socket, descriptor)),
                    _ => listeners.spawn(service.listen(socket, descriptor)),
                };
            }
            FsReport::Listen(_) => tracing::warn!("the guest listens on too many sockets"),
        }
    }
    drop(listeners);
    let relays = std::mem::take(&mut *service.relays.lock());
    relays.join_all().await;
}

/// The relays of a pod; dropping the last clone ends them.
#[derive(Clone, Debug, Default)]
struct Relays(Arc<Mutex<JoinSet<()>>>);

impl Relays {
    fn lock(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut relays = self.lock();
        while relays.try_join_next().is_some() {}
        relays.spawn(task);
    }
}

#[derive(Clone, Debug)]
struct Service {
    pod: Weak<Pod>,
    room: Arc<Semaphore>,
    verdicts: Verdicts,
    relays: Relays,
}

impl Service {
    /// Connects for a process of the guest, which waits for the verdict.
    fn begin_to_connect(&self, wanted: ConnectWanted, file: OwnedFd) {
        let (pod, verdicts) = (self.pod.clone(), self.verdicts.clone());
        let place = self.room.clone().try_acquire_owned();
        self.relays.spawn(async move {
            let ConnectWanted { request, token, kind, .. } = wanted;
            let connected = match place {
                Ok(place) => connect_as(&pod, wanted, file).await.map(|made| (made, place)),
                // As a server that does not accept: the process tries again, or is told.
                Err(_) => Err(Errno::AGAIN.into()),
            };
            let error = connected.as_ref().err().map_or(0, errno);
            verdicts.send(FsVerdict { request, error }).await;
            if let Ok(((socket, sender), _place)) = connected {
                let stream = stream(&pod, Some(StreamHeader(token))).await;
                match stream {
                    Ok((_, stream)) => match content(kind) {
                        Some(content) => relay(content, socket, stream, Some(sender)).await,
                        None => pass_datagrams_out(&pod, &socket, &stream).await,
                    },
                    Err(error) => {
                        tracing::debug!(error = %error, "the guest did not take a connection");
                    }
                }
            }
        });
    }

    /// Accepts connections to a socket of the guest until that is closed.
    async fn listen(self, socket: Listening, listener: OwnedFd) {
        let served = async {
            let listener = in_epoll(listener)?;
            while let Some(connection) = accept(&listener).await? {
                // The semaphore is never closed.
                let Ok(place) = self.room.clone().acquire_owned().await else { break };
                self.relays.spawn(pass_in(self.pod.clone(), socket, connection, place));
            }
            io::Result::Ok(())
        };
        if let Err(error) = served.await {
            tracing::warn!(error = %error, "cannot accept connections for the guest");
        }
    }

    /// Passes datagrams on to a socket of the guest until that is closed.
    async fn take(self, socket: Listening, bound: OwnedFd) {
        let served = async {
            let bound = in_epoll(bound)?;
            let (mut place, mut stream) = (None, None);
            loop {
                drop(bound.readable().await?);
                if place.is_none() {
                    // The semaphore is never closed.
                    place = self.room.clone().acquire_owned().await.ok();
                }
                let Some(frame) = next_datagram(&bound).await? else { break };
                let mut passed = self.pass_datagram_in(&frame, socket, &mut stream).await;
                if passed.is_err() {
                    // The first ones may come before the process has got its bind(2) done.
                    sleep(PAUSE).await;
                    passed = self.pass_datagram_in(&frame, socket, &mut stream).await;
                }
                if let Err(error) = passed {
                    tracing::debug!(error = %error, "a datagram did not reach the guest");
                }
            }
            io::Result::Ok(())
        };
        if let Err(error) = served.await {
            tracing::warn!(error = %error, "cannot take datagrams for the guest");
        }
    }

    /// Passes a datagram on over a stream, which is opened if there is none.
    async fn pass_datagram_in(
        &self,
        frame: &[u8],
        socket: Listening,
        stream: &mut Option<UnixStream>,
    ) -> io::Result<()> {
        let open = match stream.take() {
            Some(open) => open,
            // Each datagram has its own sender.
            None => connect_inside(&self.pod, socket, Peer::default()).await?,
        };
        write_frame(&open, frame).await?;
        *stream = Some(open);
        Ok(())
    }
}

/// The next datagram; `None` once the file server has shut the socket down.
async fn next_datagram(bound: &AsyncFd<OwnedFd>) -> io::Result<Option<Vec<u8>>> {
    loop {
        let mut ready = bound.readable().await?;
        if ready.ready().is_read_closed() {
            return Ok(None);
        }
        match receive_datagram(bound) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            received => return received,
        }
    }
}

/// Sends the datagrams of one socket of the guest to that of the host, until there are no more or
/// nobody takes them.
async fn pass_datagrams_out(pod: &Weak<Pod>, socket: &UnixStream, stream: &UnixStream) {
    let passed = async {
        while let Some(frame) = read_frame(stream, FRAME_MAX).await? {
            let (sender, datagram) = parse_datagram(&frame).ok_or(io::ErrorKind::InvalidData)?;
            let known = pod.upgrade().is_some_and(|pod| {
                pod.population.find(sender.uid, sender.gid, &sender.groups).is_ok()
            });
            if !known {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            let sender = Some(sender.credentials());
            let send = || send_now(sender, socket, datagram);
            socket.async_io(Interest::WRITABLE, send).await?;
        }
        io::Result::Ok(())
    };
    if let Err(error) = passed.await {
        tracing::debug!(error = %error, "datagrams of the guest reach nobody any more");
    }
}

/// The next connection; `None` once the file server has shut the socket down. Without waiting,
/// accept(2) does not tell that from a socket to which nobody connects.
async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<Option<UnixStream>> {
    loop {
        let mut ready = listener.readable().await?;
        if ready.ready().is_read_closed() {
            return Ok(None);
        }
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(connection) => return in_tokio(StdStream::from(connection)).map(Some),
            Err(Errno::AGAIN) => ready.clear_ready(),
            // It does not listen, or is no such socket at all.
            Err(error @ (Errno::INVAL | Errno::OPNOTSUPP)) => return Err(error.into()),
            // There may be no descriptors left.
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Connects to a socket as a user that the guest has named.
async fn connect_as(
    pod: &Weak<Pod>,
    wanted: ConnectWanted,
    file: OwnedFd,
) -> io::Result<(UnixStream, UCred)> {
    let pod = pod.upgrade().ok_or(io::ErrorKind::ConnectionRefused)?;
    let user = pod.population.find(wanted.uid, wanted.gid, &wanted.groups)?;
    drop(pod);
    let sender = user.credentials();
    let kind = wanted.kind.socket_type();
    let connect = move || {
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
            return Err(Errno::CONNREFUSED.into());
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    let socket = user.run(connect).await?;
    widen(&socket);
    Ok((in_tokio(StdStream::from(socket))?, sender))
}

/// Connects what the host's side has accepted to the socket of the guest, and relays.
async fn pass_in(
    pod: Weak<Pod>,
    socket: Listening,
    connection: UnixStream,
    _place: OwnedSemaphorePermit,
) {
    let connected = async {
        let peer = Peer::of(&connection, HOST_SOCKET_GROUPS_MAX)?;
        let content = content(socket.kind).ok_or(io::ErrorKind::InvalidInput)?;
        io::Result::Ok((content, connect_inside(&pod, socket, peer).await?))
    };
    match connected.await {
        Ok((content, stream)) => {
            widen(&connection);
            relay(content, connection, stream, None).await;
        }
        Err(error) => tracing::debug!(error = %error, "a connection to the guest was closed"),
    }
}

/// A stream that the agent has connected to a socket of the guest for somebody.
async fn connect_inside(pod: &Weak<Pod>, socket: Listening, peer: Peer) -> io::Result<UnixStream> {
    let (header, stream) = stream(pod, None).await.map_err(io::Error::other)?;
    let kind = match socket.kind {
        SocketKind::Stream => Kind::Stream,
        SocketKind::Seqpacket => Kind::Seqpacket,
        SocketKind::Datagram => Kind::Datagram,
    };
    let Peer { uid, gid, groups } = peer;
    let request = ConnectRequest {
        stream: header.0.to_vec(),
        node: socket.node,
        kind: kind.into(),
        uid,
        gid,
        groups,
    };
    let agent = pod.upgrade().map(|pod| pod.agent.clone());
    let agent = agent.ok_or(io::ErrorKind::NotConnected)?;
    agent.connect_socket(request).await.map_err(io::Error::other)?;
    Ok(stream)
}

/// A stream to the agent, with this header or a new one.
async fn stream(
    pod: &Weak<Pod>,
    header: Option<StreamHeader>,
) -> Result<(StreamHeader, UnixStream), PodError> {
    let failed = |error: io::Error| PodError::Io("connection to a socket", error);
    let pod = pod.upgrade().ok_or_else(|| failed(io::ErrorKind::NotConnected.into()))?;
    let opened = timeout(ACCEPTED, async {
        match header {
            Some(header) => Ok((header, pod.open_stream_named(header).await?)),
            None => pod.open_stream().await,
        }
    });
    let opened = opened.await.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
    let (header, stream) = opened?;
    Ok((header, in_tokio(stream).map_err(failed)?))
}

fn in_epoll(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    if socket_domain(&socket)? != AddressFamily::UNIX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    ioctl_fionbio(&socket, true)?;
    watch(socket)
}

/// What a connection of this kind carries; `None` for datagrams, which have none.
const fn content(kind: SocketKind) -> Option<Content> {
    match kind {
        SocketKind::Stream => Some(Content::Bytes),
        SocketKind::Seqpacket => Some(Content::Packets),
        SocketKind::Datagram => None,
    }
}

/// The number of an error that a process of the guest is told.
fn errno(error: &io::Error) -> i32 {
    let number = error.raw_os_error();
    number.unwrap_or(match error.kind() {
        io::ErrorKind::PermissionDenied => Errno::ACCESS.raw_os_error(),
        _ => Errno::CONNREFUSED.raw_os_error(),
    })
}
