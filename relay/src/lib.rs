//! Copies between a Unix socket and the stream that carries its bytes between host and guest. Both
//! sides run the same code: there is a socket on each, and the stream in between.
//!
//! Each direction ends by itself, and passes on its end. When one side closes its socket as a whole,
//! the other side's is closed too, which a program can tell from the end of one direction. A socket
//! that keeps packets apart has each of them in a frame of the stream.
//!
//! Nothing is read before the last bytes are written, so that a reader that does not read blocks its
//! writer, and a relay holds a bounded amount of memory.

mod datagrams;
mod ends;
mod fifo;
mod frames;
mod peer;
mod user;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, UCred, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

pub use datagrams::{parse_datagram, receive_datagram};
pub use ends::is_hung_up;
pub use fifo::{Drained, FIFO_CHUNK, drain_fifo, feed_fifo};
pub use frames::{FRAME_MAX, read_frame, write_all, write_frame};
pub use peer::Peer;
pub use user::User;

/// The most bytes that one step of a copy moves. Each direction of a relay keeps so many.
const CHUNK: usize = 16 << 10;

/// What a socket carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A stream of bytes.
    Bytes,
    /// Packets of at most [`FRAME_MAX`] bytes (`SOCK_SEQPACKET`).
    Packets,
}

/// Copies both ways until both directions have ended, or one side is closed as a whole.
///
/// `socket` may be of another type than a stream; it is only read and written. What is written to it
/// comes from `sender`, if there is one: its other side may ask for that (`SO_PASSCRED`), and this
/// process must have the right to name another.
pub async fn relay(
    content: Content,
    socket: UnixStream,
    stream: UnixStream,
    sender: Option<UCred>,
) {
    let outward = async {
        let copied = copy_out(content, &socket, &stream).await;
        ends::pass_on(copied, &socket, &stream, is_hung_up(&socket))
    };
    let inward = async {
        let copied = copy_in(content, &stream, (&socket, sender)).await;
        ends::pass_on(copied, &stream, &socket, ends::is_closed(&stream))
    };
    tokio::pin!(outward, inward);
    let (mut all_out, mut all_in) = (false, false);
    while !(all_out && all_in) {
        let closed = tokio::select! {
            closed = &mut outward, if !all_out => {
                all_out = true;
                closed
            }
            closed = &mut inward, if !all_in => {
                all_in = true;
                closed
            }
            () = ends::hang_up(&socket), if all_out => true,
            () = ends::hang_up(&stream), if all_in => true,
        };
        if closed {
            return;
        }
    }
}

async fn copy_out(content: Content, socket: &UnixStream, stream: &UnixStream) -> io::Result<()> {
    match content {
        Content::Bytes => copy_bytes(socket, stream).await,
        Content::Packets => {
            while let Some(packet) = receive_packet(socket).await? {
                write_frame(stream, &packet).await?;
            }
            Ok(())
        }
    }
}

async fn copy_in(
    content: Content,
    stream: &UnixStream,
    (socket, sender): (&UnixStream, Option<UCred>),
) -> io::Result<()> {
    if content == Content::Packets {
        while let Some(packet) = read_frame(stream, FRAME_MAX).await? {
            send_from(sender, socket, &packet).await?;
        }
        return Ok(());
    }
    let mut buffer = Vec::new();
    while read_some(stream, &mut buffer).await? {
        let mut rest = &*buffer;
        while !rest.is_empty() {
            let count = send_from(sender, socket, rest).await?;
            rest = rest.get(count..).unwrap_or_default();
        }
    }
    Ok(())
}

async fn copy_bytes(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    let mut buffer = Vec::new();
    while read_some(from, &mut buffer).await? {
        write_all(to, &buffer).await?;
    }
    Ok(())
}

/// Fills the buffer with the next bytes; returns whether there were any before the end.
async fn read_some(from: &UnixStream, buffer: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        from.readable().await?;
        buffer.clear();
        // Not before there is something to read: most connections are silent.
        buffer.reserve(CHUNK);
        match from.try_read_buf(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return Ok(read? > 0),
        }
    }
}

/// The next packet; `None` at the end. An empty packet cannot be told from the end.
async fn receive_packet(socket: &UnixStream) -> io::Result<Option<Vec<u8>>> {
    let received = socket.async_io(Interest::READABLE, || {
        let peek = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (_, length) = rustix::net::recv(socket, &mut [0; 1][..], peek)?;
        if length > FRAME_MAX {
            return Err(frames::too_long(length));
        }
        let mut packet = vec![0; length];
        // Nobody else reads from this socket, so this is the packet that was seen.
        rustix::net::recv(socket, &mut packet[..], RecvFlags::DONTWAIT)?;
        Ok(packet)
    });
    Ok(Some(received.await?).filter(|packet| !packet.is_empty()))
}

/// Sends a packet, or some of the bytes of a stream; returns how many.
async fn send_from(sender: Option<UCred>, socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    socket.async_io(Interest::WRITABLE, || send_now(sender, socket, bytes)).await
}

/// Sends without waiting, as from `sender` if there is one.
///
/// # Errors
/// The other side is closed or has no room, or this process may not name that sender.
pub fn send_now(sender: Option<UCred>, socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(sender) = sender {
        control.push(SendAncillaryMessage::ScmCredentials(sender));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}

#[cfg(test)]
mod tests;
