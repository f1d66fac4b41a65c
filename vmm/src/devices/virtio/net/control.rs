//! Parses the commands of the control queue, VIRTIO 1.3 §5.1.6.5.
//!
//! Pure: a parsed command is well-formed, and the device decides whether it can be executed. A
//! malformed or unknown command is refused and changes nothing.

use super::filter::{LISTED_MAX, Listed, Mac};
use super::{F_CTRL_MAC_ADDR, F_CTRL_RX, F_MQ};

/// The longest command. If a driver sends longer lists of addresses, they are not read and match
/// all addresses.
pub(super) const COMMAND_MAX: usize = 4096;
/// The two answers.
pub(super) const DONE: u8 = 0;
pub(super) const REFUSED: u8 = 1;

/// Classes and commands, §5.1.6.5.
const RX: u8 = 0;
const RX_PROMISCUOUS: u8 = 0;
const RX_ALL_MULTICAST: u8 = 1;
const ADDRESS: u8 = 1;
const ADDRESS_LISTS: u8 = 0;
const ADDRESS_SET: u8 = 1;
const PAIRS: u8 = 4;
const PAIRS_SET: u8 = 0;

/// A command of the driver.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Turns the reception of all frames on or off.
    Promiscuous(bool),
    /// Turns the reception of all multicast frames on or off.
    AllMulticast(bool),
    /// Sets the addresses whose frames are received.
    Listen { unicast: Listed, multicast: Listed },
    /// Sets the address of the interface.
    SetAddress(Mac),
    /// Sets how many pairs of queues are used.
    SetPairs(u16),
}

impl Command {
    /// Parses all that a driver wrote, or the first [`COMMAND_MAX`] bytes of it.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let ([class, command], data) = bytes.split_first_chunk()?;
        Some(match (*class, *command, data) {
            (RX, RX_PROMISCUOUS, [on]) => Self::Promiscuous(*on != 0),
            (RX, RX_ALL_MULTICAST, [on]) => Self::AllMulticast(*on != 0),
            (ADDRESS, ADDRESS_LISTS, _) if bytes.len() == COMMAND_MAX => {
                Self::Listen { unicast: Listed::All, multicast: Listed::All }
            }
            (ADDRESS, ADDRESS_LISTS, lists) => {
                let (unicast, lists) = list(lists)?;
                let (multicast, rest) = list(lists)?;
                return rest.is_empty().then_some(Self::Listen { unicast, multicast });
            }
            (ADDRESS, ADDRESS_SET, mac) => {
                let mac = Mac(mac.try_into().ok()?);
                // The specification does not forbid a multicast address, but nobody could reach it.
                return (!mac.is_multicast()).then_some(Self::SetAddress(mac));
            }
            (PAIRS, PAIRS_SET, pairs) => Self::SetPairs(u16::from_le_bytes(pairs.try_into().ok()?)),
            _ => return None,
        })
    }

    /// The feature that a driver must have negotiated for this command.
    pub(super) fn needs(&self) -> u64 {
        match self {
            Self::Promiscuous(_) | Self::AllMulticast(_) | Self::Listen { .. } => F_CTRL_RX,
            Self::SetAddress(_) => F_CTRL_MAC_ADDR,
            Self::SetPairs(_) => F_MQ,
        }
    }
}

/// Splits a list of addresses off: a count, then that many addresses.
fn list(bytes: &[u8]) -> Option<(Listed, &[u8])> {
    let (count, bytes) = bytes.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = bytes.split_at_checked(count.checked_mul(6)?)?;
    let listed = if count > LISTED_MAX {
        Listed::All
    } else {
        Listed::These(addresses.as_chunks().0.iter().copied().map(Mac).collect())
    };
    Some((listed, rest))
}

#[cfg(test)]
mod tests {
    use super::super::super::mock::Random;
    use super::*;

    fn lists(unicast: u32, multicast: u32) -> Vec<u8> {
        let mut bytes = vec![ADDRESS, ADDRESS_LISTS];
        for count in [unicast, multicast] {
            bytes.extend(count.to_le_bytes());
            bytes.extend((0..count).flat_map(|_| [2; 6]));
        }
        bytes
    }

    fn these(count: usize) -> Listed {
        Listed::These(vec![Mac([2; 6]); count])
    }

    #[test]
    fn commands_are_told_apart() {
        let table: [(&[u8], Command); 5] = [
            (&[0, 0, 1], Command::Promiscuous(true)),
            (&[0, 1, 0], Command::AllMulticast(false)),
            (&[1, 1, 2, 0, 0, 0, 0, 9], Command::SetAddress(Mac([2, 0, 0, 0, 0, 9]))),
            (&[4, 0, 1, 2], Command::SetPairs(0x201)),
            (&lists(1, 2), Command::Listen { unicast: these(1), multicast: these(2) }),
        ];
        for (bytes, command) in table {
            assert_eq!(Command::parse(bytes), Some(command));
        }
    }

    #[test]
    fn more_addresses_than_are_compared_with_are_all() {
        let listen = Command::parse(&lists(64, 65)).unwrap();
        assert_eq!(listen, Command::Listen { unicast: these(64), multicast: Listed::All });
        let listen = Command::parse(&lists(700, 700)[..COMMAND_MAX]).unwrap();
        assert_eq!(listen, Command::Listen { unicast: Listed::All, multicast: Listed::All });
    }

    #[test]
    fn malformed_commands_are_refused() {
        let too_many = [&[1, 0][..], &u32::MAX.to_le_bytes(), &[0; 4]].concat();
        let cut_off = &lists(2, 2)[..20];
        let longer = [lists(1, 1), vec![0]].concat();
        let refused: [&[u8]; 14] = [
            &[],
            &[0],
            &[0, 0],
            &[0, 0, 1, 1],
            &[0, 2, 1],
            &[1, 0],
            &[1, 1, 2, 0, 0, 0, 0],
            &[1, 1, 3, 0, 0, 0, 0, 0],
            &[4, 0, 1],
            &[4, 0, 1, 0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &too_many,
            cut_off,
            &longer,
        ];
        for bytes in refused {
            assert_eq!(Command::parse(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn no_bytes_break_the_parser() {
        let mut random = Random(0x0dd0_5eed_1234_5677);
        for _ in 0..100_000 {
            let len = usize::try_from(random.below(40)).unwrap();
            let mut bytes = vec![0; len];
            bytes.fill_with(|| u8::try_from(random.below(4)).unwrap());
            if let Some(Command::Listen { unicast: Listed::These(listed), .. }) =
                Command::parse(&bytes)
            {
                assert!(listed.len() * 6 < len);
            }
        }
    }
}
