//! Rules of nf_tables that redirect what local processes send to another port. The messages of
//! `linux/netfilter/nf_tables.h` are written by hand: the crates for rtnetlink do not have them.

use std::io;
use std::net::SocketAddrV4;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

/// The table, which only this module uses.
const TABLE: &[u8] = b"bulkhead\0";
const CHAIN: &[u8] = b"names\0";

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
const NFPROTO_IPV4: u8 = 2;
const NF_INET_LOCAL_OUT: u32 = 3;
/// Where destinations are changed, before packets are filtered.
const NF_IP_PRI_NAT_DST: i32 = -100;
const NFT_META_L4PROTO: u32 = 16;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const NFT_CMP_EQ: u32 = 0;
const NFT_NAT_DNAT: u32 = 1;
const NFT_REG_1: u32 = 1;
const NFT_REG_2: u32 = 2;

/// The protocols that have ports, as IP numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 6.
    Tcp = 6,
    /// 17.
    Udp = 17,
}

/// Sends packets to another port than the one that they are addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redirection {
    /// The protocol of the packets.
    pub protocol: Protocol,
    /// Their destination.
    pub to: SocketAddrV4,
    /// The port of that address that they go to instead.
    pub port: u16,
}

/// Redirects what processes of the calling thread's network namespace send. To be called once for a
/// namespace.
///
/// # Errors
/// Those of the kernel, which has changed nothing then.
pub fn redirect(redirections: &[Redirection]) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.add(NFT_MSG_NEWTABLE, NLM_F_CREATE, &attribute(1, TABLE));
    let hook = [number(1, NF_INET_LOCAL_OUT), number(2, NF_IP_PRI_NAT_DST.cast_unsigned())];
    let chain =
        [attribute(1, TABLE), attribute(3, CHAIN), nested(4, &hook), attribute(7, b"nat\0")];
    batch.add(NFT_MSG_NEWCHAIN, NLM_F_CREATE, &chain.concat());
    for redirection in redirections {
        let rule = [attribute(1, TABLE), attribute(2, CHAIN), nested(4, &expressions(redirection))];
        batch.add(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, &rule.concat());
    }
    batch.send()
}

/// What a packet has to match, and what happens to it.
fn expressions(redirection: &Redirection) -> [Vec<u8>; 9] {
    let Redirection { protocol, to, port } = redirection;
    [
        expression(b"meta\0", &[number(1, NFT_REG_1), number(2, NFT_META_L4PROTO)]),
        is(&[*protocol as u8]),
        load(NFT_PAYLOAD_NETWORK_HEADER, 16, 4),
        is(&to.ip().octets()),
        load(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2),
        is(&to.port().to_be_bytes()),
        immediate(NFT_REG_1, &to.ip().octets()),
        immediate(NFT_REG_2, &port.to_be_bytes()),
        expression(
            b"nat\0",
            &[
                number(1, NFT_NAT_DNAT),
                number(2, NFPROTO_IPV4.into()),
                number(3, NFT_REG_1),
                number(5, NFT_REG_2),
            ],
        ),
    ]
}

fn load(header: u32, offset: u32, length: u32) -> Vec<u8> {
    let place = [number(1, NFT_REG_1), number(2, header), number(3, offset), number(4, length)];
    expression(b"payload\0", &place)
}

fn is(value: &[u8]) -> Vec<u8> {
    let value = nested(3, &[attribute(1, value)]);
    expression(b"cmp\0", &[number(1, NFT_REG_1), number(2, NFT_CMP_EQ), value])
}

fn immediate(register: u32, value: &[u8]) -> Vec<u8> {
    let value = nested(2, &[attribute(1, value)]);
    expression(b"immediate\0", &[number(1, register), value])
}

fn expression(name: &[u8], data: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[attribute(1, name), nested(2, data)])
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, &parts.concat())
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

/// One attribute of netlink(7), padded.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // All attributes here are a few bytes long.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Messages that take effect together.
struct Batch {
    bytes: Vec<u8>,
    count: u32,
}

impl Batch {
    fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), count: 0 };
        batch.edge(NFNL_MSG_BATCH_BEGIN);
        batch
    }

    fn add(&mut self, kind: u16, flags: u16, attributes: &[u8]) {
        self.count += 1;
        let header = [NFPROTO_IPV4, 0, 0, 0];
        let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
        self.message(kind, flags | NLM_F_ACK, &[&header[..], attributes].concat());
    }

    /// Begins or ends the batch.
    fn edge(&mut self, kind: u16) {
        let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
        self.message(kind, 0, &[0, 0, high, low]);
    }

    fn message(&mut self, kind: u16, flags: u16, payload: &[u8]) {
        let length = u32::try_from(16 + payload.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.count.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(payload);
    }

    fn send(mut self) -> io::Result<()> {
        self.edge(NFNL_MSG_BATCH_END);
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.send(&self.bytes, 0)?;
        let mut answered = 0;
        while answered < self.count {
            let (datagram, _) = socket.recv_from_full()?;
            answered += acknowledged(&datagram)?;
        }
        Ok(())
    }
}

/// How many messages a datagram acknowledges.
fn acknowledged(mut datagram: &[u8]) -> io::Result<u32> {
    let mut count = 0;
    while let Some((header, rest)) = datagram.split_first_chunk::<16>() {
        let [a, b, c, d, e, f, ..] = *header;
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        if u16::from_ne_bytes([e, f]) == NLMSG_ERROR
            && let Some(code) = rest.first_chunk()
        {
            match i32::from_ne_bytes(*code) {
                0 => count += 1,
                code => return Err(io::Error::from_raw_os_error(-code)),
            }
        }
        datagram = datagram.get(length.next_multiple_of(4).max(16)..).unwrap_or_default();
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_say_how_long_they_are() {
        assert_eq!(attribute(1, b"ab\0"), [7, 0, 1, 0, b'a', b'b', 0, 0]);
        assert_eq!(number(2, 3), [8, 0, 2, 0, 0, 0, 0, 3]);
        assert_eq!(nested(4, &[number(2, 3)])[..4], [12, 0, 4, 0x80]);
    }

    #[test]
    fn an_error_of_one_message_is_the_error_of_all() {
        let answer = |code: i32| {
            let mut bytes = [20_u32.to_ne_bytes(), [2, 0, 0, 0], [0; 4], [0; 4]].concat();
            bytes.extend_from_slice(&code.to_ne_bytes());
            bytes
        };
        assert_eq!(acknowledged(&[answer(0), answer(0)].concat()).unwrap(), 2);
        let error = acknowledged(&[answer(0), answer(-17)].concat()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(acknowledged(&[1, 2, 3]).unwrap(), 0);
    }
}
