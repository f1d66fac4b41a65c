//! `attach.sock`: where a stand-in, which stands for a process of the container, gets its streams.
//!
//! The stand-in connects and says for which process it stands and which streams it has
//! ([`FromStandIn::Attach`]). Once the process is created, the stand-in receives its streams as
//! connected sockets ([`ToStandIn::Streams`]), so that no byte passes through the supervisor. Once
//! the process has ended, it receives the exit status. If the connection closes before that, the
//! process is killed.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::machine::channel::Channel;
use crate::state::process::Process;
use crate::streams::preserved::Descriptor;

/// How long the caller may take to attach.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may take to say what it is.
const GREETING: Duration = Duration::from_secs(2);
/// The most stand-ins that wait to be taken, and the most connections that have said nothing yet.
const WAITING: usize = 256;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in each.
    pub columns: u16,
}

/// Which standard streams there are; the others are `/dev/null`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wants {
    /// All three are one terminal, whose stream carries both directions; the fields of the three
    /// are ignored then.
    pub terminal: Option<TerminalSize>,
    /// The terminal's output goes to something that is no terminal, such as a pipe or a file.
    pub plain: bool,
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}

/// What the stand-in says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromStandIn {
    /// The first message.
    Attach {
        /// Its streams.
        wants: Wants,
        /// The process executed in the container that it stands for; empty for the init process.
        exec: String,
        /// It was started to stay behind; otherwise it is the caller's own process.
        detached: bool,
        /// Its further descriptors. The message carries the files among them, each as a mount of
        /// its own.
        descriptors: Vec<Descriptor>,
    },
    /// All later messages.
    #[serde(untagged)]
    Said(Said),
}

/// What a stand-in says once it has attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// A signal that was sent to it, for the process.
    Signal(u32),
    /// Its terminal has a new size.
    Resize(TerminalSize),
}

/// What the supervisor says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToStandIn {
    /// The message carries the streams that were wanted, in the order of [`Wants`], followed by
    /// those of the descriptors.
    Streams,
    /// The process has ended.
    Exited {
        /// As a shell shows it.
        status: u8,
        /// Why, if it did not end by itself.
        reason: Option<String>,
        /// How much its streams carry; `None` if the machine is gone, with all others that had
        /// them.
        written: Option<Written>,
    },
}

/// How many bytes were written to standard output and standard error before a process ended, by it
/// or by others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Standard output.
    pub stdout: u64,
    /// Standard error.
    pub stderr: u64,
}

/// A listening socket at `path`.
///
/// # Errors
/// When the path is taken.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket_socket()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A connection to the socket at `path`.
///
/// # Errors
/// When nobody listens there.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn seqpacket_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// The stand-in, from the supervisor's side.
#[derive(Debug)]
pub struct StandIn {
    channel: Channel,
    /// The process.
    pub process: Process,
    /// Its standard streams.
    pub wants: Wants,
    /// Its further descriptors.
    pub descriptors: Vec<Descriptor>,
    /// It belongs to the pod, not to a caller.
    pub detached: bool,
    /// The files among its descriptors.
    mounts: Mutex<Vec<OwnedFd>>,
}

/// Where stand-ins connect. Each is kept until [`Attachments::take`] asks for its process.
#[derive(Debug)]
pub struct Attachments {
    waiting: Arc<Waiting>,
    accepting: AbortHandle,
}

/// Stand-ins that have attached and were not taken yet.
#[derive(Debug, Default)]
struct Waiting {
    stand_ins: Mutex<HashMap<String, StandIn>>,
    /// Notified whenever a stand-in has attached.
    bell: Notify,
}

impl Attachments {
    /// Accepts stand-ins that connect to `listener`. To be called inside a runtime.
    #[must_use]
    pub fn new(listener: Channel) -> Self {
        let waiting = Arc::<Waiting>::default();
        let accepting = tokio::spawn(accept_all(listener, waiting.clone())).abort_handle();
        Self { waiting, accepting }
    }

    /// Waits for the stand-in of a process; `exec` is as in [`FromStandIn::Attach`].
    ///
    /// # Errors
    /// When it does not connect within a bounded time.
    pub async fn take(&self, exec: &str) -> io::Result<StandIn> {
        let taken = async {
            loop {
                // Before the lookup, so that no arrival is missed.
                let mut rung = pin!(self.waiting.bell.notified());
                rung.as_mut().enable();
                if let Some(stand_in) = self.waiting.stand_ins.lock().await.remove(exec) {
                    return stand_in;
                }
                rung.await;
            }
        };
        timeout(PATIENCE, taken).await.map_err(|_| io::ErrorKind::TimedOut.into())
    }
}

