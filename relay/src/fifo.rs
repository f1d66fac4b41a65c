//! Copies between a FIFO, which is open on this side, and the stream that carries its bytes.

use std::io;

use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use crate::write_all;

/// The most bytes that are moved at once: what a pipe holds.
pub const FIFO_CHUNK: usize = 64 << 10;

/// Why a FIFO is not read any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Its last writer has closed it.
    WrittenOut,
    /// The other side has closed the stream: nobody reads there.
    Unread,
}

/// Passes what comes from the stream to those who read the FIFO, until the stream ends, or nobody
/// reads any more.
///
/// # Errors
/// The stream or the FIFO fails.
pub async fn feed_fifo(stream: &UnixStream, mut pipe: pipe::Sender) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(FIFO_CHUNK);
    loop {
        tokio::select! {
            ready = stream.readable() => ready?,
            // Its readers are gone.
            _ = pipe.ready(Interest::ERROR) => return Ok(()),
        }
        buffer.clear();
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => pipe.write_all(&buffer).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Passes what is written to the FIFO to the stream. The other side never sends anything, so a
/// stream with something to read is closed.
///
/// # Errors
/// The stream or the FIFO fails.
pub async fn drain_fifo(pipe: &pipe::Receiver, stream: &UnixStream) -> io::Result<Drained> {
    let mut buffer = Vec::with_capacity(FIFO_CHUNK);
    loop {
        tokio::select! {
            ready = pipe.readable() => ready?,
            _ = stream.readable() => return Ok(Drained::Unread),
        }
        buffer.clear();
        match pipe.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(Drained::WrittenOut),
            Ok(_) => write_all(stream, &buffer).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
