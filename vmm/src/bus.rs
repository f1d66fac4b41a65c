//! Passes a guest's accesses to the devices at their addresses.
//!
//! Where there is no device, reads return all ones, as on a PC, and writes are ignored.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::arch::layout;
use crate::config::SLOT_COUNT;
use crate::devices::console::{self, Console};
use crate::devices::virtio::transport::{SLOT_BYTES, Transport};
use crate::memory::Memory;

/// The keyboard controller's command port, and the command that resets a PC.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// Whether the machine keeps running after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It does.
    None,
    /// The guest reset the machine.
    Reset,
}

/// All devices.
#[derive(Debug)]
pub(crate) struct Bus {
    console: Mutex<Console>,
    slots: [Mutex<Transport>; SLOT_COUNT as usize],
    exits: AtomicU64,
    memory: Arc<Memory>,
}

impl Bus {
    /// A console and placeholders.
    pub(crate) fn new(console: Console, memory: Arc<Memory>) -> Self {
        let slots = std::array::from_fn(|_| Mutex::new(Transport::new(Arc::clone(&memory))));
        Self { console: Mutex::new(console), slots, exits: AtomicU64::new(0), memory }
    }

    /// Guest memory, as the devices see it.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn console(&self) -> MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn slot(&self, slot: u8) -> Option<MutexGuard<'_, Transport>> {
        let slot = self.slots.get(usize::from(slot))?;
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How often a vCPU left the guest.
    pub(crate) fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    pub(crate) fn count_exit(&self) {
        self.exits.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (console_register(port), port, data) {
            (Some(register), _, [value]) => *value = self.console().read(register),
            // Neither buffer of the keyboard controller is ever full.
            (_, I8042_COMMAND, [value]) => *value = 0,
            _ => {}
        }
    }

    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        match (console_register(port), port, data) {
            (Some(register), _, [value]) => self.console().write(register, *value),
            (_, I8042_COMMAND, [I8042_RESET]) => return Effect::Reset,
            _ => {}
        }
        Effect::None
    }

    pub(crate) fn memory_read(&self, address: u64, data: &mut [u8]) {
        match slot_at(address).and_then(|(slot, offset)| Some((self.slot(slot)?, offset))) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = slot_at(address)
            && let Some(mut transport) = self.slot(slot)
        {
            transport.write(offset, data);
        }
    }
}

fn console_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(console::PORT_BASE)?;
    if register < console::PORT_COUNT { u8::try_from(register).ok() } else { None }
}

fn slot_at(address: u64) -> Option<(u8, u64)> {
    let offset = address.checked_sub(layout::SLOTS.0)?;
    let slot = u8::try_from(offset / SLOT_BYTES).ok()?;
    (slot < SLOT_COUNT).then_some((slot, offset % SLOT_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::queue::GuestMemory;

    fn bus() -> Bus {
        let memory = GuestMemory::from_ranges(&layout::memory_ranges(32)).unwrap();
        Bus::new(Console::new(tempfile::tempfile().unwrap()).unwrap(), Memory::new(memory))
    }

    #[test]
    fn every_slot_starts_as_a_placeholder() {
        let bus = bus();
        for slot in 0..SLOT_COUNT {
            let base = layout::slot_address(slot).0;
            let mut register = [0xaa; 4];
            bus.memory_read(base, &mut register);
            assert_eq!(&register, b"virt");
            bus.memory_read(base + 8, &mut register);
            assert_eq!(register, [0; 4], "slot {slot} shows a device");
        }
    }

    #[test]
    fn nobody_home_reads_all_ones() {
        let bus = bus();
        for address in [0, layout::SLOTS.0 - 8, layout::SLOTS_END.0, 1 << 40, u64::MAX] {
            let mut data = [0; 8];
            bus.memory_write(address, &data);
            bus.memory_read(address, &mut data);
            assert_eq!(data, [0xff; 8], "{address:#x}");
        }
    }

    #[test]
    fn every_width_at_any_offset_of_a_placeholder_has_an_answer() {
        const BEFORE: u8 = 0xa5;
        let bus = bus();
        for offset in 0..SLOT_BYTES {
            for width in 0..=8 {
                let mut data = [BEFORE; 8];
                bus.memory_write(layout::SLOTS.0 + offset, &data[..width]);
                bus.memory_read(layout::SLOTS.0 + offset, &mut data[..width]);
                let expected: &[u8] = match (offset, width) {
                    (0, 4) => b"virt",
                    (4, 4) => &[2, 0, 0, 0],
                    (12, 4) => b"BLKH",
                    _ => &[0; 8][..width],
                };
                assert_eq!(&data[..width], expected, "{width} bytes at {offset:#x}");
                assert_eq!(data[width..], [BEFORE; 8][width..], "{width} bytes at {offset:#x}");
            }
        }
        assert_eq!(bus.console().bytes(), 0);
    }

    #[test]
    fn every_port_and_width_has_an_answer() {
        let bus = bus();
        let console = console::PORT_BASE..console::PORT_BASE + console::PORT_COUNT;
        for port in 0..=u16::MAX {
            for width in [1, 2, 4] {
                let mut data = [0; 4];
                bus.port_read(port, &mut data[..width]);
                let expected = match (port, width) {
                    (port, 1) if console.contains(&port) => continue,
                    (I8042_COMMAND, 1) => [0, 0, 0, 0],
                    (_, 1) => [0xff, 0, 0, 0],
                    (_, 2) => [0xff, 0xff, 0, 0],
                    _ => [0xff; 4],
                };
                assert_eq!(data, expected, "{width} bytes at {port:#x}");
                assert_eq!(bus.port_write(port, &data[..width]), Effect::None);
            }
        }
        // The console takes only single bytes.
        assert_eq!(bus.console().bytes(), 0);
        bus.port_write(console::PORT_BASE, b"x");
        assert_eq!(bus.console().bytes(), 1);
        let mut status = [0];
        bus.port_read(console::PORT_BASE + 5, &mut status);
        assert_ne!(status[0] & 0x20, 0, "the console takes the next byte");
    }

    #[test]
    fn only_the_reset_command_resets() {
        let bus = bus();
        assert_eq!(bus.port_write(I8042_COMMAND, &[0x60]), Effect::None);
        assert_eq!(bus.port_write(I8042_COMMAND, &[I8042_RESET]), Effect::Reset);
    }
}
