//! Guest physical addresses and interrupt lines, all in one place so that no two collide unseen.
//!
//! ```text
//! 0x0000_0000  first 640 KiB: descriptor and page tables, boot parameters, command line, MP table
//! 0x0010_0000  kernel, then free memory, initramfs at the end
//! 0xd000_0000  virtio-mmio slots, one page each; no memory from here to 4 GiB
//! 0xfec0_0000  IOAPIC     0xfee0_0000  local APICs     0xfffb_c000  KVM's own pages (Intel)
//! 0x1_0000_0000  memory that did not fit below, then memory that is plugged later
//! ```

use vm_memory::GuestAddress;

use crate::config::SLOT_COUNT;
use crate::devices::virtio::transport::SLOT_BYTES;

/// Global descriptor table.
pub(crate) const GDT: GuestAddress = GuestAddress(0x500);
/// Interrupt descriptor table: empty.
pub(crate) const IDT: GuestAddress = GuestAddress(0x520);
/// The "zero page", Linux x86 boot protocol.
pub(crate) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Top of the stack that the kernel starts with.
pub(crate) const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Page tables that map the first GiB to itself: one table of each level.
pub(crate) const PML4: GuestAddress = GuestAddress(0x9000);
/// See [`PML4`].
pub(crate) const PDPT: GuestAddress = GuestAddress(0xa000);
/// See [`PML4`].
pub(crate) const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
/// The kernel's command line.
pub(crate) const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The last KiB of base memory, where a kernel looks for the MP table.
pub(crate) const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// End of base memory.
pub(crate) const BASE_MEMORY_END: u64 = 0xa_0000;
/// Start of memory above the hole for legacy devices; the kernel may be loaded here.
pub(crate) const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// The first virtio-mmio slot; low memory ends here.
pub(crate) const SLOTS: GuestAddress = GuestAddress(0xd000_0000);
/// The end of the last slot.
#[cfg(test)]
pub(crate) const SLOTS_END: GuestAddress = GuestAddress(SLOTS.0 + SLOT_COUNT as u64 * SLOT_BYTES);
/// Memory continues here.
pub(crate) const AFTER_4GIB: GuestAddress = GuestAddress(1 << 32);

/// The IOAPIC that KVM emulates.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The local APIC that KVM emulates.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs for itself on Intel.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// The interrupt of the first serial port.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// The interrupt of the first slot; the others follow.
pub(crate) const FIRST_SLOT_IRQ: u32 = 5;
/// Interrupt inputs of the IOAPIC that KVM emulates.
pub(crate) const IRQ_COUNT: u32 = 24;

const _: () = assert!(FIRST_SLOT_IRQ + SLOT_COUNT as u32 <= IRQ_COUNT);

/// The address of a slot.
pub(crate) fn slot_address(slot: u8) -> GuestAddress {
    GuestAddress(SLOTS.0 + u64::from(slot) * SLOT_BYTES)
}

/// The interrupt of a slot.
pub(crate) fn slot_irq(slot: u8) -> u32 {
    FIRST_SLOT_IRQ + u32::from(slot)
}

/// Linux plugs memory in blocks of this size...
const PLUG_STEP: u64 = 128 << 20;
/// ...or up to this one if it has booted with [`LARGE_MACHINE`] or more.
const PLUG_STEP_LARGE: u64 = 2 << 30;
const LARGE_MACHINE: u64 = 64 << 30;

/// Returns where memory that is plugged later begins, and the steps in which it grows, for a
/// machine whose memory ends at `end`.
pub(crate) fn plugged_memory(end: u64) -> (GuestAddress, u64) {
    let step = if end < LARGE_MACHINE { PLUG_STEP } else { PLUG_STEP_LARGE };
    (GuestAddress(end.max(AFTER_4GIB.0).next_multiple_of(step)), step)
}

/// Base and length of each range of memory, in bytes.
pub(crate) fn memory_ranges(mib: u32) -> Vec<(GuestAddress, usize)> {
    let bytes = u64::from(mib) << 20;
    let low = bytes.min(SLOTS.0);
    // usize is 64 bits wide on this architecture.
    let mut ranges = vec![(GuestAddress(0), usize::try_from(low).unwrap_or(usize::MAX))];
    if bytes > low {
        ranges.push((AFTER_4GIB, usize::try_from(bytes - low).unwrap_or(usize::MAX)));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugged_memory_lies_behind_the_first_and_in_whole_blocks() {
        let places = [
            (128 << 20, 1 << 32, 128 << 20),
            (1 << 32, 1 << 32, 128 << 20),
            ((1 << 32) + 1, (1 << 32) + (128 << 20), 128 << 20),
            (64 << 30, 64 << 30, 2 << 30),
            ((64 << 30) + (130 << 20), 66 << 30, 2 << 30),
        ];
        for (end, start, step) in places {
            assert_eq!(plugged_memory(end), (GuestAddress(start), step), "{end:#x}");
        }
    }
}
