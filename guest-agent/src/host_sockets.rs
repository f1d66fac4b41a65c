//! Sockets and FIFOs of the host that a container mounts. For each, one of the same kind, mode and
//! owner is made here and mounted in its place. Whoever connects to it gets a connection to that of
//! the host, which the host makes: the agent asks for it and says who has connected.
//!
//! Linux binds a socket to its file once. So a socket of the host whose server is gone refuses every
//! connection from then on, and the host says so: the agent stops to listen, and so does this one.

mod datagrams;
mod fifo;

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::host_socket::Kind;
use bulkhead_protocol::agent::{ConnectionWanted, HostSocket};
use bulkhead_protocol::{HOST_SOCKET_GROUPS_MAX, HOST_SOCKETS_DIR, StreamHeader};
use bulkhead_relay::{Content, FRAME_MAX, Peer, relay, write_frame};
use prost::Message as _;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::net::sockopt::{set_socket_passcred, set_socket_send_buffer_size_force};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixDatagram, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_vsock::VsockStream;

use crate::io::{Meeting, StreamKind};
use crate::socket_path::SocketPath;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Requests for connections that may wait to be sent.
const WANTED: usize = 16;
/// How long what was sent may take to leave the guest once its senders have ended.
const SETTLED: Duration = Duration::from_secs(1);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// Where a container has its sockets; its id must have been checked.
pub(crate) fn directory(container_id: &str) -> PathBuf {
    Path::new(HOST_SOCKETS_DIR).join(container_id)
}

/// What stands for one socket of the host.
enum StandIn {
    Connections(Content, UnixListener),
    Datagrams(Arc<UnixDatagram>),
    Fifo(PathBuf),
    /// Nobody listens.
    Nothing,
}

/// The sockets of one container; dropping this closes them and their connections.
#[derive(Debug)]
pub(crate) struct HostSockets {
    traffic: Traffic,
    /// What listens and asks.
    _tasks: JoinSet<()>,
}

/// Asks the host for connections. Clones ask the same.
#[derive(Clone)]
struct Host {
    wanted: mpsc::Sender<ConnectionWanted>,
    meeting: Meeting<VsockStream>,
    /// Bounds the connections of all containers.
    room: Arc<Semaphore>,
    traffic: Traffic,
}

/// What is on its way. Clones share it.
#[derive(Clone, Debug, Default)]
struct Traffic {
    relays: Arc<Mutex<JoinSet<()>>>,
    datagrams: Arc<Mutex<Vec<datagrams::Queue>>>,
    /// Whether bytes of each are to leave the guest.
    fifos: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
}

impl HostSockets {
    /// Makes a container's sockets and serves them; asks for connections over `control`.
    ///
    /// # Errors
    /// One cannot be made.
    pub(crate) fn serve(
        container_id: &str,
        sockets: &[HostSocket],
        control: VsockStream,
        (meeting, room): (Meeting<VsockStream>, Arc<Semaphore>),
    ) -> io::Result<Self> {
        let directory = directory(container_id);
        match fs::remove_dir_all(&directory) {
            // A container of the same id may have failed.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => fs::create_dir_all(&directory)?,
        }
        let (control, requests) = from_vsock(control)?.into_split();
        let (wanted, asked) = mpsc::channel(WANTED);
        let traffic = Traffic::default();
        let host = Host { wanted, meeting, room, traffic: traffic.clone() };
        let (mut tasks, mut listening) = (JoinSet::new(), HashMap::new());
        tasks.spawn(ask(requests, asked));
        for (socket, index) in sockets.iter().zip(0..) {
            let host = host.clone();
            let task = match make(&directory, index, socket)? {
                StandIn::Connections(content, listener) => {
                    tasks.spawn(accept(listener, index, content, host))
                }
                StandIn::Datagrams(socket) => {
                    let queue = datagrams::Queue::of(socket);
                    traffic.datagrams().push(queue.clone());
                    tasks.spawn(datagrams::forward(queue, index, host))
                }
                StandIn::Fifo(path) => {
                    let busy = Arc::<AtomicBool>::default();
                    traffic.fifos().push(busy.clone());
                    tasks.spawn(fifo::serve(path, index, host, busy))
                }
                StandIn::Nothing => continue,
            };
            listening.insert(index, task);
        }
        tasks.spawn(hear(control, listening));
        Ok(Self { traffic, _tasks: tasks })
    }

    /// Waits until what processes have sent that have ended is on its way to the host, for a bounded
    /// time.
    pub(crate) async fn settle(&self) {
        let settled = async {
            while !self.traffic.is_still() {
                sleep(LOOK).await;
            }
        };
        if timeout(SETTLED, settled).await.is_err() {
            tracing::warn!("the host does not take what a container has sent to its sockets");
        }
    }
}

impl Drop for HostSockets {
    fn drop(&mut self) {
        // They hold the set that they are in, so that it does not end them by itself.
        self.traffic.relays().abort_all();
    }
}

impl Traffic {
    fn spawn(&self, relay: impl Future<Output = ()> + Send + 'static) {
        let mut relays = self.relays();
        while relays.try_join_next().is_some() {}
        relays.spawn(relay);
    }

