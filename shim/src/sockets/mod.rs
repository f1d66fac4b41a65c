//! Sockets and FIFOs of the host that a container mounts by name. The guest's agent makes one of the
//! same kind for each and asks for a connection whenever a process inside uses it; this module
//! connects to the host's own, with the user that the process has, and relays.
//!
//! The guest is not trusted. It gets connections only to what the caller has mounted, as users that
//! the container has, and no more than [`CONNECTIONS_MAX`] at once. Each relay holds a bounded
//! number of bytes.

mod datagrams;
mod fifo;
mod node;
mod shared;
mod user;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bulkhead_protocol::agent::host_socket::Kind;
use bulkhead_protocol::agent::{self, ConnectionWanted};
use bulkhead_protocol::{CONNECTION_WANTED_MAX, CONNECTIONS_MAX, StreamHeader};
use bulkhead_relay::{Content, FRAME_MAX, read_frame, relay, write_all};
use prost::Message as _;
use rustix::net::UCred;
use rustix::net::sockopt::set_socket_send_buffer_size_force;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

pub use self::node::{Node, NodeError};
pub use self::shared::{Population, serve as serve_shared};
pub use self::user::Users;
use crate::supervisor::pod::{Pod, PodError};

/// How long the servers of the host may take to read what a container has sent before its end.
const SETTLED: Duration = Duration::from_secs(2);

/// How long the agent may take to accept a stream. The pod cannot end meanwhile.
const ACCEPTED: Duration = Duration::from_secs(10);

/// The connections that a pod may still have.
#[must_use]
pub fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(CONNECTIONS_MAX))
}

/// What a container has of the host's sockets, as its creation needs it.
#[derive(Debug)]
pub struct HostSockets {
    /// In the order in which the agent knows them.
    pub nodes: Vec<Node>,
    /// As which users connections are made.
    pub users: Users,
}

/// The connections of one container; dropping this closes them.
#[derive(Debug, Default)]
pub struct Connections(Option<JoinHandle<()>>);

/// What makes the connections.
struct Service {
    pod: Weak<Pod>,
    nodes: Vec<Node>,
    users: Users,
    /// To the agent.
    control: Mutex<Arc<UnixStream>>,
}

/// What a connection leads to.
enum Way {
    Connection(Content, UnixStream, UCred),
    Datagrams,
    Fifo,
}

impl HostSockets {
    /// What the agent is told.
    #[must_use]
    pub fn describe(&self) -> Vec<agent::HostSocket> {
        self.nodes.iter().map(Node::describe).collect()
    }

    /// Opens the stream over which the agent asks for connections, and makes those from now on.
    /// Returns the stream's header, which is empty if the container mounts no sockets.
    ///
    /// # Errors
    /// When the agent does not accept the stream.
    pub async fn serve(self, pod: &Arc<Pod>) -> Result<(Vec<u8>, Connections), PodError> {
        if self.nodes.is_empty() {
            return Ok((Vec::new(), Connections::default()));
        }
        let (header, control) = pod.open_stream().await?;
        let control = Arc::new(
            in_tokio(control)
                .map_err(|error| PodError::Io("stream of the host's sockets", error))?,
        );
        let Self { nodes, users } = self;
        let pod = Arc::downgrade(pod);
        let service = Service { pod, nodes, users, control: Mutex::new(control.clone()) };
        let task = tokio::spawn(async move {
            if let Err(error) = Arc::new(service).answer_all(&control).await {
                tracing::warn!(error = %error, "the guest gets no connections to sockets any more");
            }
        });
        Ok((header.0.to_vec(), Connections(Some(task))))
    }
}

