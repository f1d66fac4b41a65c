//! The swap of a machine: disks in the host's memory, which the host's kernel swaps out as it does the
//! machine's own memory (`docs/decisions/0032-swap.md`). They belong to the monitor, so that they count
//! for the pod's cgroup and end with the machine.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::{Pod, PodError};

/// The unit of a swap area.
const PAGE: usize = 4096;
/// The least that is added, in MiB.
const STEP_MIB: u64 = 64;

impl Pod {
    /// Lets the machine swap `wanted_mib` in all, if the host has as much.
    ///
    /// # Errors
    /// When the host has no memory for it, the machine has no room for another disk, or the guest
    /// cannot swap to it.
    pub async fn provide_swap(&self, wanted_mib: u64, host_mib: u64) -> Result<(), PodError> {
        let mut provided = self.swap_mib.lock().await;
        let Some(more) = more(*provided, wanted_mib, host_mib) else { return Ok(()) };
        let area = area(more).map_err(|error| PodError::Io("swap", error))?;
        let serial = self.disks.attach_file(&self.machine, &area).await?;
        self.agent.add_swap(serial).await?;
        *provided += more;
        Ok(())
    }
}

/// How much is added to what is there, in MiB. It at least doubles, because a machine has room for
/// few disks.
fn more(provided: u64, wanted: u64, host: u64) -> Option<u64> {
    let missing = wanted.checked_sub(provided).filter(|missing| *missing > 0)?;
    Some(missing.max(provided).max(STEP_MIB).min(host.saturating_sub(provided)))
        .filter(|it| *it > 0)
}

/// A swap area of so many MiB, as mkswap(8) makes it (`union swap_header` in linux/swap.h).
fn area(mib: u64) -> io::Result<File> {
    let pages = u32::try_from(mib.saturating_mul((1 << 20) / PAGE as u64)).unwrap_or(u32::MAX - 1);
    let mut header = [0; PAGE];
    header[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
    // The number of the last page: the header is page 0.
    header[1028..1032].copy_from_slice(&pages.to_le_bytes());
    header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("swap", flags)?);
    ftruncate(&file, (u64::from(pages) + 1) * PAGE as u64)?;
    file.write_all_at(&header, 0)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_grows_in_few_steps() {
        assert_eq!(more(0, 0, 1024), None);
        assert_eq!(more(0, 1, 1024), Some(64));
        assert_eq!(more(0, 1, 10), Some(10));
        assert_eq!(more(0, 500, 1024), Some(500));
        assert_eq!(more(500, 400, 1024), None);
        assert_eq!(more(500, 501, 2048), Some(500));
        assert_eq!(more(500, 1024, 1024), Some(524));
        assert_eq!(more(1024, 1025, 1024), None);
    }

    #[test]
    fn an_area_has_the_header_of_one_and_keeps_its_size() {
        let file = area(64).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (64 << 20) + PAGE as u64);
        let mut magic = [0; 10];
        file.read_exact_at(&mut magic, PAGE as u64 - 10).unwrap();
        assert_eq!(&magic, b"SWAPSPACE2");
        assert!(file.set_len(1).is_err(), "it is sealed");
    }
}
