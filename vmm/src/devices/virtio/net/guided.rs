//! A guest that acts as a string of bytes says: chains, headers, commands, and incoming frames.
//!
//! The bytes are noise, or come from a fuzzer. The device may answer or fail. It must not panic,
//! complete more chains than it was offered, complete chains without an interrupt, or take a
//! multicast address.

#![expect(clippy::unwrap_used, reason = "a guest that cannot be set up is a failed test")]

use rustix::io::{read, write};
use vm_memory::{Bytes, GuestAddress};

use super::super::mock::{self, Part, Script};
use super::super::queue::GuestMemory;
use super::super::{Ready, Serve, ServeError};
use super::mock::{ALL, Guest, TIMER};
use super::*;
use crate::config::RateLimit;

/// More steps would only repeat.
const STEPS_MAX: usize = 64;

/// Does what the bytes say.
pub(crate) fn drive(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let shape = script.byte();
    let pairs = usize::from(shape % 2) + 1;
    // The limit lets one packet pass; the next would pass a second later.
    let packets_per_s = if shape & 2 == 0 { None } else { Some(1.try_into().unwrap()) };
    let limit = RateLimit { packets_per_s, ..RateLimit::default() };
    // The control queue has another index with two pairs than with one.
    let asked = ALL & !u64::from(script.number()).rotate_right(u32::from(script.byte()) % 64);
    let features = if pairs > 1 { asked | F_MQ } else { asked & !F_MQ };
    let memory = mock::memory();
    let mut guest = Guest::with(&memory, features, pairs, limit);
    let mut offered = vec![0_usize; 2 * pairs + 1];
    for _ in 0..STEPS_MAX {
        if script.ended() || step(&mut script, &memory, &mut guest, &mut offered).is_err() {
            break;
        }
        if !script.in_rings {
            count(&mut guest, &mut offered);
        }
        look(&guest);
    }
    let Guest { mut net, driver, .. } = guest;
    net.stop(&driver.sources);
}

/// Checks what the used rings say against what was offered.
fn count(guest: &mut Guest<'_>, offered: &mut [usize]) {
    let told = guest.driver.line.irq().read().is_ok();
    for (queue, offered) in offered.iter_mut().enumerate() {
        let used = guest.driver.used(queue).len();
        assert!(used <= *offered, "queue {queue} got {used} of {offered}");
        assert!(used == 0 || told, "queue {queue} got {used} and was not told");
        *offered -= used;
    }
}

/// Checks what must hold whatever the guest has done, and empties the taps, which nobody else does.
fn look(guest: &Guest<'_>) {
    let mut mac = [0; 6];
    guest.space.read(MAC as u64, &mut mac);
    assert!(!filter::Mac(mac).is_multicast(), "{mac:?} is the address of a group");
    for wire in &guest.wires {
        while read(wire, &mut [0; 1]).is_ok() {}
    }
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
            // The index can make up to 65535 chains available that were never offered.
            offered[queue] += usize::from(u16::MAX);
        }
        3 => {
            let at = GuestAddress(script.address());
            // Fails if the address is outside of memory.
            let _ = memory.write_slice(script.sized(), at);
        }
        4 => {
            let room = u32::from(script.length());
            let parts = [Part::Out(script.sized()), Part::Out(script.sized()), Part::In(room)];
            let count = usize::from(script.byte()) % 4;
            let first = usize::from(kind / 8) % (4 - count.max(1));
            guest.driver.add(queue, &parts[first..(first + count).min(3)]);
            offered[queue] += 1;
        }
        5 => {
            let mut frame = script.sized().to_vec();
            frame.resize(frame.len() + usize::from(script.length()), 0);
            // If the socket is full the frame is dropped, as by a tap.
            let _ = write(&guest.wires[tap], &frame);
            return guest.call(Ready::Source(u32::try_from(tap).unwrap_or_default()));
        }
        6 => return guest.call(TIMER),
        _ => {
            let control = offered.len() - 1;
            let command = [kind / 8 % 8, kind / 64];
            let parts = [Part::Out(&command), Part::Out(script.sized()), Part::In(1)];
            guest.driver.add(control, &parts);
            offered[control] += 1;
            return guest.call(Ready::Queue(control));
        }
    }
    guest.call(Ready::Queue(queue))
}

#[cfg(test)]
mod tests {
    use super::super::super::mock::Random;
    use super::*;

    #[test]
    fn noise_is_survived() {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for _ in 0..500 {
            drive(&random.bytes(0x400));
        }
    }
}