impl Drop for Attachments {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Reads the first message of each connection in a task of its own, so that none delays another.
async fn accept_all(listener: Channel, waiting: Arc<Waiting>) {
    let room = Arc::new(Semaphore::new(WAITING));
    // The semaphore is never closed.
    while let Ok(place) = room.clone().acquire_owned().await {
        match listener.accept().await {
            Ok(socket) => {
                let waiting = waiting.clone();
                tokio::spawn(async move {
                    match timeout(GREETING, StandIn::greet(socket)).await {
                        Ok(Ok((name, stand_in))) => waiting.add(name, stand_in).await,
                        _ => tracing::debug!("a connection that says nothing was closed"),
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(error = %error, "cannot accept a stand-in");
                sleep(GREETING).await;
            }
        }
    }
}

impl Waiting {
    async fn add(&self, name: String, stand_in: StandIn) {
        let mut stand_ins = self.stand_ins.lock().await;
        // Nobody will ask for a stand-in that has died.
        stand_ins.retain(|_, stand_in| stand_in.process.is_alive());
        if stand_ins.len() < WAITING {
            stand_ins.insert(name, stand_in);
        }
        self.bell.notify_waiters();
    }
}

impl StandIn {
    /// Reads which process a connection stands for.
    async fn greet(socket: OwnedFd) -> io::Result<(String, Self)> {
        let peer = socket_peercred(&socket)?.pid.as_raw_nonzero().get().cast_unsigned();
        let process = Process::find(peer)?;
        let channel = Channel::new(socket)?;
        let message = channel.receive().await?.ok_or(io::ErrorKind::InvalidData)?;
        match serde_json::from_slice(&message.bytes)? {
            FromStandIn::Attach { wants, exec, detached, descriptors } => {
                let mounts = Mutex::new(message.descriptors);
                Ok((exec, Self { channel, process, wants, descriptors, detached, mounts }))
            }
            FromStandIn::Said(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The files among its descriptors, each as a mount of its own; they can be taken once.
    pub async fn take_mounts(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.mounts.lock().await)
    }

    /// Hands it its streams.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn hand_over(&self, streams: &[UnixStream]) -> io::Result<()> {
        let descriptors: Vec<_> = streams.iter().map(AsFd::as_fd).collect();
        self.channel.send(&ToStandIn::Streams, &descriptors).await
    }

    /// Tells it that the process has ended.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn tell_exit(
        &self,
        status: u8,
        reason: Option<String>,
        written: Option<Written>,
    ) -> io::Result<()> {
        self.channel.send(&ToStandIn::Exited { status, reason, written }, &[]).await
    }

    /// Waits for the next thing that it passes on; `None` when it is gone.
    pub async fn said(&self) -> Option<Said> {
        match self.channel.receive_json().await {
            Ok(Some(FromStandIn::Said(said))) => Some(said),
            // Any other message is an error, and ends the connection.
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_vmm::seqpacket;
    use tokio::runtime::Builder;

    #[test]
    fn a_stand_in_attaches_gets_streams_and_the_status() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attach.sock");
        let listener = listen_at(&path).unwrap();
        let client = connect_to(&path).unwrap();
        let silent = connect_to(&path).unwrap();
        let other = connect_to(&path).unwrap();
        let greet = |client: &OwnedFd, exec: &str| {
            let wants = Wants { stdout: true, ..Wants::default() };
            let exec = exec.to_owned();
            let hello = FromStandIn::Attach { wants, exec, detached: false, descriptors: vec![] };
            seqpacket::send(client, &serde_json::to_vec(&hello).unwrap(), &[]).unwrap();
        };
        greet(&other, "other");
        drop(silent);
        greet(&client, "");
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let attachments = Attachments::new(Channel::new(listener).unwrap());
            let first = attachments.take("other").await.unwrap();
            let stand_in = attachments.take("").await.unwrap();
            let written = Written { stdout: 5, stderr: 0 };
            first.tell_exit(1, None, None).await.unwrap();
            assert!(seqpacket::receive(&other).unwrap().is_some());
            assert_eq!(stand_in.process.pid, std::process::id());
            assert_eq!((stand_in.wants.stdin, stand_in.wants.stdout), (false, true));
            let (stream, _other) = UnixStream::pair().unwrap();
            stand_in.hand_over(&[stream]).await.unwrap();
            stand_in.tell_exit(7, None, Some(written)).await.unwrap();
            let message = seqpacket::receive(&client).unwrap().unwrap();
            assert_eq!(
                (message.bytes.as_slice(), message.descriptors.len()),
                (&b"\"streams\""[..], 1)
            );
            let message = seqpacket::receive(&client).unwrap().unwrap();
            let exited = ToStandIn::Exited { status: 7, reason: None, written: Some(written) };
            assert_eq!(serde_json::from_slice::<ToStandIn>(&message.bytes).unwrap(), exited);
            seqpacket::send(&client, br#"{"signal":15}"#, &[]).unwrap();
            assert_eq!(stand_in.said().await, Some(Said::Signal(15)));
            drop(client);
            assert_eq!(stand_in.said().await, None);
        });
    }

    #[test]
    fn one_that_never_attaches_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attach.sock");
        let listener = listen_at(&path).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let attachments = Attachments::new(Channel::new(listener).unwrap());
            let begin = std::time::Instant::now();
            let other = async {
                sleep(Duration::from_millis(50)).await;
                let client = connect_to(&path).unwrap();
                let (wants, exec) = (Wants::default(), "other".to_owned());
                let hello =
                    FromStandIn::Attach { wants, exec, detached: false, descriptors: vec![] };
                seqpacket::send(&client, &serde_json::to_vec(&hello).unwrap(), &[]).unwrap();
                attachments.take("other").await.unwrap();
                begin.elapsed()
            };
            let never = async { attachments.take("never").await.unwrap_err() };
            let (error, took) = tokio::join!(never, other);
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(took < PATIENCE / 2, "{took:?}");
        });
    }
}
