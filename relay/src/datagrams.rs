//! Datagrams of Unix sockets, each with who has sent it. Both are one frame of a stream.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, UCred, recv, recvmsg};

use crate::{FRAME_MAX, User};

/// What a frame has before the datagram: the sender's user and group.
const SENDER_BYTES: usize = 8;

/// Takes the next datagram of a socket with `SO_PASSCRED`, as a frame, without waiting; `None` when
/// no more will come. One that is longer than Linux lets through by default is cut. Descriptors that
/// come with it are closed.
///
/// # Errors
/// There is none now, or the socket fails.
pub fn receive_datagram(socket: impl AsFd) -> io::Result<Option<Vec<u8>>> {
    let peek = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
    let (_, length) = recv(&socket, &mut [0; 1][..], peek)?;
    let mut frame = vec![0; SENDER_BYTES + length.min(FRAME_MAX - SENDER_BYTES)];
    let (sender, datagram) = frame.split_at_mut(SENDER_BYTES);
    // The end has no sender; an empty datagram does.
    let Some(UCred { uid, gid, .. }) = receive(socket, datagram)? else { return Ok(None) };
    sender.copy_from_slice(&[uid.as_raw(), gid.as_raw()].map(u32::to_be_bytes).concat());
    Ok(Some(frame))
}

/// The sender of a frame, and the datagram; `None` if it is too short.
#[must_use]
pub fn parse_datagram(frame: &[u8]) -> Option<(User, &[u8])> {
    let (uid, rest) = frame.split_first_chunk()?;
    let (gid, datagram) = rest.split_first_chunk()?;
    let [uid, gid] = [*uid, *gid].map(u32::from_be_bytes);
    Some((User { uid, gid, groups: Vec::new() }, datagram))
}

fn receive(socket: impl AsFd, datagram: &mut [u8]) -> io::Result<Option<UCred>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(datagram)];
    recvmsg(socket, &mut parts, &mut control, RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC)?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(sender) => Some(sender),
        _ => None,
    }))
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::set_socket_passcred;
    use rustix::net::{
        AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, send, shutdown, socketpair,
    };
    use rustix::process::{getgid, getuid};

    use super::*;

    #[test]
    fn datagrams_have_a_sender_and_the_end_has_none() {
        let (to, from) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        set_socket_passcred(&to, true).unwrap();
        let error = receive_datagram(&to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        for datagram in [b"one".as_slice(), b""] {
            send(&from, datagram, SendFlags::empty()).unwrap();
            let frame = receive_datagram(&to).unwrap().unwrap();
            let (User { uid, gid, groups }, taken) = parse_datagram(&frame).unwrap();
            assert_eq!((uid, gid), (getuid().as_raw(), getgid().as_raw()));
            assert!(groups.is_empty());
            assert_eq!(taken, datagram);
        }
        shutdown(&from, Shutdown::Both).unwrap();
        assert_eq!(receive_datagram(&to).unwrap(), None);
    }

    #[test]
    fn a_frame_without_a_whole_sender_is_none() {
        assert_eq!(parse_datagram(&[0; SENDER_BYTES - 1]), None);
        let sender = User { uid: 1, gid: 2, groups: Vec::new() };
        assert_eq!(parse_datagram(&[0, 0, 0, 1, 0, 0, 0, 2, 3]), Some((sender, &[3][..])));
    }
}
