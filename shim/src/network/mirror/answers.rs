//! Answers to processes of the namespace itself. A name server there, such as Docker's, asks others by
//! the container's interface, whose frames are the guest's: of those that may be answers it gets
//! copies.
//!
//! Both stacks have the same addresses, and which of them has asked cannot be seen from a frame: the
//! other one finds nobody who waits for it.

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
/// What is not done where the kernel does not know filters by words.
pub(super) const UNSHARED: &str = "answers to name servers of its namespace do not reach them";

/// Frames of a protocol that have certain words.
struct Answer {
    /// Of Ethernet.
    protocol: u16,
    /// Each with where it is after Ethernet's header, and the bits of it that count.
    words: &'static [(i32, u32, u32)],
}

/// Who has an address, and what name servers say by UDP: over IPv4 without options.
const ANSWERS: [Answer; COUNT as usize] = [
    Answer { protocol: 0x0806, words: &[(4, 0xffff, 2)] },
    Answer {
        protocol: 0x0800,
        words: &[(0, 0x0f00_0000, 5 << 24), (8, 0xff_0000, 17 << 16), (20, 0xffff_0000, 53 << 16)],
    },
    Answer { protocol: 0x86dd, words: &[(4, 0xff00, 58 << 8), (40, 0xff00_0000, 136 << 24)] },
    Answer { protocol: 0x86dd, words: &[(4, 0xff00, 17 << 8), (40, 0xffff_0000, 53 << 16)] },
];

/// Lets the namespace have what may be an answer, of what arrives at an interface, beside the tap.
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
