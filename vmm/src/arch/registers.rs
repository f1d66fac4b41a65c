//! The state in which the first processor enters the kernel: 64-bit mode, the first GiB mapped to
//! itself, interrupts off. Linux x86 boot protocol, "64-bit boot protocol"; Intel SDM volume 3A.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::devices::virtio::queue::GuestMemory;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLE: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// Bit 1 of the flags is always set.
const RFLAGS_RESERVED: u64 = 2;

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 2;
const PAGE_LARGE: u64 = 1 << 7;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// Local APIC registers, SDM table 11-1, and their delivery modes.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const MODE_NMI: u32 = 4 << 8;
const MODE_EXT_INT: u32 = 7 << 8;

/// The state of a processor cannot be set in KVM or in guest memory.
#[derive(Debug, Error)]
pub(crate) enum RegisterError {
    /// An ioctl on the vCPU.
    #[error("cannot set the processor's registers")]
    Kvm(#[from] kvm_ioctls::Error),
    /// A bug, since the addresses are fixed in `layout`.
    #[error("cannot write descriptor or page tables")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A bug, since the list is fixed.
    #[error("cannot list model-specific registers")]
    Msrs,
}

/// Segments of the boot protocol: 64-bit code at selector 0x10, data at 0x18.
fn segment(selector: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xf_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// The 8 bytes of a descriptor table entry, SDM volume 3A figure 3-8.
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    let limit = u64::from(segment.limit);
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// Writes descriptor and page tables; once for the machine.
pub(crate) fn write_tables(memory: &GuestMemory) -> Result<(), RegisterError> {
    let table =
        [0, 0, descriptor(&segment(0x10, 0xb, true)), descriptor(&segment(0x18, 0x3, false))];
    for (index, entry) in table.into_iter().enumerate() {
        memory.write_obj(entry, GuestAddress(layout::GDT.0 + index as u64 * 8))?;
    }
    memory.write_obj(0_u64, layout::IDT)?;
    memory.write_obj(layout::PDPT.0 | PAGE_PRESENT | PAGE_WRITABLE, layout::PML4)?;
    memory.write_obj(layout::PAGE_DIRECTORY.0 | PAGE_PRESENT | PAGE_WRITABLE, layout::PDPT)?;
    for index in 0..512_u64 {
        let entry = index << 21 | PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE;
        memory.write_obj(entry, GuestAddress(layout::PAGE_DIRECTORY.0 + index * 8))?;
    }
    Ok(())
}

/// Sets the state that every processor starts with.
pub(crate) fn set_common(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })?;
    let fast_strings = kvm_msr_entry {
        index: MSR_MISC_ENABLE,
        data: MISC_ENABLE_FAST_STRING,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[fast_strings]).map_err(|_| RegisterError::Msrs)?;
    vcpu.set_msrs(&msrs)?;
    let mut apic = vcpu.get_lapic()?;
    for (offset, mode) in [(APIC_LVT0, MODE_EXT_INT), (APIC_LVT1, MODE_NMI)] {
        if let Some(register) = apic.regs.get_mut(offset..offset + 4) {
            // The registers are declared as C characters.
            for (place, byte) in register.iter_mut().zip(mode.to_le_bytes()) {
                *place = i8::from_le_bytes([byte]);
            }
        }
    }
    Ok(vcpu.set_lapic(&apic)?)
}

/// Points the first processor at the kernel's entry.
pub(crate) fn set_entry(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegisterError> {
    let (code, data) = (segment(0x10, 0xb, true), segment(0x18, 0x3, false));
    let mut special = vcpu.get_sregs()?;
    special.gdt.base = layout::GDT.0;
    special.gdt.limit = 4 * 8 - 1;
    special.idt.base = layout::IDT.0;
    special.idt.limit = 7;
    special.cs = code;
    special.ds = data;
    special.es = data;
    special.fs = data;
    special.gs = data;
    special.ss = data;
    special.cr0 |= CR0_PROTECTED | CR0_PAGING;
    special.cr3 = layout::PML4.0;
    special.cr4 |= CR4_PAE;
    special.efer |= EFER_LONG_ENABLE | EFER_LONG_ACTIVE;
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rflags: RFLAGS_RESERVED,
        rip: entry.0,
        rsp: layout::BOOT_STACK.0,
        rbp: layout::BOOT_STACK.0,
        rsi: layout::ZERO_PAGE.0,
        ..Default::default()
    })?;
    Ok(())
}
