//! Messages with descriptors over a SOCK_SEQPACKET socket, `unix(7)`.
//!
//! One packet is one message; the kernel keeps the boundaries and the order. A message that does
//! not fit the receiver's buffer, or brings more descriptors than it may, is an error, never a
//! message cut short.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};

/// The longest control message, in bytes.
pub const MESSAGE_MAX: usize = 64 << 10;
/// The most descriptors that one control message carries.
pub const DESCRIPTORS_MAX: usize = 64;

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What came with it, in the order in which it was sent; close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

/// Makes a connected pair, close-on-exec.
///
/// # Errors
/// When the process has no descriptors left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one message.
///
/// # Errors
/// `BrokenPipe` when the other side is gone; `InvalidInput` past [`DESCRIPTORS_MAX`].
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        let reason = format!("{} descriptors in one message", descriptors.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    debug_assert_eq!(sent, bytes.len(), "a packet is sent whole or not at all");
    Ok(())
}

/// Receives one message; `None` when the other side has closed.
///
/// # Errors
/// `InvalidData` for a message past [`MESSAGE_MAX`] or [`DESCRIPTORS_MAX`].
pub fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    let mut bytes = vec![0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message longer than allowed"));
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(received.bytes);
    Ok(Some(Message { bytes, descriptors }))
}
