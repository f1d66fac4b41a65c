//! A FIFO of the host. When a process opens the one that stands for it, the host opens its own in
//! the same direction, and bytes flow until the last writer has closed.
//!
//! Nobody tells of an open that waits for its other end. So the agent tries to be that end, again
//! and again: fifo(7) lets it open for writing only if somebody reads, and a read tells whether
//! somebody writes. There is one direction at a time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_protocol::agent::ConnectionWanted;
use bulkhead_relay::{Drained, FIFO_CHUNK, drain_fifo, feed_fifo, write_all};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::time::sleep;

use super::Host;

/// How often it is looked at whether somebody has opened it.
const LOOK: Duration = Duration::from_millis(50);

/// Who uses a FIFO.
enum User {
    /// Somebody reads.
    Reader(pipe::Sender),
    /// Somebody writes, and has written this.
    Writer(pipe::Receiver, Vec<u8>),
}

/// Serves a FIFO until it is ended. `busy` says whether bytes are to leave the guest.
pub(super) async fn serve(path: PathBuf, index: u32, host: Host, busy: Arc<AtomicBool>) {
    loop {
        if let Err(error) = serve_users(&path, index, &host, &busy).await {
            tracing::debug!(%error, "a FIFO of the host ended early");
        }
        busy.store(false, Ordering::Relaxed);
        sleep(LOOK).await;
    }
}

/// Serves whoever opens it, until something fails.
async fn serve_users(path: &Path, index: u32, host: &Host, busy: &AtomicBool) -> io::Result<()> {
    let wanted = |writes| ConnectionWanted { socket: index, writes, ..ConnectionWanted::default() };
    let (pipe, first) = match first_user(path).await {
        User::Reader(pipe) => {
            let stream = host.connect(wanted(false)).await?;
            feed_fifo(&stream, pipe).await?;
            drop(stream);
            feed_again(path, host, wanted(false)).await?
        }
        User::Writer(pipe, first) => (pipe, first),
    };
    busy.store(true, Ordering::Relaxed);
    let stream = drain(pipe, first, host, wanted(true)).await?;
    busy.store(false, Ordering::Relaxed);
    wait_for_end(&stream).await
}

/// Waits for whoever opens it.
async fn first_user(path: &Path) -> User {
    loop {
        if let Ok(pipe) = pipe::OpenOptions::new().open_sender(path) {
            return User::Reader(pipe);
        }
        if let Some((pipe, first)) = writer(path) {
            return User::Writer(pipe, first);
        }
        sleep(LOOK).await;
    }
}

/// Whether somebody writes, and what was written.
fn writer(path: &Path) -> Option<(pipe::Receiver, Vec<u8>)> {
    let pipe = pipe::OpenOptions::new().open_receiver(path).ok()?;
    let mut first = vec![0; FIFO_CHUNK];
    match rustix::io::read(&pipe, &mut first[..]) {
        Ok(0) => None,
        Ok(count) => {
            first.truncate(count);
            Some((pipe, first))
        }
        // There is a writer who has not written yet.
        Err(Errno::AGAIN) => Some((pipe, Vec::new())),
        Err(_) => None,
    }
}

/// After a reader has been served: serves readers whenever the host's writers write, until somebody
/// inside writes. The FIFO is not tried meanwhile: a reader would take that for a writer who has
/// nothing to say.
async fn feed_again(
    path: &Path,
    host: &Host,
    wanted: ConnectionWanted,
) -> io::Result<(pipe::Receiver, Vec<u8>)> {
    loop {
        let stream = host.connect(wanted.clone()).await?;
        loop {
            tokio::select! {
                ready = stream.readable() => break ready?,
                () = sleep(LOOK) => if let Some(found) = writer(path) { return Ok(found) },
            }
        }
        let pipe = loop {
            // Somebody will read: he did before.
            match pipe::OpenOptions::new().open_sender(path) {
                Ok(pipe) => break pipe,
                Err(_) => sleep(LOOK).await,
            }
        };
        feed_fifo(&stream, pipe).await?;
    }
}

/// Passes to the host what is written, until the last writer has closed. The host has not passed it
/// on yet then.
async fn drain(
    pipe: pipe::Receiver,
    first: Vec<u8>,
    host: &Host,
    wanted: ConnectionWanted,
) -> io::Result<UnixStream> {
    let stream = host.connect(wanted).await?;
    write_all(&stream, &first).await?;
    if drain_fifo(&pipe, &stream).await? == Drained::Unread {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    shutdown(&stream, Shutdown::Write)?;
    Ok(stream)
}

/// Waits until the host has passed everything on.
async fn wait_for_end(stream: &UnixStream) -> io::Result<()> {
    stream.readable().await
}
