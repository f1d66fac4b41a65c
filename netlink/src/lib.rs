//! Requests of rtnetlink(7): one at a time, each with its answer.
//!
//! The supervisor uses it to read a network namespace of the host, the agent to make the guest's
//! the same; messages pass between them in the kernel's own form ([`encode`], [`decode`]). The
//! agent also needs rules of nf_tables ([`nat`]).

mod changes;
pub mod nat;

use std::fmt;
use std::io;

pub use changes::Changes;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
pub use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
pub use netlink_packet_route as route;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// How often a listing is requested again that changes while it is made.
const ATTEMPTS: usize = 5;

/// A connection to the kernel, about the network namespace that the thread was in when it opened
/// this.
pub struct Connection {
    socket: Socket,
    sequence: u32,
}

type Answer = NetlinkMessage<RouteNetlinkMessage>;

impl Connection {
    /// About the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Makes the kernel check the fields of a request, and list only what they ask for.
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Lists what a request asks for.
    ///
    /// # Errors
    /// Those of the kernel, and one when the listing changes each time.
    pub fn list(&mut self, request: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..ATTEMPTS {
            self.send(request.clone(), NLM_F_DUMP)?;
            let (mut listed, mut changed) = (Vec::new(), false);
            loop {
                let (answers, done) = self.receive()?;
                for answer in answers {
                    changed |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                    if let NetlinkPayload::InnerMessage(message) = answer.payload {
                        listed.push(message);
                    }
                }
                if done {
                    break;
                }
            }
            if !changed {
                return Ok(listed);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "it changes all the time"))
    }

    /// Requests a change; `flags` are those of netlink(7).
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn change(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(request, flags | NLM_F_ACK)?;
        while !self.receive()?.1 {}
        Ok(())
    }

    /// Sets attributes of the interface with this number; `up` brings it up or down.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn set_link(
        &mut self,
        number: u32,
        up: Option<bool>,
        attributes: Vec<LinkAttribute>,
    ) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = number;
        if let Some(up) = up {
            link.header.flags.set(LinkFlags::Up, up);
            link.header.change_mask = LinkFlags::Up;
        }
        link.attributes = attributes;
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    fn send(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags | NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        let bytes = bytes(header, request);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// One datagram of the answer to the last request, and whether it was the last.
    fn receive(&mut self) -> io::Result<(Vec<Answer>, bool)> {
        let (datagram, _) = self.socket.recv_from_full()?;
        let (mut answers, mut rest) = (Vec::new(), datagram.as_slice());
        while !rest.is_empty() {
            let answer = parse(rest)?;
            // In a datagram each message begins at a multiple of 4, netlink(7).
            let length = (answer.header.length as usize).next_multiple_of(4);
            rest = rest.get(length.max(4)..).unwrap_or_default();
            if answer.header.sequence_number != self.sequence {
                continue;
            }
            match answer.payload {
                NetlinkPayload::Done(_) => return Ok((answers, true)),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Error(_) => return Ok((answers, true)),
                _ => answers.push(answer),
            }
        }
        Ok((answers, false))
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("sequence", &self.sequence).finish()
    }
}

/// A message in the kernel's own form.
#[must_use]
pub fn encode(message: RouteNetlinkMessage) -> Vec<u8> {
    bytes(NetlinkHeader::default(), message)
}

/// The message that [`encode`] has made these bytes of.
///
/// # Errors
/// When they are no such message.
pub fn decode(bytes: &[u8]) -> io::Result<RouteNetlinkMessage> {
    match parse(bytes)?.payload {
        NetlinkPayload::InnerMessage(message) => Ok(message),
        _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
    }
}

fn bytes(header: NetlinkHeader, message: RouteNetlinkMessage) -> Vec<u8> {
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn parse(bytes: &[u8]) -> io::Result<Answer> {
    NetlinkMessage::deserialize(bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use route::route::{RouteMessage, RouteType};

    #[test]
    fn interfaces_of_this_namespace_are_listed() {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let listed = Connection::open().unwrap().list(&request).unwrap();
        let is_loopback = |message: &RouteNetlinkMessage| {
            let RouteNetlinkMessage::NewLink(link) = message else { return false };
            link.attributes.contains(&LinkAttribute::IfName("lo".to_owned()))
        };
        assert!(listed.iter().any(is_loopback), "{listed:?}");
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let mut connection = Connection::open().unwrap();
        let error = connection.set_link(0x7fff_fff0, None, Vec::new()).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
        // The connection goes on.
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        assert!(!connection.list(&request).unwrap().is_empty());
    }

    #[test]
    fn a_message_is_the_same_on_the_other_side() {
        let mut message = RouteMessage::default();
        message.header.kind = RouteType::BlackHole;
        let message = RouteNetlinkMessage::NewRoute(message);
        assert_eq!(decode(&encode(message.clone())).unwrap(), message);
        assert!(decode(&[1, 2, 3]).is_err());
    }
}
