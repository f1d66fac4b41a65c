//! SEQPACKET sockets for asynchronous tasks. Messages and descriptors are those of
//! [`bulkhead_vmm::seqpacket`].

// UNSAFETY: tokio takes a descriptor by number, and the caller has to promise that it stays the
// same.
#![expect(unsafe_code, reason = "AsyncFd::register has no safe form")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use bulkhead_vmm::control::{Call, Client, ClientError, FromMonitor};
use bulkhead_vmm::seqpacket::{self, Message};
use rustix::io::ioctl_fionbio;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A type whose descriptor stays open and unchanged as long as the value lives.
pub(crate) trait Steady: AsRawFd {}

impl Steady for OwnedFd {}

/// Lets a task wait on a descriptor.
///
/// # Errors
/// Outside of a runtime, or when the descriptor cannot be added to epoll.
pub(crate) fn watch<T: Steady>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `Steady` guarantees that the descriptor stays open and unchanged; each type that
    // implements it owns or borrows a descriptor that it never replaces.
    Ok(unsafe { AsyncFd::register(inner) }?)
}

/// A SEQPACKET socket that is registered with the runtime.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes over a connected or listening socket.
    ///
    /// # Errors
    /// Outside of a runtime, or when the descriptor cannot be added to epoll.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        ioctl_fionbio(&socket, true)?;
        Ok(Self(watch(socket)?))
    }

    /// Sends one message as JSON.
    ///
    /// # Errors
    /// When the other side is gone.
    pub async fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let json = serde_json::to_vec(message)?;
        self.0.async_io(Interest::WRITABLE, |fd| seqpacket::send(fd, &json, descriptors)).await
    }

    /// Waits for a message; returns `None` when the other side has closed.
    ///
    /// # Errors
    /// When the message is too long.
    pub async fn receive(&self) -> io::Result<Option<Message>> {
        let received = self.0.async_io(Interest::READABLE, |fd| seqpacket::receive(fd)).await;
        match received {
            // A peer that dies with unread messages resets the connection.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            other => other,
        }
    }

    /// Waits for a message and parses it as JSON; returns `None` when the other side has closed.
    ///
    /// # Errors
    /// When the message cannot be read.
    pub async fn receive_json<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let Some(message) = self.receive().await? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(&message.bytes)?))
    }

    /// Waits for the next connection of a listening socket.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        let accept =
            |fd: &OwnedFd| Ok(rustix::net::accept_with(fd, rustix::net::SocketFlags::CLOEXEC)?);
        self.0.async_io(Interest::READABLE, accept).await
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// The monitor's control socket, registered with the runtime.
#[derive(Debug)]
pub struct Control(AsyncFd<Socket>);

/// A client with the traits that [`AsyncFd`] needs.
#[derive(Debug)]
struct Socket(Client);

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

// A client never gives its socket away.
impl Steady for Socket {}

impl Control {
    /// Takes over the supervisor's end, over which the configuration has been sent already.
    ///
    /// # Errors
    /// Outside of a runtime, or when the descriptor cannot be added to epoll.
    pub fn new(client: Client) -> io::Result<Self> {
        ioctl_fionbio(&client, true)?;
        Ok(Self(watch(Socket(client))?))
    }

    /// Sends one call, and the descriptors that it names.
    ///
    /// # Errors
    /// When the monitor is gone, or has not read for so long that the socket is full.
    pub fn call(&self, call: &Call, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        self.0.get_ref().0.call(call, descriptors)
    }

    /// Waits for the next message of the monitor.
    ///
    /// # Errors
    /// [`ClientError::Gone`] at end of file.
    pub async fn receive(&self) -> Result<(FromMonitor, Vec<OwnedFd>), ClientError> {
        loop {
            let mut ready = self.0.readable().await?;
            match self.0.get_ref().0.receive() {
                Err(ClientError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                }
                other => return other,
            }
        }
    }
}
