//! A guest that does what a string of bytes says: chains, headers, commands, and frames that come to it.
//!
//! The bytes are noise. The device may answer or fail. It may neither panic, nor give back more than it
//! was offered.

use vm_memory::{Bytes, GuestAddress};

use super::super::super::mock::{HIGH_START, INDIRECT, NEXT, TABLES, WRITE};
use super::*;

/// More than that is the same again.
const STEPS_MAX: usize = 64;
/// So many bytes of a frame or a command are taken at once.
const PIECE_MAX: usize = 0x600;

/// What is left of the bytes; behind their end they are 0.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> u8 {
        self.piece(1).first().copied().unwrap_or_default()
    }

    fn number(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn piece(&mut self, len: usize) -> &'a [u8] {
        let (piece, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        piece
    }

    /// One that says its own length.
    fn sized(&mut self) -> &'a [u8] {
        let len = usize::from(self.number()) % PIECE_MAX;
        self.piece(len)
    }

    /// Inside of memory, at its edges, in a table, or anywhere.
    fn address(&mut self) -> u64 {
        let offset = u64::from(self.number());
        match self.byte() % 8 {
            0 => mock::LOW_END - offset % 64,
            1 => mock::HIGH_END - offset % 64,
            2 => TABLES + offset % 0x400,
            3 => u64::MAX - offset,
            _ => HIGH_START + offset * 16,
        }
    }

    fn descriptor(&mut self) -> mock::Raw {
        let len = match self.byte() % 4 {
            0 => u32::from(self.number()) << 16 | u32::from(self.number()),
            1 => u32::from(self.byte()),
            _ => u32::from(self.number()),
        };
        let flags = u16::from(self.byte()) & (NEXT | WRITE | INDIRECT);
        (self.address(), len, flags, u16::from(self.byte()))
    }
}

/// Does what the bytes say.
fn drive(bytes: &[u8]) {
    let mut script = Script(bytes);
    let pairs = usize::from(script.byte() % 2) + 1;
    // The control queue of a device with one pair is another one than with two.
    let asked = ALL & !u64::from(script.number()).rotate_right(u32::from(script.byte()) % 64);
    let features = if pairs > 1 { asked | F_MQ } else { asked & !F_MQ };
    let memory = mock::memory();
    let mut guest = Guest::with(&memory, features, pairs, RateLimit::default());
    let queues = 2 * pairs + 1;
    let mut offered = vec![0_usize; queues];
    for _ in 0..STEPS_MAX {
        if script.0.is_empty() || step(&mut script, &memory, &mut guest, &mut offered).is_err() {
            break;
        }
        for (queue, offered) in offered.iter_mut().enumerate() {
            let used = guest.driver.used(queue).len();
            assert!(used <= *offered, "queue {queue} got {used} of {offered}");
            *offered -= used;
        }
        // Nobody else empties them.
        for tap in 0..pairs {
            while guest.sent(tap).is_some() {}
        }
    }
    let Guest { mut net, driver, .. } = guest;
    net.stop(&driver.sources);
}

fn step(
    script: &mut Script<'_>,
    memory: &GuestMemory,
    guest: &mut Guest<'_>,
    offered: &mut [usize],
) -> Result<(), ServeError> {
    let kind = script.byte();
    let queue = usize::from(script.byte()) % offered.len();
    let tap = queue / 2 % guest.wires.len();
    match kind % 8 {
        0 => {
            let at = u16::from(script.byte()) % QUEUE_SIZES[queue];
            guest.driver.store(queue, at, &[script.descriptor()]);
        }
        1 => {
            guest.driver.offer(queue, u16::from(script.byte()));
            offered[queue] += 1;
        }
        2 => {
            guest.driver.set_available(queue, script.number());
            // Chains that were never offered count, up to all that an index can say.
            offered[queue] += usize::from(u16::MAX);
        }
        3 => {
            let at = GuestAddress(script.address());
            // What lies in no memory cannot be written.
            let _ = memory.write_slice(script.sized(), at);
        }
        4 => {
            let room = u32::from(script.number());
            let parts = [Part::Out(script.sized()), Part::Out(script.sized()), Part::In(room)];
            let count = usize::from(script.byte()) % 4;
            let first = usize::from(kind / 8) % (4 - count.max(1));
            guest.driver.add(queue, &parts[first..(first + count).min(3)]);
            offered[queue] += 1;
        }
        5 => {
            // A full pair of sockets drops it, as a tap does.
            let _ = write(&guest.wires[tap], script.sized());
            return guest.call(Ready::Source(u32::try_from(tap).unwrap_or_default()));
        }
        6 => return guest.call(TIMER),
        _ => {}
    }
    guest.call(Ready::Queue(queue))
}

#[test]
fn noise_is_survived() {
    let mut random = mock::Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..500 {
        let len = usize::try_from(random.below(0x400)).unwrap();
        let bytes: Vec<u8> = (0..len).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
        drive(&bytes);
    }
}
