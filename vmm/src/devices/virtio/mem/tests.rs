//! Which blocks are plugged and which are not.

use vm_memory::{Bytes, GuestRegionMmap};

use super::super::mock::{self, Driver, Part};
use super::super::{ConfigSpace, VirtioDevice};
use super::*;

const START: u64 = 1 << 32;
const STEP: u64 = 8 << 20;
const MIB: u64 = 1 << 20;

fn region() -> Region {
    Region::new(GuestAddress(START), STEP, 60)
}

/// Memory whose pluggable part has this many bytes.
fn memory(bytes: u64) -> GuestMemory {
    let size = usize::try_from(bytes).unwrap();
    let region = GuestRegionMmap::from_range(GuestAddress(START), size, None).unwrap();
    mock::memory().insert_region(Arc::new(region)).unwrap()
}

/// A device with this much memory requested.
fn logic(requested: u64) -> (Mem, MemHandle) {
    let (device, handle) = device(region()).unwrap();
    let config = device.config().clone();
    handle.request(requested).unwrap();
    let changed = Arc::clone(&handle.changed);
    (Mem { config, changed, start: GuestAddress(START), plugged: Vec::new() }, handle)
}

fn request(kind: u16, block: u64, count: u16) -> Vec<u8> {
    raw(kind, START.wrapping_add(block.wrapping_mul(BLOCK_BYTES)), count)
}

fn raw(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let parts: [&[u8]; 5] =
        [&kind.to_le_bytes(), &[0; 6], &address.to_le_bytes(), &count.to_le_bytes(), &[0; 6]];
    parts.concat()
}

/// The type and the state of the device's response.
fn ask(logic: &mut Mem, memory: &GuestMemory, request: &[u8]) -> (u16, u16) {
    let mut driver = Driver::new(memory, QUEUE_SIZES);
    let made = driver.add(0, &[Part::Out(request), Part::In(10)]);
    driver.call(logic, Ready::Queue(0)).unwrap();
    assert_eq!(driver.used(0), [(made.head, 10)]);
    let response = driver.written(&made, 10);
    assert_eq!(response[2..8], [0; 6]);
    (u16::from_le_bytes([response[0], response[1]]), u16::from_le_bytes([response[8], response[9]]))
}

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);
const UNPLUGGED: (u16, u16) = (0, 1);
const MIXED: (u16, u16) = (0, 2);

#[test]
fn blocks_are_plugged_up_to_what_is_requested_and_no_further() {
    let memory = memory(16 * MIB);
    let (mut logic, handle) = logic(16 * MIB);
    handle.request(8 * MIB).unwrap();
    let mut ask = |kind, block, count| ask(&mut logic, &memory, &request(kind, block, count));
    assert_eq!(ask(STATE, 0, 8), UNPLUGGED);
    assert_eq!(ask(PLUG, 1, 3), ACK);
    assert_eq!(handle.plugged_mib(), 6);
    assert_eq!((ask(STATE, 1, 3), ask(STATE, 0, 1), ask(STATE, 0, 2)), (ACK, UNPLUGGED, MIXED));
    assert_eq!(ask(PLUG, 4, 2), NACK);
    assert_eq!(ask(PLUG, 7, 1), ACK);
    assert_eq!(ask(PLUG, 0, 1), NACK);
    assert_eq!(handle.plugged_mib(), 8);
    handle.request(16 * MIB).unwrap();
    assert_eq!(ask(PLUG, 0, 1), ACK);
    assert_eq!(ask(PLUG, 4, 3), ACK);
    assert_eq!(ask(STATE, 0, 8), ACK);
    assert_eq!(handle.plugged_mib(), 16);
}

#[test]
fn what_is_unplugged_is_given_back() {
    let memory = memory(16 * MIB);
    let (mut logic, handle) = logic(16 * MIB);
    let mut ask = |kind, block, count| ask(&mut logic, &memory, &request(kind, block, count));
    let place = |block: u64| GuestAddress(START + block * BLOCK_BYTES + 4096);
    let filled = || (0..8).filter(|&block| memory.read_obj::<u8>(place(block)).unwrap() != 0);
    assert_eq!(ask(PLUG, 0, 8), ACK);
    for block in 0..8 {
        memory.write_obj(1_u8, place(block)).unwrap();
    }
    assert_eq!(ask(UNPLUG, 2, 3), ACK);
    assert_eq!(filled().collect::<Vec<_>>(), [0, 1, 5, 6, 7]);
    assert_eq!(handle.plugged_mib(), 10);
    assert_eq!(ask(UNPLUG, 1, 2), ERROR);
    assert_eq!(ask(PLUG, 1, 2), ERROR);
    assert_eq!(filled().count(), 5);
    assert_eq!(ask(UNPLUG_ALL, u64::MAX, u16::MAX), ACK);
    assert_eq!((filled().count(), handle.plugged_mib()), (0, 0));
    assert_eq!(ask(STATE, 0, 8), UNPLUGGED);
}

