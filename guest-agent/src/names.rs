//! Name servers that a caller runs on the loopback of the container's network namespace on the
//! host, as Docker does for its networks. The guest has a loopback of its own. The agent takes the
//! queries that are sent to such a server there, and asks the host ([RFC 1035] §4.2).
//!
//! As on the host, port 53 itself stays free for servers of the container: packets to it are
//! redirected to other ports, by rules of the packet filter.
//!
//! [RFC 1035]: https://www.rfc-editor.org/rfc/rfc1035

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_netlink::nat::{self, Protocol, Redirection};
use bulkhead_protocol::agent::{NameQuery, NamesRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Status, Streaming};

/// The port on which name servers are asked.
const PORT: u16 = 53;
/// The most servers that resolv.conf(5) may name.
const SERVERS_MAX: usize = 3;
/// The most queries that wait for an answer; further ones are dropped, and sent again by their
/// clients.
const WAITING_MAX: usize = 256;
/// The most connections at once.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);
/// The most bytes of a datagram.
const DATAGRAM_MAX: usize = 64 << 10;

/// A server: its sockets in this guest.
struct Server {
    address: Ipv4Addr,
    datagrams: Arc<UdpSocket>,
    connections: TcpListener,
}

/// The tasks that wait for an answer, by the number of their query.
#[derive(Default)]
struct Waiting {
    last: u64,
    askers: HashMap<u64, oneshot::Sender<Vec<u8>>>,
}

/// Asks the host.
#[derive(Clone)]
struct Host {
    queries: mpsc::Sender<Result<NameQuery, Status>>,
    waiting: Arc<Mutex<Waiting>>,
}

/// The tasks that stand in for the servers; dropping this ends them.
pub(crate) struct Names(#[expect(dead_code, reason = "only to be dropped")] JoinSet<()>);

impl Names {
    /// Stands in for servers. Sends queries to `queries`, and the answers from `answers` to the
    /// clients.
    ///
    /// # Errors
    /// When an address is not a loopback address, or the kernel has no sockets or rules for it.
    pub(crate) async fn serve(
        servers: &[u32],
        answers: Streaming<NamesRequest>,
        queries: mpsc::Sender<Result<NameQuery, Status>>,
    ) -> io::Result<Self> {
        let addresses: Vec<_> = servers.iter().map(|it| Ipv4Addr::from_bits(*it)).collect();
        let good = (1..=SERVERS_MAX).contains(&addresses.len())
            && addresses.iter().all(Ipv4Addr::is_loopback);
        if !good {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{addresses:?}")));
        }
        let host = Host { queries, waiting: Arc::default() };
        let (mut tasks, mut rules) = (JoinSet::new(), Vec::new());
        for address in addresses {
            let server = Server::open(address).await?;
            rules.extend(server.rules()?);
            tasks.spawn(serve_datagrams(address, server.datagrams, host.clone()));
            tasks.spawn(serve_connections(address, server.connections, host.clone()));
        }
        nat::redirect(&rules)?;
        tasks.spawn(hand_out(answers, host.waiting));
        Ok(Self(tasks))
    }
}

impl Server {
    async fn open(address: Ipv4Addr) -> io::Result<Self> {
        let datagrams = Arc::new(UdpSocket::bind((address, 0)).await?);
        Ok(Self { address, datagrams, connections: TcpListener::bind((address, 0)).await? })
    }

    fn rules(&self) -> io::Result<[Redirection; 2]> {
        let to = SocketAddrV4::new(self.address, PORT);
        let (udp, tcp) =
            (self.datagrams.local_addr()?.port(), self.connections.local_addr()?.port());
        Ok([(Protocol::Udp, udp), (Protocol::Tcp, tcp)].map(|(protocol, port)| Redirection {
            protocol,
            to,
            port,
        }))
    }
}

impl Host {
    /// The answer of a server, empty if there is none.
    async fn ask(&self, server: Ipv4Addr, stream: bool, message: Vec<u8>) -> Vec<u8> {
        let (tell, answer) = oneshot::channel();
        let number = {
            let mut waiting = self.waiting();
            if waiting.askers.len() >= WAITING_MAX {
                return Vec::new();
            }
            waiting.last += 1;
            let number = waiting.last;
            waiting.askers.insert(number, tell);
            number
        };
        let query = NameQuery { number, server: server.to_bits(), stream, message };
        if self.queries.send(Ok(query)).await.is_err() {
            self.waiting().askers.remove(&number);
        }
        answer.await.unwrap_or_default()
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes the host's answers to the tasks that wait for them.
async fn hand_out(mut answers: Streaming<NamesRequest>, waiting: Arc<Mutex<Waiting>>) {
    while let Ok(Some(NamesRequest { number, message, .. })) = answers.message().await {
        let asker = waiting.lock().unwrap_or_else(PoisonError::into_inner).askers.remove(&number);
        // The task may have ended.
        let _ = asker.map(|asker| asker.send(message));
    }
}

async fn serve_datagrams(server: Ipv4Addr, socket: Arc<UdpSocket>, host: Host) {
    let mut buffer = vec![0; DATAGRAM_MAX];
    let mut answering = JoinSet::new();
    loop {
        // An error is about an earlier answer, which did not reach its client.
        let Ok((length, asker)) = socket.recv_from(&mut buffer).await else { continue };
        while answering.try_join_next().is_some() {}
        if answering.len() < WAITING_MAX {
            let message = buffer.get(..length).unwrap_or_default().to_vec();
            answering.spawn(answer(server, socket.clone(), asker, host.clone(), message));
        }
    }
}

async fn answer(
    server: Ipv4Addr,
    socket: Arc<UdpSocket>,
    asker: SocketAddr,
    host: Host,
    message: Vec<u8>,
) {
    let answer = host.ask(server, false, message).await;
    if !answer.is_empty() {
        // As with any datagram: it may not arrive.
        let _ = socket.send_to(&answer, asker).await;
    }
}

async fn serve_connections(server: Ipv4Addr, listener: TcpListener, host: Host) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(place) = room.clone().acquire_owned().await {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((connection, _)) => {
                let host = host.clone();
                connections.spawn(async move {
                    // With or without an error, the connection is over.
                    let _ = converse(server, connection, host).await;
                    drop(place);
                });
            }
            // The connection went away before it was accepted, or there is no memory.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Serves one connection: each message has its length before it.
async fn converse(server: Ipv4Addr, mut connection: TcpStream, host: Host) -> io::Result<()> {
    loop {
        let length = timeout(SILENCE, connection.read_u16()).await??;
        let mut message = vec![0; length.into()];
        timeout(SILENCE, connection.read_exact(&mut message)).await??;
        let answer = host.ask(server, true, message).await;
        let Ok(length @ 1..) = u16::try_from(answer.len()) else { return Ok(()) };
        connection.write_u16(length).await?;
        connection.write_all(&answer).await?;
    }
}