impl Connections {
    /// Waits until what was sent through them has been read, for a bounded time. To be called when
    /// the container is gone from its pod.
    pub async fn settle(mut self) {
        if let Some(task) = self.0.take() {
            settle(task).await;
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Service {
    /// Answers requests until the container is gone, then waits for the connections to end.
    async fn answer_all(self: Arc<Self>, control: &UnixStream) -> io::Result<()> {
        let mut answers = JoinSet::new();
        while let Some(frame) = read_frame(control, CONNECTION_WANTED_MAX).await? {
            while answers.try_join_next().is_some() {}
            let wanted = ConnectionWanted::decode(&*frame).map_err(io::Error::other)?;
            let Some(room) = self.pod.upgrade().map(|pod| pod.connections.clone()) else { break };
            // The semaphore is never closed.
            let Ok(place) = room.acquire_owned().await else { break };
            answers.spawn(self.clone().answer(wanted, place));
        }
        while answers.join_next().await.is_some() {}
        Ok(())
    }

    /// Answers one request: makes the connection, and the stream in any case.
    async fn answer(self: Arc<Self>, wanted: ConnectionWanted, _place: OwnedSemaphorePermit) {
        let way = self.find(&wanted).await;
        let stream = match self.stream(&wanted.stream).await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(error = %error, "the guest did not take a connection to a socket");
                return;
            }
        };
        let ended = match way {
            Ok((_, Way::Connection(content, socket, sender))) => {
                relay(content, socket, stream, Some(sender)).await;
                Ok(())
            }
            Ok((node, Way::Datagrams)) => datagrams::pass_on(node, &self.users, &stream).await,
            Ok((node, Way::Fifo)) => {
                fifo::pass_on(node, self.users.root(), wanted.writes, &stream).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            self.has_failed(wanted.socket, &error).await;
        }
    }

    async fn find(&self, wanted: &ConnectionWanted) -> io::Result<(&Node, Way)> {
        let index = usize::try_from(wanted.socket).map_err(io::Error::other)?;
        let node = self.nodes.get(index).ok_or(io::ErrorKind::NotFound)?;
        let content = match node.kind {
            Kind::Stream => Content::Bytes,
            Kind::Seqpacket => Content::Packets,
            Kind::Datagram => return Ok((node, Way::Datagrams)),
            Kind::Fifo => return Ok((node, Way::Fifo)),
            Kind::Abandoned => return Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let user = self.users.find(wanted.uid, wanted.gid, &wanted.groups)?;
        let sender = user.credentials();
        let socket = in_tokio(StdStream::from(node.connect(user).await?))?;
        Ok((node, Way::Connection(content, socket, sender)))
    }

    async fn stream(&self, header: &[u8]) -> Result<UnixStream, PodError> {
        let failed = |error| PodError::Io("connection to a socket", error);
        let header = StreamHeader::from_bytes(header);
        let header = header.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        let pod = self.pod.upgrade();
        let pod = pod.ok_or_else(|| failed(io::ErrorKind::NotConnected.into()))?;
        let opened = timeout(ACCEPTED, pod.open_stream_named(header)).await;
        let opened = opened.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
        in_tokio(opened?).map_err(failed)
    }

    /// Tells the agent if nobody can be reached at a socket any more.
    async fn has_failed(&self, index: u32, error: &io::Error) {
        let socket = index.to_string();
        tracing::debug!(error = %error, socket, "a connection to a socket of the host failed");
        let number = usize::try_from(index).ok();
        let node = number.and_then(|number| self.nodes.get(number));
        if error.kind() == io::ErrorKind::ConnectionRefused && node.is_some_and(Node::is_abandoned)
        {
            let control = self.control.lock().await;
            // The guest may be gone.
            let _ = write_all(&control, &index.to_be_bytes()).await;
        }
    }
}

/// Waits for a bounded time until a task that relays has ended, then ends it.
pub async fn settle(mut task: JoinHandle<()>) {
    if timeout(SETTLED, &mut task).await.is_err() {
        tracing::warn!("a server of the host has not read all that a container has sent to it");
        task.abort();
    }
}

/// A connected socket for this program's runtime.
fn in_tokio(socket: StdStream) -> io::Result<UnixStream> {
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

/// Lets a socket take a packet of any length that is relayed. Fails only without the right to.
fn widen(socket: impl AsFd) {
    let _ = set_socket_send_buffer_size_force(socket, 2 * FRAME_MAX);
}
