//! `attach.sock`: where the process that stands for a container gets the container's streams.
//!
//! The stand-in connects and says which streams it has ([`FromStandIn::Attach`]). Once the container
//! is created it receives them as connected sockets ([`ToStandIn::Streams`]), so no byte passes
//! through the supervisor; and once the container has ended, its exit status. Its connection is its
//! life: when it closes before the end, the container is killed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::channel::Channel;
use crate::process::Process;

/// How long the caller may take to attach.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which standard streams there are; the others are `/dev/null`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wants {
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
    /// First.
    Attach(Wants),
    /// A signal that it was sent, for the container.
    Signal(u32),
}

/// What the supervisor says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToStandIn {
    /// The streams that were wanted ride along, in the order of [`Wants`].
    Streams,
    /// The container has ended; its streams end by themselves.
    Exited {
        /// As a shell shows it.
        status: u8,
        /// Why, if it did not end by itself.
        reason: Option<String>,
    },
}

/// A listening socket at `path`.
///
/// # Errors
/// When the path is taken.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket_socket()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 4)?;
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
    /// What it has.
    pub wants: Wants,
}

impl StandIn {
    /// Waits for the one stand-in of a container to connect and say what it has.
    ///
    /// # Errors
    /// When none does within a bounded time.
    pub async fn accept(listener: &Channel) -> io::Result<Self> {
        let accepted = async {
            let socket = listener.accept().await?;
            let process = Process::find(
                socket_peercred(&socket)?.pid.as_raw_nonzero().get().cast_unsigned(),
            )?;
            let channel = Channel::new(socket)?;
            match channel.receive_json().await? {
                Some(FromStandIn::Attach(wants)) => Ok(Self { channel, process, wants }),
                _ => Err(io::ErrorKind::InvalidData.into()),
            }
        };
        timeout(PATIENCE, accepted).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Hands it its streams.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn hand_over(&self, streams: &[UnixStream]) -> io::Result<()> {
        let descriptors: Vec<_> = streams.iter().map(AsFd::as_fd).collect();
        self.channel.send(&ToStandIn::Streams, &descriptors).await
    }

    /// Tells it that the container has ended.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn tell_exit(&self, status: u8, reason: Option<String>) -> io::Result<()> {
        self.channel.send(&ToStandIn::Exited { status, reason }, &[]).await
    }

    /// Waits for the next signal that it passes on; `None` when it is gone.
    pub async fn signal(&self) -> Option<u32> {
        match self.channel.receive_json().await {
            Ok(Some(FromStandIn::Signal(signal))) => Some(signal),
            // Whatever else it says, it is not the stand-in that it was.
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
        let hello =
            serde_json::to_vec(&FromStandIn::Attach(Wants { stdout: true, ..Wants::default() }));
        seqpacket::send(&client, &hello.unwrap(), &[]).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let stand_in = StandIn::accept(&Channel::new(listener).unwrap()).await.unwrap();
            assert_eq!(stand_in.process.pid, std::process::id());
            assert_eq!((stand_in.wants.stdin, stand_in.wants.stdout), (false, true));
            let (stream, _other) = UnixStream::pair().unwrap();
            stand_in.hand_over(&[stream]).await.unwrap();
            stand_in.tell_exit(7, None).await.unwrap();
            let message = seqpacket::receive(&client).unwrap().unwrap();
            assert_eq!(
                (message.bytes.as_slice(), message.descriptors.len()),
                (&b"\"streams\""[..], 1)
            );
            let message = seqpacket::receive(&client).unwrap().unwrap();
            let exited = ToStandIn::Exited { status: 7, reason: None };
            assert_eq!(serde_json::from_slice::<ToStandIn>(&message.bytes).unwrap(), exited);
            seqpacket::send(&client, br#"{"signal":15}"#, &[]).unwrap();
            assert_eq!(stand_in.signal().await, Some(15));
            drop(client);
            assert_eq!(stand_in.signal().await, None);
        });
    }
}
