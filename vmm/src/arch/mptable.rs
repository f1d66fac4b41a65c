//! The table by which a kernel without ACPI finds processors and interrupt lines: Intel
//! MultiProcessor Specification 1.4, chapter 4.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::devices::virtio::queue::GuestMemory;

const SPEC_REVISION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
/// Entry types, chapter 4.3.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Processor flags, 4.3.1.
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Interrupt types, 4.3.4.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// A local interrupt entry for every local APIC.
const ALL_APICS: u8 = 0xff;

/// Writes the table for `vcpus` processors.
pub(crate) fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&table(vcpus), layout::MP_TABLE)
}

/// The floating pointer (4.1) with the configuration table (4.2) right behind it.
fn table(vcpus: u8) -> Vec<u8> {
    let entries = entries(vcpus);
    let bytes: Vec<u8> = entries.concat();
    let pointer_len = 16;
    let table_address = GuestAddress(layout::MP_TABLE.0 + pointer_len);

    let mut header = b"PCMP".to_vec();
    header.extend(len16(44 + bytes.len()).to_le_bytes());
    header.extend([SPEC_REVISION, 0]);
    header.extend(b"BULKHEADMICROVM     ");
    header.extend([0; 6]);
    header.extend(len16(entries.len()).to_le_bytes());
    header.extend(layout::LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]);
    header.extend(bytes);
    set_checksum(&mut header, 7);

    let mut pointer = b"_MP_".to_vec();
    // All addresses of the layout that are named here lie below 4 GiB.
    pointer.extend(u32::try_from(table_address.0).unwrap_or(0).to_le_bytes());
    pointer.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut pointer, 10);
    pointer.extend(header);
    pointer
}

fn entries(vcpus: u8) -> Vec<Vec<u8>> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    for id in 0..vcpus {
        let bootstrap = if id == 0 { CPU_BOOTSTRAP } else { 0 };
        // Signature and features stay 0: the kernel asks the processor itself.
        let mut entry = vec![PROCESSOR, id, APIC_VERSION, CPU_ENABLED | bootstrap];
        entry.resize(20, 0);
        entries.push(entry);
    }
    entries.push([&[BUS, 0][..], b"ISA   "].concat());
    let mut io_apic = vec![IO_APIC, io_apic_id, APIC_VERSION, 1];
    io_apic.extend(layout::IO_APIC.to_le_bytes());
    entries.push(io_apic);
    for irq in 0..layout::IRQ_COUNT {
        let irq = u8::try_from(irq).unwrap_or(0);
        entries.push(vec![IO_INTERRUPT, INT, 0, 0, 0, irq, io_apic_id, irq]);
    }
    entries.push(vec![LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, ALL_APICS, 0]);
    entries.push(vec![LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);
    entries
}

/// Sets the checksum so that the bytes of a table add up to 0.
fn set_checksum(table: &mut [u8], position: usize) {
    let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = table.get_mut(position) {
        *checksum = sum.wrapping_neg();
    }
}

/// Converts a length; the table with the most processors is shorter than 2 KiB.
fn len16(len: usize) -> u16 {
    debug_assert!(u16::try_from(len).is_ok());
    u16::try_from(len).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::boot;
    use super::*;
    use crate::config::{CMDLINE_MAX, VCPUS_MAX};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_checksums_are_zero_for_any_number_of_processors() {
        for vcpus in 1..=VCPUS_MAX {
            let table = table(vcpus);
            assert_eq!((sum(&table[..16]), sum(&table[16..])), (0, 0), "{vcpus} vcpus");
        }
    }

    #[test]
    fn the_lengths_in_the_header_are_those_of_the_table() {
        let table = table(3);
        let length = u16::from_le_bytes([table[20], table[21]]);
        let count = u16::from_le_bytes([table[50], table[51]]);
        assert_eq!(usize::from(length), table.len() - 16);
        assert_eq!(usize::from(count), 3 + 1 + 1 + 24 + 2);
    }

    #[test]
    fn the_largest_table_lies_in_memory_that_the_guest_does_not_take_for_free() {
        let memory = GuestMemory::from_ranges(&layout::memory_ranges(32)).unwrap();
        let table = layout::MP_TABLE.0..layout::MP_TABLE.0 + table(VCPUS_MAX).len() as u64;
        assert!(table.end > layout::BASE_MEMORY_END, "it fits where the smaller ones do");
        for entry in boot::memory_map(&memory).iter().filter(|it| it.r#type == boot::E820_RAM) {
            let (start, end) = (entry.addr, entry.addr + entry.size);
            assert!(end <= table.start || table.end <= start, "{table:x?} in {start:x}..{end:x}");
        }
        write(&memory, VCPUS_MAX).unwrap();
        let mut written = vec![0; super::table(VCPUS_MAX).len()];
        memory.read_slice(&mut written, layout::MP_TABLE).unwrap();
        assert_eq!(written, super::table(VCPUS_MAX));
        // Nothing else of the layout lies there either.
        let others = [layout::CMDLINE.0 + CMDLINE_MAX as u64, layout::BOOT_STACK.0];
        assert!(others.iter().all(|end| *end <= table.start) && layout::HIGH_MEMORY.0 >= table.end);
    }
}
