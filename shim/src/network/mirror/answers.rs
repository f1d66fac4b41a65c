//! Copies of answers for processes of the namespace itself. A name server there, such as Docker's,
//! asks others through the container's interface, whose frames go to the guest. So the namespace
//! gets copies of the frames that may be answers.
//!
//! The host's stack and the guest's have the same addresses, and a frame does not show which of
//! them has asked. In the stack that has not asked, nothing waits for the answer.

use std::io;

use bulkhead_netlink::Connection;
use bulkhead_netlink::route::RouteNetlinkMessage;
use bulkhead_netlink::route::tc::{
    TcActionType, TcAttribute, TcFilterU32Option, TcMessage, TcMirrorActionType, TcOption,
    TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::redirect::{INGRESS, NEW, mirred};

/// How many filters there are; the first has the priority 1.
pub(super) const COUNT: u32 = 4;
/// The message if the kernel does not support u32 filters.
pub(super) const UNSHARED: &str =
    "cannot pass answers on to the name servers of its network namespace";

/// Frames of a protocol that contain certain 32-bit words.
struct Answer {
    /// The EtherType.
    protocol: u16,
    /// Each with its offset after the Ethernet header, the mask of its bits that count, and its
    /// value.
    words: &'static [(i32, u32, u32)],
}

/// ARP replies, DNS answers over UDP in IPv4 without options, neighbour advertisements, and DNS
/// answers over UDP in IPv6.
const ANSWERS: [Answer; COUNT as usize] = [
    Answer { protocol: 0x0806, words: &[(4, 0xffff, 2)] },
    Answer {
        protocol: 0x0800,
        words: &[(0, 0x0f00_0000, 5 << 24), (8, 0xff_0000, 17 << 16), (20, 0xffff_0000, 53 << 16)],
    },
    Answer { protocol: 0x86dd, words: &[(4, 0xff00, 58 << 8), (40, 0xff00_0000, 136 << 24)] },
    Answer { protocol: 0x86dd, words: &[(4, 0xff00, 17 << 8), (40, 0xffff_0000, 53 << 16)] },
];

/// Gives the namespace a copy of those frames that arrive at an interface and may be answers. The
/// tap gets them too.
pub(super) fn share(connection: &mut Connection, one: u32, tap: u32) -> io::Result<()> {
    for (priority, answer) in (1..).zip(&ANSWERS) {
        let filter = copy(one, tap, priority, answer)?;
        connection.change(RouteNetlinkMessage::NewTrafficFilter(filter), NEW)?;
    }
    Ok(())
}

fn copy(one: u32, tap: u32, priority: u32, answer: &Answer) -> io::Result<TcMessage> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = u8::try_from(answer.words.len()).map_err(io::Error::other)?;
    let key = |&(offset, mask, word): &(i32, u32, u32)| {
        let mut key = TcU32Key::default();
        (key.off, key.mask, key.val) = (offset, mask.to_be(), word.to_be());
        key
    };
    selector.keys = answer.words.iter().map(key).collect();
    let action = mirred(tap, TcMirrorActionType::EgressMirror, TcActionType::Ok);
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(one).map_err(io::Error::other)?;
    message.header.parent = INGRESS;
    message.header.info = priority << 16 | u32::from(answer.protocol.to_be());
    message.attributes = vec![
        TcAttribute::Kind("u32".to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether one of the filters takes a packet of a protocol.
    fn taken(protocol: u16, packet: &[u8]) -> bool {
        let word = |offset: i32| {
            let offset = usize::try_from(offset).unwrap();
            let bytes = packet.get(offset..offset + 4);
            bytes.map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().unwrap()))
        };
        let all = |answer: &Answer| {
            answer.words.iter().all(|(offset, mask, value)| word(*offset) & mask == *value)
        };
        ANSWERS.iter().any(|answer| answer.protocol == protocol && all(answer))
    }

    #[test]
    fn only_what_may_be_an_answer_is_taken() {
        for (operation, is) in [(1, false), (2, true)] {
            assert_eq!(taken(0x0806, &[0, 1, 8, 0, 6, 4, 0, operation]), is);
        }
        for (protocol, port, is) in [(17, 53, true), (17, 54, false), (6, 53, false)] {
            let mut four = [0; 28];
            (four[0], four[9], four[21]) = (0x45, protocol, port);
            assert_eq!(taken(0x0800, &four), is);
            let mut six = [0; 48];
            (six[0], six[6], six[41]) = (0x60, protocol, port);
            assert_eq!(taken(0x86dd, &six), is);
        }
        for (kind, is) in [(135, false), (136, true)] {
            let mut six = [0; 64];
            (six[0], six[6], six[40]) = (0x60, 58, kind);
            assert_eq!(taken(0x86dd, &six), is);
        }
    }
}
