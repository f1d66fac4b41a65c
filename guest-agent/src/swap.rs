//! Swap of the machine: disks that the monitor has attached for it, swapon(2). Which container may use
//! how much of it is in `memory.swap.max` of its cgroup.

// UNSAFETY: rustix and nix have no wrapper of swapon(2).
#![expect(unsafe_code, reason = "swapon(2) is called directly")]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;

use bulkhead_protocol::agent::Disk;

use crate::disks::{self, DiskError};

/// What is freed is discarded at once, so that the host gets it back (linux/swap.h,
/// `SWAP_FLAG_DISCARD`, `SWAP_FLAG_DISCARD_PAGES`).
const DISCARD: libc::c_int = 0x10000 | 0x40000;

/// Swap that the machine cannot have.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SwapError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot swap to a disk")]
    Use(#[source] io::Error),
}

/// Swaps from now on to the disk with this serial number, which has the header of a swap area.
///
/// # Errors
/// The disk is not there, or the kernel does not take it.
pub(crate) fn add(serial: String) -> Result<(), SwapError> {
    let disk = Disk { path: "swap".to_owned(), serial, mounted: false };
    for disk in disks::bind(vec![disk])? {
        let node = CString::new(disk.node().as_os_str().as_bytes());
        let node = node.map_err(|error| SwapError::Use(error.into()))?;
        // SAFETY: the path ends with a zero byte and outlives the call, which takes nothing else by
        // reference.
        if unsafe { libc::swapon(node.as_ptr(), DISCARD) } != 0 {
            return Err(SwapError::Use(io::Error::last_os_error()));
        }
    }
    Ok(())
}
