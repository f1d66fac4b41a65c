//! The host kernel's side of a pair of queues, `include/uapi/linux/vhost.h` of Linux.
//!
//! Nothing is opened here: `/dev/vhost-net` arrives as a descriptor. The kernel reads and writes
//! only memory of this process, and only what it was shown; it checks the guest's addresses against
//! that.

// UNSAFETY: the kernel is given addresses of this process, at which it reads and writes.
#![expect(unsafe_code, reason = "ioctls of /dev/vhost-net")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::{c_int, c_ulong};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

use super::super::queue::{GuestMemory, Rings};
use crate::memory::Onlooker;

const VHOST: u32 = 0xaf;
ioctl_ior_nr!(GET_FEATURES, VHOST, 0x00, u64);
ioctl_iow_nr!(SET_FEATURES, VHOST, 0x00, u64);
ioctl_io_nr!(SET_OWNER, VHOST, 0x01);
// The size is that of the header only; the regions follow it.
ioctl_iow_nr!(SET_MEM_TABLE, VHOST, 0x03, u64);
ioctl_iow_nr!(SET_VRING_NUM, VHOST, 0x10, RingState);
ioctl_iow_nr!(SET_VRING_ADDR, VHOST, 0x11, RingAddresses);
ioctl_iow_nr!(SET_VRING_BASE, VHOST, 0x12, RingState);
ioctl_iow_nr!(SET_VRING_KICK, VHOST, 0x20, RingFile);
ioctl_iow_nr!(SET_VRING_CALL, VHOST, 0x21, RingFile);
ioctl_iow_nr!(SET_VRING_ERR, VHOST, 0x22, RingFile);
ioctl_iow_nr!(NET_SET_BACKEND, VHOST, 0x30, RingFile);

/// Takes a descriptor back from the kernel.
const NONE: RawFd = -1;

/// `struct vhost_vring_state`.
#[repr(C)]
struct RingState {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct RingFile {
    index: u32,
    fd: c_int,
}

/// A queue of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the driver.
    Receive,
    /// From the driver.
    Transmit,
}

/// The eventfds of a queue.
pub(super) struct Ends<'a> {
    /// Readable when the driver kicked.
    pub(super) kick: &'a EventFd,
    /// Written to interrupt the driver.
    pub(super) call: &'a EventFd,
    /// Written when the driver broke the rules of the queue.
    pub(super) error: &'a EventFd,
}

/// One pair of queues that the kernel can serve.
#[derive(Debug)]
pub(super) struct Vhost(File);

impl Vhost {
    /// Takes `/dev/vhost-net`, opened for this pair.
    ///
    /// # Errors
    /// When it is something else, or the kernel has no thread for it.
    pub(super) fn new(device: OwnedFd) -> io::Result<Self> {
        let device = File::from(device);
        // SAFETY: takes no argument. From now on addresses are those of this process.
        done(unsafe { ioctl(&device, SET_OWNER()) })?;
        Ok(Self(device))
    }

    /// Features of the device and of the transport that the kernel supports.
    pub(super) fn features(&self) -> io::Result<u64> {
        let mut features = 0_u64;
        // SAFETY: the kernel writes a number of this size.
        done(unsafe { ioctl_with_mut_ref(&self.0, GET_FEATURES(), &mut features) })?;
        Ok(features)
    }

    /// Sets the features to use, out of [`Vhost::features`].
    pub(super) fn set_features(&self, features: u64) -> io::Result<()> {
        // SAFETY: the kernel reads a number of this size.
        done(unsafe { ioctl_with_ref(&self.0, SET_FEATURES(), &features) })
    }

    /// Lets the kernel serve a queue with the frames of `tap`.
    pub(super) fn start(
        &self,
        direction: Direction,
        rings: Rings,
        ends: &Ends<'_>,
        tap: &impl AsRawFd,
    ) -> io::Result<()> {
        let index = direction.index();
        self.set_state(SET_VRING_NUM(), direction, rings.size)?;
        self.set_state(SET_VRING_BASE(), direction, rings.next)?;
        let Rings { descriptors, used, available, .. } = rings;
        let addresses = RingAddresses { index, flags: 0, descriptors, used, available, log: 0 };
        // SAFETY: the kernel reads one structure. The rings are guest memory that was checked and
        // stays mapped for the life of the process; no Rust reference to it exists.
        done(unsafe { ioctl_with_ref(&self.0, SET_VRING_ADDR(), &addresses) })?;
        self.set_file(SET_VRING_ERR(), direction, ends.error.as_raw_fd())?;
        self.set_file(SET_VRING_CALL(), direction, ends.call.as_raw_fd())?;
        self.set_file(SET_VRING_KICK(), direction, ends.kick.as_raw_fd())?;
        self.set_file(NET_SET_BACKEND(), direction, tap.as_raw_fd())
    }

    /// Stops the kernel from serving a queue. After this it does not touch the memory any more.
    pub(super) fn stop(&self, direction: Direction) -> io::Result<()> {
        self.set_file(NET_SET_BACKEND(), direction, NONE)?;
        self.set_file(SET_VRING_KICK(), direction, NONE)?;
        self.set_file(SET_VRING_CALL(), direction, NONE)?;
        self.set_file(SET_VRING_ERR(), direction, NONE)
    }

    fn set_state(&self, request: c_ulong, direction: Direction, value: u16) -> io::Result<()> {
        let state = RingState { index: direction.index(), value: value.into() };
        // SAFETY: the kernel reads one structure.
        done(unsafe { ioctl_with_ref(&self.0, request, &state) })
    }

    fn set_file(&self, request: c_ulong, direction: Direction, fd: RawFd) -> io::Result<()> {
        let file = RingFile { index: direction.index(), fd };
        // SAFETY: the kernel reads one structure, and takes a reference to the file for itself.
        done(unsafe { ioctl_with_ref(&self.0, request, &file) })
    }
}

impl Onlooker for Vhost {
    fn show(&self, memory: &GuestMemory) -> io::Result<()> {
        let table = table(memory);
        // SAFETY: the kernel reads as many regions as the header says. They are guest memory, which
        // stays mapped for as long as it may be used.
        done(unsafe { ioctl_with_ptr(&self.0, SET_MEM_TABLE(), table.as_ptr()) })
    }
}

/// `struct vhost_memory`: how many regions, then each: its guest physical address, its length,
/// where it is in this process, flags.
fn table(memory: &GuestMemory) -> Vec<u64> {
    let mut table = vec![memory.num_regions() as u64];
    for region in memory.iter() {
        table.extend([region.start_addr().0, region.len(), region.as_ptr() as u64, 0]);
    }
    table
}

impl Direction {
    /// The index of the queue within its pair.
    fn index(self) -> u32 {
        match self {
            Self::Receive => 0,
            Self::Transmit => 1,
        }
    }
}

fn done(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::super::super::mock;
    use super::*;

    #[test]
    fn the_kernel_is_shown_each_region_where_it_is() {
        let memory = mock::memory();
        let high = memory.iter().nth(1).unwrap().as_ptr() as u64;
        let table = table(&memory);
        assert_eq!(table.len(), 1 + 2 * 4);
        assert_eq!((table[0], &table[1..3]), (2, &[0, mock::LOW_END][..]));
        assert_eq!(table[5..], [mock::HIGH_START, mock::HIGH_END - mock::HIGH_START, high, 0]);
    }

    #[test]
    fn another_file_is_refused() {
        assert!(Vhost::new(File::open("/dev/null").unwrap().into()).is_err());
    }
}
