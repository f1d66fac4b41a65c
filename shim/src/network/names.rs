//! Name servers on the loopback of a container's network namespace, such as Docker's for its networks.
//!
//! A guest has a loopback of its own. So the agent stands in for these servers there and passes
//! each query on to the host, which asks the real server in the namespace. The guest is not
//! trusted: pending queries are bounded in number and time, and only the servers that the
//! container's resolv.conf(5) names are asked.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{NameQuery, NamesRequest};
use rustix::fs::{Mode, OFlags};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{interval, timeout};
use tonic::Streaming;

use crate::machine::agent::{Agent, AgentError};
use crate::network::mirror::within;

/// The port on which name servers are asked.
const PORT: u16 = 53;
/// How long a server may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often overdue queries are looked for.
const SWEEP: Duration = Duration::from_secs(1);
/// The most pending queries of one server, and the most connections to all servers.
const WAITING_MAX: usize = 256;
/// The most bytes of a datagram.
const DATAGRAM_MAX: usize = 64 << 10;
/// The header of a message, RFC 1035 §4.1.1.
const HEADER_BYTES: usize = 12;
/// The most bytes that are read of a resolv.conf(5).
const FILE_MAX: usize = 64 << 10;
/// The most answers that wait to be sent to the guest.
const ANSWERS: usize = 64;

/// Why the guest cannot resolve names.
#[derive(Debug, Error)]
pub enum NamesError {
    /// The host's side.
    #[error("cannot ask the name servers of the container's network")]
    Sockets(#[from] io::Error),
    /// The guest's side.
    #[error("the guest cannot answer for the name servers of the container's network")]
    Agent(#[from] AgentError),
}

/// The servers of a resolv.conf(5) on a loopback address other than the container's own 127.0.0.1.
///
/// # Errors
/// When it cannot be read.
pub fn on_loopback(resolv_conf: &Path) -> io::Result<Vec<Ipv4Addr>> {
    use std::io::Read;
    let mut text = String::new();
    // Non-blocking, as the path may name something else since the container was made.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(resolv_conf, flags, Mode::empty())?);
    file.take(FILE_MAX as u64).read_to_string(&mut text)?;
    Ok(servers(&text))
}

fn servers(text: &str) -> Vec<Ipv4Addr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        let address = address.parse::<Ipv4Addr>().ok()?;
        (address.is_loopback() && address != Ipv4Addr::LOCALHOST).then_some(address)
    };
    text.lines().filter_map(server).collect()
}

/// A server that is asked over UDP.
#[derive(Debug)]
struct Server {
    socket: UdpSocket,
    waiting: Mutex<HashMap<u16, Waiting>>,
}

/// A query that was passed on under another identifier.
#[derive(Debug)]
struct Waiting {
    number: u64,
    query: Vec<u8>,
    since: Instant,
}

type Answers = mpsc::Sender<NamesRequest>;

/// Name servers in a network namespace, which are asked for a guest.
#[derive(Debug)]
pub struct NameServers {
    namespace: Arc<File>,
    servers: HashMap<u32, Arc<Server>>,
    queries: Streaming<NameQuery>,
    answers: Answers,
    tasks: JoinSet<()>,
}

impl NameServers {
    /// Makes the guest's agent stand in for servers.
    ///
    /// # Errors
    /// When the namespace, the servers or the guest cannot be reached.
    pub async fn open(
        agent: &Agent,
        namespace: &Path,
        addresses: &[Ipv4Addr],
    ) -> Result<Self, NamesError> {
        let namespace = Arc::new(File::open(namespace)?);
        let (answers, answered) = mpsc::channel(ANSWERS);
        let (mut servers, mut tasks) = (HashMap::new(), JoinSet::new());
        for address in addresses {
            let server = Arc::new(Server::connect(namespace.clone(), *address).await?);
            tasks.spawn(server.clone().hear(answers.clone()));
            servers.insert(address.to_bits(), server);
        }
        let first = servers.keys().copied().collect();
        let queries = agent.names(first, answered).await?;
        Ok(Self { namespace, servers, queries, answers, tasks })
    }

    /// Passes the guest's queries on until the guest is gone.
    pub async fn serve(mut self) {
        let connections = Arc::new(Semaphore::new(WAITING_MAX));
        while let Ok(Some(query)) = self.queries.message().await {
            while self.tasks.try_join_next().is_some() {}
            let Some(server) = self.servers.get(&query.server) else { continue };
            if !query.stream {
                server.ask(query, &self.answers).await;
            } else if let Ok(place) = connections.clone().try_acquire_owned() {
                let (namespace, answers) = (self.namespace.clone(), self.answers.clone());
                self.tasks.spawn(async move {
                    let asked = timeout(PATIENCE, converse(namespace, &query)).await;
                    let message = asked.map_err(io::Error::from).flatten();
                    let message = message.unwrap_or_else(|_| failure(query.message));
                    answer(&answers, query.number, message).await;
                    drop(place);
                });
            } else {
                answer(&self.answers, query.number, failure(query.message)).await;
            }
        }
    }
}

impl Server {
    async fn connect(namespace: Arc<File>, address: Ipv4Addr) -> io::Result<Self> {
        let open = move || std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
        let socket = spawn_blocking(move || within(&namespace, open)).await??;
        socket.set_nonblocking(true)?;
        socket.connect((address, PORT))?;
        Ok(Self { socket: UdpSocket::from_std(socket)?, waiting: Mutex::default() })
    }