    fn relays(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn datagrams(&self) -> MutexGuard<'_, Vec<datagrams::Queue>> {
        self.datagrams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fifos(&self) -> MutexGuard<'_, Vec<Arc<AtomicBool>>> {
        self.fifos.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_still(&self) -> bool {
        let mut relays = self.relays();
        while relays.try_join_next().is_some() {}
        relays.is_empty()
            && self.datagrams().iter().all(datagrams::Queue::is_empty)
            && !self.fifos().iter().any(|busy| busy.load(Ordering::Relaxed))
    }
}

impl Host {
    /// A stream that the host has connected to its socket. It is at its end when the host could not.
    async fn connect(&self, wanted: ConnectionWanted) -> io::Result<UnixStream> {
        let mut header = [0; StreamHeader::LEN];
        File::open("/dev/urandom")?.read_exact(&mut header)?;
        let wanted = ConnectionWanted { stream: header.to_vec(), ..wanted };
        self.wanted.send(wanted).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
        let claimed = self.meeting.claim(StreamHeader(header), StreamKind::HostSocket).await;
        from_vsock(claimed.map_err(io::Error::other)?)
    }

    /// Relays a connection that a process has made.
    async fn serve(
        self,
        (connection, peer): (UnixStream, Peer),
        socket: u32,
        content: Content,
        _place: OwnedSemaphorePermit,
    ) {
        let Peer { uid, gid, groups } = peer;
        let wanted = ConnectionWanted { socket, uid, gid, groups, ..ConnectionWanted::default() };
        match self.connect(wanted).await {
            Ok(stream) => relay(content, connection, stream, None).await,
            Err(error) => tracing::warn!(%error, "a connection to the host's socket was closed"),
        }
    }
}

/// Accepts connections until it is ended.
async fn accept(listener: UnixListener, socket: u32, content: Content, host: Host) {
    loop {
        let accepted = listener.accept().await.and_then(|(connection, _)| {
            // So that a packet is never too long for the buffer.
            let _ = set_socket_send_buffer_size_force(&connection, 2 * FRAME_MAX);
            let peer = Peer::of(&connection, HOST_SOCKET_GROUPS_MAX)?;
            Ok((connection, peer))
        });
        match accepted {
            Ok(accepted) => {
                // The semaphore is never closed.
                let Ok(place) = host.room.clone().acquire_owned().await else { return };
                host.traffic.spawn(host.clone().serve(accepted, socket, content, place));
            }
            // The connection went away before it was accepted, or no descriptors are left.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Sends requests to the host until nobody makes any, or the host is gone.
async fn ask(requests: OwnedWriteHalf, mut asked: mpsc::Receiver<ConnectionWanted>) {
    while let Some(wanted) = asked.recv().await {
        if write_frame(requests.as_ref(), &wanted.encode_to_vec()).await.is_err() {
            return;
        }
    }
}

/// Ends the sockets that the host names.
async fn hear(mut control: OwnedReadHalf, listening: HashMap<u32, AbortHandle>) {
    while let Ok(index) = control.read_u32().await {
        if let Some(task) = listening.get(&index) {
            task.abort();
        }
    }
}

/// A connection from the host as a socket of tokio, which only reads and writes it.
fn from_vsock(stream: VsockStream) -> io::Result<UnixStream> {
    UnixStream::from_std(StdStream::from(OwnedFd::from(stream)))
}

/// Makes what stands for a socket of the host.
fn make(directory: &Path, index: u32, socket: &HostSocket) -> io::Result<StandIn> {
    let name = index.to_string();
    let path = SocketPath::within(directory, &name)?;
    let bound = |kind| {
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        set_socket_passcred(&socket, kind == SocketType::DGRAM)?;
        bind(&socket, &SocketAddrUnix::new(path.as_path())?)?;
        io::Result::Ok(socket)
    };
    let listening = |kind, content| {
        let socket = bound(kind)?;
        listen(&socket, BACKLOG)?;
        let listener = StdListener::from(socket);
        listener.set_nonblocking(true)?;
        io::Result::Ok(StandIn::Connections(content, UnixListener::from_std(listener)?))
    };
    let made = match socket.kind() {
        Kind::Stream => listening(SocketType::STREAM, Content::Bytes)?,
        Kind::Seqpacket => listening(SocketType::SEQPACKET, Content::Packets)?,
        Kind::Datagram => {
            let socket = std::os::unix::net::UnixDatagram::from(bound(SocketType::DGRAM)?);
            socket.set_nonblocking(true)?;
            StandIn::Datagrams(Arc::new(UnixDatagram::from_std(socket)?))
        }
        Kind::Fifo => {
            mknodat(CWD, path.as_path(), FileType::Fifo, Mode::empty(), 0)?;
            StandIn::Fifo(directory.join(&name))
        }
        Kind::Abandoned => {
            bound(SocketType::STREAM)?;
            StandIn::Nothing
        }
    };
    chown(path.as_path(), Some(socket.uid), Some(socket.gid))?;
    fs::set_permissions(path.as_path(), Permissions::from_mode(socket.mode & 0o7777))?;
    Ok(made)
}
