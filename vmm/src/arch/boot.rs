//! Puts kernel, initramfs and boot parameters into guest memory: the 64-bit entry of the Linux x86
//! boot protocol (Documentation/arch/x86/boot.rst), with an uncompressed ELF kernel.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::layout;
use crate::config::{CMDLINE_MAX, SLOT_COUNT, VmConfig};
use crate::devices::virtio::queue::GuestMemory;

/// e820 types, as the kernel's asm/e820/types.h numbers them.
pub(super) const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "Loader that has no assigned id", boot.rst type_of_loader.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");

/// The guest cannot be made ready to start.
#[derive(Debug, Error)]
pub(crate) enum BootError {
    /// Not an ELF kernel, or it does not fit.
    #[error("cannot load the kernel")]
    Kernel(#[source] linux_loader::loader::Error),
    /// The initramfs file cannot be read.
    #[error("cannot read the initramfs")]
    Initramfs(#[source] io::Error),
    /// The memory is too small.
    #[error("kernel and initramfs of {needs} MiB do not fit in {has} MiB of memory")]
    Memory { needs: u64, has: u64 },
    /// The command line is longer than the kernel accepts.
    #[error("kernel command line has {0} bytes, at most {CMDLINE_MAX} fit")]
    Cmdline(usize),
    /// A bug, since the addresses are fixed in `layout`.
    #[error("cannot write the boot structures")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// Loads everything and returns the address at which the kernel starts.
pub(crate) fn load(
    memory: &GuestMemory,
    config: &VmConfig,
    kernel: &mut File,
    initramfs: &mut File,
) -> Result<GuestAddress, BootError> {
    let loaded =
        Elf::load(memory, None, kernel, Some(layout::HIGH_MEMORY)).map_err(BootError::Kernel)?;
    let (initramfs_address, initramfs_len) = load_initramfs(memory, initramfs, loaded.kernel_end)?;
    let cmdline = cmdline(config);
    if cmdline.len() > CMDLINE_MAX {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), layout::CMDLINE)?;
    memory.write_obj(0_u8, GuestAddress(layout::CMDLINE.0 + cmdline.len() as u64))?;

    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.cmd_line_ptr = low(layout::CMDLINE.0);
    params.hdr.cmdline_size = low(cmdline.len() as u64);
    params.hdr.ramdisk_image = low(initramfs_address);
    params.hdr.ramdisk_size = low(initramfs_len);
    let map = memory_map(memory);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    for (entry, place) in map.into_iter().zip(&mut params.e820_table) {
        *place = entry;
    }
    memory.write_obj(params, layout::ZERO_PAGE)?;
    Ok(loaded.kernel_load)
}

/// The kernel's command line: what this machine needs, then what the pod adds.
///
/// `rcu_expedited`: creating and removing mounts, namespaces and cgroups waits for many RCU grace
/// periods. With few processors expedited ones are cheap, and the kernel uses them while it boots
/// anyway. `numdummies=0`: the guest starts with the loopback interface and no other, as on a host
/// whose drivers are modules.
pub(crate) fn cmdline(config: &VmConfig) -> String {
    let mut text = String::from(
        "console=ttyS0 quiet panic=-1 reboot=k no_timer_check tsc=reliable \
         8250.nr_uarts=1 cryptomgr.notests random.trust_cpu=on maxcpus=1 rcupdate.rcu_expedited=1 \
         dummy.numdummies=0 rdinit=/init",
    );
    for slot in 0..SLOT_COUNT {
        let address = layout::slot_address(slot).0;
        // Writing to a String cannot fail.
        let _ = write!(text, " virtio_mmio.device=4K@{address:#x}:{}", layout::slot_irq(slot));
    }
    if !config.cmdline.is_empty() {
        text.push(' ');
        text.push_str(&config.cmdline);
    }
    text
}

/// Copies the initramfs to the end of low memory and returns its address and length.
fn load_initramfs(
    memory: &GuestMemory,
    file: &mut File,
    kernel_end: u64,
) -> Result<(u64, u64), BootError> {
    let len = file.seek(SeekFrom::End(0)).map_err(BootError::Initramfs)?;
    file.rewind().map_err(BootError::Initramfs)?;
    let low_end = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let address = low_end.checked_sub(len).map(|address| address & !0xfff);
    let Some(address) = address.filter(|address| *address >= kernel_end) else {
        let needs = (kernel_end + len).div_ceil(1 << 20);
        return Err(BootError::Memory { needs, has: low_end >> 20 });
    };
    let count = usize::try_from(len).unwrap_or(usize::MAX);
    let read = memory.read_exact_volatile_from(GuestAddress(address), file, count);
    read.map_err(|error| BootError::Initramfs(io::Error::other(error)))?;
    Ok((address, len))
}

/// The e820 map: what the firmware of a PC would report about memory.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry =
        |addr: u64, end: u64, type_| boot_e820_entry { addr, size: end - addr, r#type: type_ };
    let mut map = vec![
        entry(0, layout::MP_TABLE.0, E820_RAM),
        entry(layout::MP_TABLE.0, layout::BASE_MEMORY_END, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY.0);
        map.push(entry(start, region.start_addr().0 + region.len(), E820_RAM));
    }
    map
}

/// Converts an address for a 32-bit field of the boot protocol; all of ours are below 4 GiB.
fn low(value: u64) -> u32 {
    debug_assert!(u32::try_from(value).is_ok());
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_leaves_no_byte_of_memory_out_and_overlaps_nowhere() {
        let memory = GuestMemory::from_ranges(&layout::memory_ranges(4096)).unwrap();
        let map = memory_map(&memory);
        let mut end = 0;
        for entry in &map {
            let (addr, size) = (entry.addr, entry.size);
            assert!(addr >= end, "{addr:#x} overlaps what ends at {end:#x}");
            end = addr + size;
        }
        let ram: u64 = map.iter().filter(|entry| entry.r#type == E820_RAM).map(|e| e.size).sum();
        let hole = layout::HIGH_MEMORY.0 - layout::MP_TABLE.0;
        assert_eq!(ram, (4096 << 20) - hole);
    }

    #[test]
    fn an_initramfs_that_does_not_fit_is_refused_with_both_sizes() {
        let memory = GuestMemory::from_ranges(&layout::memory_ranges(32)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(40 << 20).unwrap();
        let error = load_initramfs(&memory, &mut file, 16 << 20).unwrap_err();
        assert!(matches!(error, BootError::Memory { needs: 56, has: 32 }), "{error}");
    }
}
