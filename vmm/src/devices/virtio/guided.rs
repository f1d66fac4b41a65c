//! A queue between a guest and a device that both act as a string of bytes says.
//!
//! Each chain is either refused or consists of existing memory only. Whatever the device does with
//! a chain, it gets exactly as many bytes as the chain has.

#![expect(clippy::unwrap_used, reason = "a guest that cannot be set up is a failed test")]

use std::sync::Arc;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ServeError;
use super::mock::{self, Driver, Script};
use super::queue::{Buffers, DeviceQueue, GuestMemory};

/// More steps would only repeat.
const STEPS_MAX: usize = 64;
/// The longest copy; a slice costs nothing, however long it is.
const COPY_MAX: usize = 0x4000;

/// Does what the bytes say.
pub(crate) fn drive(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let shape = script.byte();
    let size = 1 << (shape % 9);
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, &[size]);
    let mut queue = mock::queue(0, size);
    queue.set_event_idx(shape & 0x80 != 0);
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    driver.queues[0] = DeviceQueue::new(queue, kick, Arc::clone(&driver.line));
    driver.queues[0].rings(&memory).unwrap();
    for _ in 0..STEPS_MAX {
        if script.ended() || step(&mut script, &memory, &mut driver).is_err() {
            break;
        }
    }
}

fn step(
    script: &mut Script<'_>,
    memory: &GuestMemory,
    driver: &mut Driver<'_>,
) -> Result<(), ServeError> {
    match script.byte() % 8 {
        0 | 1 => {
            let at = u16::from(script.byte()) % driver.queues[0].size();
            driver.store(0, at, &[script.descriptor()]);
        }
        2 => driver.offer(0, u16::from(script.byte())),
        3 => driver.set_available(0, script.number()),
        4 => {
            let at = GuestAddress(script.address());
            // Fails if the address is outside of memory.
            let _ = memory.write_slice(script.sized(), at);
        }
        5 => drain(script, memory, driver)?,
        6 => {
            let queue = &mut driver.queues[0];
            if queue.pop_or_arm(memory)?.is_some() {
                queue.unpop();
            }
        }
        _ => answer(script, memory, driver)?,
    }
    Ok(())
}

/// The device serves all available chains.
fn drain(
    script: &mut Script<'_>,
    memory: &GuestMemory,
    driver: &mut Driver<'_>,
) -> Result<(), ServeError> {
    let mut served = Vec::new();
    driver.queues[0].drain(memory, |chain| {
        consume(script, memory, &mut chain.readable);
        consume(script, memory, &mut chain.writable);
        served.push((chain.head, u32::try_from(chain.writable.used()).unwrap()));
        Ok(chain.writable.used())
    })?;
    if !script.in_rings {
        assert_eq!(driver.used(0), served);
    }
    Ok(())
}

/// The device serves one chain.
fn answer(
    script: &mut Script<'_>,
    memory: &GuestMemory,
    driver: &mut Driver<'_>,
) -> Result<(), ServeError> {
    let queue = &mut driver.queues[0];
    let Some(mut chain) = queue.pop_or_arm(memory)? else { return Ok(()) };
    consume(script, memory, &mut chain.readable);
    consume(script, memory, &mut chain.writable);
    queue.complete(memory, chain.head, chain.writable.used())?;
    queue.signal(memory)?;
    let len = u32::try_from(chain.writable.used()).unwrap();
    if !script.in_rings {
        assert_eq!(driver.used(0), [(chain.head, len)]);
    }
    Ok(())
}

/// Consumes some of a chain's bytes, and checks how many are left.
fn consume(script: &mut Script<'_>, memory: &GuestMemory, buffers: &mut Buffers) {
    let (left, used) = (buffers.left(), buffers.used());
    let mut slices = Vec::new();
    buffers.gather(memory, &mut slices).unwrap();
    assert!(slices.len() >= buffers.pieces());
    assert_eq!(bytes(&slices), left);
    let wanted = usize::from(script.number());
    let copied = wanted.min(COPY_MAX);
    let taken = match script.byte() % 4 {
        0 => buffers.read(memory, &mut vec![0; copied]).map_or(0, |()| copied),
        1 => buffers.write(memory, &vec![1; copied]).map_or(0, |()| copied),
        2 => bytes(&buffers.slices(memory, wanted).unwrap()),
        _ => bytes(&buffers.slices(memory, usize::MAX).unwrap()),
    };
    assert_eq!((buffers.left(), buffers.used()), (left - taken, used + taken));
}

fn bytes(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

#[cfg(test)]
mod tests {
    use super::super::mock::Random;
    use super::*;

    #[test]
    fn noise_is_survived() {
        let mut random = Random(0x6a09_e667_f3bc_c908);
        for _ in 0..500 {
            drive(&random.bytes(0x400));
        }
    }
}