#[test]
fn requests_that_no_driver_makes_are_errors_and_change_nothing() {
    let memory = memory(16 * MIB);
    let (mut logic, handle) = logic(8 * MIB);
    assert_eq!(ask(&mut logic, &memory, &request(PLUG, 0, 1)), ACK);
    for kind in [PLUG, UNPLUG, STATE] {
        let hostile = [
            ("no blocks", request(kind, 0, 0)),
            ("no blocks at the end", request(kind, 4, 0)),
            ("behind what is usable", request(kind, 4, 1)),
            ("over what is usable", request(kind, 3, 2)),
            ("behind the region", request(kind, 32, 1)),
            ("all that can be said", request(kind, 0, u16::MAX)),
            ("below the region", request(kind, u64::MAX, 1)),
            ("not a block", raw(kind, START + 4096, 1)),
            ("nowhere", raw(kind, 0, 1)),
            ("at the end of all addresses", raw(kind, u64::MAX - BLOCK_BYTES + 1, 2)),
            ("odd", raw(kind, u64::MAX, u16::MAX)),
        ];
        for (name, request) in hostile {
            assert_eq!(ask(&mut logic, &memory, &request), ERROR, "{kind} {name}");
        }
    }
    for kind in [4, 0x100, u16::MAX] {
        assert_eq!(ask(&mut logic, &memory, &request(kind, 0, 1)), ERROR, "type {kind}");
    }
    assert_eq!(handle.plugged_mib(), 2);
    assert_eq!(logic.plugged, [true, false, false, false]);
}

#[test]
fn blocks_that_devices_do_not_know_yet_cannot_be_unplugged() {
    let (mut logic, handle) = logic(16 * MIB);
    let older = memory(8 * MIB);
    assert_eq!(ask(&mut logic, &older, &request(PLUG, 3, 2)), ACK);
    assert_eq!(ask(&mut logic, &older, &request(UNPLUG, 3, 2)), BUSY);
    assert_eq!(ask(&mut logic, &older, &request(UNPLUG_ALL, 0, 0)), BUSY);
    assert_eq!(handle.plugged_mib(), 4);
    assert_eq!(ask(&mut logic, &memory(16 * MIB), &request(UNPLUG, 3, 2)), ACK);
}

#[test]
fn a_driver_that_starts_again_finds_what_was_plugged() {
    let memory = memory(8 * MIB);
    let (mut logic, handle) = logic(8 * MIB);
    assert_eq!(ask(&mut logic, &memory, &request(PLUG, 0, 2)), ACK);
    let sources = Sources::new().unwrap();
    logic.start(0, &sources).unwrap();
    logic.stop(&sources);
    assert_eq!(ask(&mut logic, &memory, &request(STATE, 0, 2)), ACK);
    assert_eq!(handle.plugged_mib(), 4);
}

#[test]
fn requests_that_are_cut_off_fail_the_device() {
    let memory = memory(8 * MIB);
    for (request, room) in [(&request(PLUG, 0, 1)[..23], 10), (&request(PLUG, 0, 1), 9)] {
        let (mut logic, handle) = logic(8 * MIB);
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        driver.add(0, &[Part::Out(request), Part::In(room)]);
        assert!(driver.call(&mut logic, Ready::Queue(0)).is_err());
        assert_eq!(handle.plugged_mib(), 0);
    }
}

#[test]
fn the_driver_is_told_of_the_sizes_and_cannot_change_them() {
    let (device, handle) = device(region()).unwrap();
    let sizes = |config: &ConfigSpace| {
        [BLOCK_SIZE, ADDRESS, REGION_SIZE, USABLE_SIZE, PLUGGED_SIZE, REQUESTED_SIZE]
            .map(|field| config.u64(field))
    };
    assert_eq!(sizes(device.config()), [BLOCK_BYTES, START, 64 * MIB, 0, 0, 0]);
    assert_eq!(handle.region().steps(17).unwrap(), 24 * MIB);
    assert!(handle.region().steps(65).unwrap_err().to_string().contains("64 MiB"));
    assert!(handle.region().steps(u32::MAX).is_err());
    handle.request(24 * MIB).unwrap();
    device.config().write(0, &[0xff; CONFIG_BYTES]);
    let grown = [BLOCK_BYTES, START, 64 * MIB, 24 * MIB, 0, 24 * MIB];
    assert_eq!(sizes(device.config()), grown);
    // The usable size does not shrink: what became memory stays memory.
    handle.request(8 * MIB).unwrap();
    assert_eq!(sizes(device.config())[3..], [24 * MIB, 0, 8 * MIB]);
}

#[test]
fn a_new_size_interrupts_the_driver() {
    let memory = memory(8 * MIB);
    let (mut logic, handle) = logic(8 * MIB);
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    logic.start(0, &driver.sources).unwrap();
    driver.call(&mut logic, Ready::Source(REQUESTED)).unwrap();
    assert_eq!(driver.line.irq().read().unwrap(), 1);
    assert!(handle.changed.read().is_err(), "the event was not cleared");
}

#[test]
fn malformed_chains_are_survived() {
    mock::survives_malformed(QUEUE_SIZES, || logic(8 * MIB).0);
    mock::survives_noise(QUEUE_SIZES, 300, || logic(8 * MIB).0);
}