    /// Passes a query on, under an identifier that no other pending query has.
    async fn ask(&self, NameQuery { number, message, .. }: NameQuery, answers: &Answers) {
        let passed_on = match self.enter(number, &message) {
            Some(id) => {
                let mut query = message.clone();
                set_id(&mut query, id);
                let sent = self.socket.send(&query).await.is_ok();
                sent || self.waiting().remove(&id).is_none()
            }
            None => false,
        };
        if !passed_on {
            answer(answers, number, failure(message)).await;
        }
    }

    fn enter(&self, number: u64, query: &[u8]) -> Option<u16> {
        let mut waiting = self.waiting();
        if query.len() < HEADER_BYTES || waiting.len() >= WAITING_MAX {
            return None;
        }
        // This ends, as there are more identifiers than pending queries.
        let mut id = [0; 2];
        let id = loop {
            crate::supervisor::pod::random(&mut id).ok()?;
            let id = u16::from_be_bytes(id);
            if !waiting.contains_key(&id) {
                break id;
            }
        };
        waiting.insert(id, Waiting { number, query: query.to_vec(), since: Instant::now() });
        Some(id)
    }

    /// Passes answers back, and answers overdue queries with a failure.
    async fn hear(self: Arc<Self>, answers: Answers) {
        let mut buffer = vec![0; DATAGRAM_MAX];
        let mut sweep = interval(SWEEP);
        loop {
            let over = tokio::select! {
                received = self.socket.recv(&mut buffer) => match received {
                    Ok(length) => {
                        self.pass_back(buffer.get(..length).unwrap_or_default(), &answers).await;
                        continue;
                    }
                    // Nothing listens there, so no pending query will be answered.
                    Err(_) => self.waiting().drain().map(|(_, waiting)| waiting).collect(),
                },
                _ = sweep.tick() => self.late(),
            };
            for Waiting { number, query, .. } in over {
                answer(&answers, number, failure(query)).await;
            }
        }
    }

    async fn pass_back(&self, message: &[u8], answers: &Answers) {
        let Some(id) = message.first_chunk().map(|id| u16::from_be_bytes(*id)) else { return };
        let Some(Waiting { number, query, .. }) = self.waiting().remove(&id) else { return };
        let mut message = message.to_vec();
        if let Some(id) = query.first_chunk() {
            set_id(&mut message, u16::from_be_bytes(*id));
        }
        answer(answers, number, message).await;
    }

    /// Takes out the overdue queries.
    fn late(&self) -> Vec<Waiting> {
        let late = |_: &u16, waiting: &mut Waiting| waiting.since.elapsed() > PATIENCE;
        self.waiting().extract_if(late).map(|(_, waiting)| waiting).collect()
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u16, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks over a TCP connection of its own, RFC 1035 §4.2.2.
async fn converse(namespace: Arc<File>, query: &NameQuery) -> io::Result<Vec<u8>> {
    let length = u16::try_from(query.message.len()).map_err(io::Error::other)?;
    let open = move || TcpSocket::new_v4();
    let socket = spawn_blocking(move || within(&namespace, open)).await??;
    let server = IpAddr::V4(Ipv4Addr::from_bits(query.server));
    let mut stream = socket.connect(SocketAddr::new(server, PORT)).await?;
    stream.write_u16(length).await?;
    stream.write_all(&query.message).await?;
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn answer(answers: &Answers, number: u64, message: Vec<u8>) {
    // The guest may be gone.
    let _ = answers.send(NamesRequest { servers: Vec::new(), number, message }).await;
}

fn set_id(message: &mut [u8], id: u16) {
    if let Some(place) = message.first_chunk_mut() {
        *place = id.to_be_bytes();
    }
}

/// Makes a query an answer that says that the server failed, RFC 1035 §4.1.1. The answer is empty
/// if the message is too short for a query.
fn failure(mut query: Vec<u8>) -> Vec<u8> {
    const IS_ANSWER: u8 = 0x80;
    const SERVER_FAILURE: u8 = 2;
    match query.get_mut(2..HEADER_BYTES) {
        Some([flags, code, ..]) => {
            *flags |= IS_ANSWER;
            *code = *code & 0xf0 | SERVER_FAILURE;
            query
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_a_loopback_are_found_and_the_containers_own_is_not() {
        let text = "search x\n# nameserver 127.0.0.3\nnameserver 127.0.0.11\nnameserver 10.0.0.1\n\
                    nameserver 127.0.0.1\nnameserver ::1\nnameserver\noptions ndots:0";
        assert_eq!(servers(text), [Ipv4Addr::new(127, 0, 0, 11)]);
        assert_eq!(servers(""), [] as [Ipv4Addr; 0]);
    }

    #[test]
    fn a_failure_answers_the_question_that_was_asked() {
        let query = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'x', 0, 0, 1, 0, 1];
        let answer = failure(query.to_vec());
        assert_eq!(answer[..4], [0x12, 0x34, 0x81, 2]);
        assert_eq!(answer[4..], query[4..]);
        assert!(failure(vec![1, 2, 3]).is_empty());
    }
}
