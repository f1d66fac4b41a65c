//! Datagrams to a socket of the host: each goes over one stream, with the user that the kernel says
//! has sent it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_protocol::agent::ConnectionWanted;
use bulkhead_relay::{receive_datagram, write_frame};
use rustix::io::ioctl_fionread;
use tokio::io::Interest;
use tokio::net::{UnixDatagram, UnixStream};
use tokio::time::sleep;

use super::Host;

/// How long nothing is passed on after a failure.
const PAUSE: Duration = Duration::from_millis(10);

/// A socket, and whether a datagram of it is being passed on. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    socket: Arc<UnixDatagram>,
    busy: Arc<AtomicBool>,
}

impl Queue {
    pub(super) fn of(socket: Arc<UnixDatagram>) -> Self {
        Self { socket, busy: Arc::default() }
    }

    /// Whether all that was sent to it has been passed on.
    pub(super) fn is_empty(&self) -> bool {
        // The agent has one thread for all tasks: a datagram waits, or `busy` is set.
        !self.busy.load(Ordering::Relaxed) && ioctl_fionread(&*self.socket).is_ok_and(|it| it == 0)
    }
}

/// Passes datagrams on until it is ended.
pub(super) async fn forward(queue: Queue, index: u32, host: Host) {
    let mut stream = None;
    loop {
        let passed = match receive(&queue).await {
            Ok(frame) => pass_on(&frame, &mut stream, index, &host).await,
            Err(error) => Err(error),
        };
        if let Err(error) = passed {
            tracing::debug!(%error, "a datagram did not reach the host's socket");
            // There may be no descriptors or no memory left.
            sleep(PAUSE).await;
        }
        queue.busy.store(false, Ordering::Relaxed);
    }
}

/// Passes a datagram on. A stream that the host has closed meanwhile is replaced once.
async fn pass_on(
    frame: &[u8],
    stream: &mut Option<UnixStream>,
    index: u32,
    host: &Host,
) -> io::Result<()> {
    if let Some(open) = stream.as_ref()
        && write_frame(open, frame).await.is_ok()
    {
        return Ok(());
    }
    *stream = None;
    let wanted = ConnectionWanted { socket: index, ..ConnectionWanted::default() };
    let opened = stream.insert(host.connect(wanted).await?);
    write_frame(opened, frame).await
}

/// The next datagram, with its sender before it.
async fn receive(queue: &Queue) -> io::Result<Vec<u8>> {
    let socket = &*queue.socket;
    let received = socket.async_io(Interest::READABLE, || {
        let frame = receive_datagram(socket)?;
        queue.busy.store(true, Ordering::Relaxed);
        Ok(frame)
    });
    received.await?.ok_or_else(|| io::Error::other("a datagram without a sender"))
}
