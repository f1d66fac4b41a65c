//! Memory that is plugged while the machine runs, VIRTIO 1.2 §5.15.
//!
//! The device owns a region of guest physical addresses and says how much of it the driver should
//! have plugged. The driver asks for blocks, and may use those that it was given. It cannot plug
//! more than the host has requested, and the host cannot request more than the region.
//!
//! The front of the region is memory that KVM and the devices know; behind it there is none. So a
//! guest that uses blocks without asking for them gets no more than the host has put there
//! ([`crate::memory`]): the usable size, which are whole steps, or what was requested where huge
//! pages hold it. An honest driver plugs the first free block. The usable size does not shrink.
//!
//! NUMA nodes are not offered: the machine has one.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory as _, Permissions};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Chain, GuestMemory};
use super::worker::Sources;
use super::{ConfigSpace, Context, Device, Identity, Ready, Serve, ServeError};
use crate::devices::rate_limit::guest_warn;
use crate::memory::release;

/// The device type, §5.15.1.
pub(crate) const DEVICE_ID: u32 = 24;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver does not touch what is not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// The one queue, §5.15.2. Linux sends one request at a time.
const QUEUE_SIZES: &[u16] = &[16];
/// The unit of plugging and unplugging: a huge page, so that the host can back it by one.
const BLOCK_BYTES: u64 = 2 << 20;
/// Offsets in the configuration space, §5.15.4.
const BLOCK_SIZE: usize = 0;
const ADDRESS: usize = 16;
const REGION_SIZE: usize = 24;
const USABLE_SIZE: usize = 32;
const PLUGGED_SIZE: usize = 40;
const REQUESTED_SIZE: usize = 48;
const CONFIG_BYTES: usize = 56;
/// Request types, §5.15.6.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const REQUEST_BYTES: usize = 24;
const RESPONSE_BYTES: usize = 10;
/// Token of the handle's event.
const REQUESTED: u32 = 0;

/// Where memory can be plugged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) start: GuestAddress,
    /// The region becomes usable in steps of this size; whole blocks.
    step: u64,
    /// The size of the region; whole steps.
    bytes: u64,
}

impl Region {
    /// A region of at least `mib`.
    pub(crate) fn new(start: GuestAddress, step: u64, mib: u32) -> Self {
        Self { start, step, bytes: (u64::from(mib) << 20).next_multiple_of(step) }
    }

    /// Rounds `mib` up to whole steps, in bytes.
    ///
    /// # Errors
    /// When the region is smaller.
    pub(crate) fn steps(&self, mib: u32) -> io::Result<u64> {
        let bytes = (u64::from(mib) << 20).next_multiple_of(self.step);
        self.check(bytes)?;
        Ok(bytes)
    }

    /// Checks that there is room for this much.
    ///
    /// # Errors
    /// When the region is smaller.
    pub(crate) fn check(&self, bytes: u64) -> io::Result<()> {
        if bytes <= self.bytes {
            return Ok(());
        }
        let words = format!("there is room for {} MiB", self.bytes >> 20);
        Err(io::Error::new(io::ErrorKind::InvalidInput, words))
    }

    /// The address behind the region.
    pub(crate) const fn end(&self) -> GuestAddress {
        GuestAddress(self.start.0 + self.bytes)
    }
}

/// Makes a device with nothing plugged, and the handle that requests memory.
///
/// # Errors
/// When the host has no descriptors left.
pub(crate) fn device(region: Region) -> io::Result<(Device<Mem>, MemHandle)> {
    let config = ConfigSpace::read_only(vec![0; CONFIG_BYTES]);
    config.set_u64(BLOCK_SIZE, BLOCK_BYTES);
    config.set_u64(ADDRESS, region.start.0);
    config.set_u64(REGION_SIZE, region.bytes);
    let changed = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let logic = Mem {
        config: config.clone(),
        changed: Arc::clone(&changed),
        start: region.start,
        plugged: Vec::new(),
    };
    let features = F_UNPLUGGED_INACCESSIBLE;
    let identity = Identity { device_id: DEVICE_ID, features, queue_sizes: QUEUE_SIZES };
    let device = Device::new(identity, config.clone(), logic);
    Ok((device, MemHandle { config, changed, region }))
}

/// Sets how much memory the driver should plug, and tells how far it got.
#[derive(Clone, Debug)]
pub(crate) struct MemHandle {
    config: ConfigSpace,
    changed: Arc<EventFd>,
    region: Region,
}

impl MemHandle {
    /// Where memory can be plugged.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// Asks the driver to plug `bytes` in total: whole blocks, which are guest memory already.
    ///
    /// # Errors
    /// When the device's thread cannot be woken; the driver sees the size when it next looks.
    pub(crate) fn request(&self, bytes: u64) -> io::Result<()> {
        // The usable size comes first: a driver must not be asked for more than it can have.
        let usable = bytes.next_multiple_of(self.region.step);
        self.config.set_u64(USABLE_SIZE, usable.max(self.config.u64(USABLE_SIZE)));
        self.config.set_u64(REQUESTED_SIZE, bytes);
        match self.changed.write(1) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// What the driver has plugged.
    pub(crate) fn plugged_mib(&self) -> u32 {
        u32::try_from(self.config.u64(PLUGGED_SIZE) >> 20).unwrap_or(u32::MAX)
    }
}

/// The logic of the device.
#[derive(Debug)]
pub(crate) struct Mem {
    config: ConfigSpace,
    /// Readable when the requested size changed.
    changed: Arc<EventFd>,
    start: GuestAddress,
    /// Whether each usable block is plugged. A reset does not change this, §5.15.5.2.
    plugged: Vec<bool>,
}

/// The response to a request, §5.15.6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    Ack,
    /// The state of the blocks that were asked about.
    State(BlockState),
    /// Not now: more than the host has requested.
    Nack,
    /// Not now: try again.
    Busy,
    /// The request is invalid.
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

impl Response {
    fn encode(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state): (u16, u16) = match self {
            Self::Ack => (0, 0),
            Self::State(BlockState::Plugged) => (0, 0),
            Self::State(BlockState::Unplugged) => (0, 1),
            Self::State(BlockState::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; RESPONSE_BYTES];
        let [first, second, .., third, fourth] = &mut bytes;
        [*first, *second] = kind.to_le_bytes();
        [*third, *fourth] = state.to_le_bytes();
        bytes
    }
}

impl Serve for Mem {
    const NAME: &'static str = "mem";
    // Pages are given back by `madvise`, which the worker's own list has.
    const SYSCALLS: &'static [i64] = &[];

    fn start(&mut self, _features: u64, sources: &Sources) -> io::Result<()> {
        sources.add(&*self.changed, REQUESTED, EventSet::IN)
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        let memory = context.memory;
        let Some(queue) = context.queues.first_mut() else { return Ok(()) };
        match ready {
            Ready::Queue(_) => queue.drain(memory, |chain| self.answer(chain, memory)),
            Ready::Source(_) => {
                // Nonblocking: a spurious wake-up finds nothing to clear.
                let _ = self.changed.read();
                Ok(queue.line().raise_config()?)
            }
        }
    }

    fn stop(&mut self, sources: &Sources) {
        // Does not fail: it is registered, or the epoll instance is about to be closed.
        let _ = sources.remove(&*self.changed);
    }
}

impl Mem {
    /// Executes the request of one chain.
    fn answer(&mut self, chain: &mut Chain, memory: &GuestMemory) -> Result<usize, ServeError> {
        if chain.writable.left() < RESPONSE_BYTES {
            return Err(ServeError::Request("there is no room for the response"));
        }
        let mut request = [0; REQUEST_BYTES];
        chain.readable.read(memory, &mut request)?;
        let response = self.execute(&request, memory);
        chain.writable.write(memory, &response.encode())?;
        Ok(RESPONSE_BYTES)
    }

    fn execute(&mut self, request: &[u8; REQUEST_BYTES], memory: &GuestMemory) -> Response {
        // struct virtio_mem_req: type, padding, then address, number of blocks, padding
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = *request;
        let kind = u16::from_le_bytes([t0, t1]);
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let count = u16::from_le_bytes([n0, n1]);
        let usable = self.config.u64(USABLE_SIZE) / BLOCK_BYTES;
        // One for each usable block, so the host decides how many there are, not the guest.
        self.plugged.resize(usize::try_from(usable).unwrap_or(usize::MAX), false);
        if kind == UNPLUG_ALL {
            return self.unplug(0, self.plugged.len(), memory);
        }
        let Some(first) = self.block_at(address) else { return Response::Error };
        let count = usize::from(count);
        let Some(state) = self.state(first, count) else { return Response::Error };
        match (kind, state) {
            (PLUG, BlockState::Unplugged) => self.plug(first, count),
            (UNPLUG, BlockState::Plugged) => self.unplug(first, count, memory),
            (STATE, state) => Response::State(state),
            _ => Response::Error,
        }
    }

    /// The number of the block that begins at an address.
    fn block_at(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.start.0)?;
        let whole = offset.is_multiple_of(BLOCK_BYTES);
        whole.then(|| usize::try_from(offset / BLOCK_BYTES).ok()).flatten()
    }

    /// The state of this many usable blocks; `None` if some are not usable, or there is none.
    fn state(&self, first: usize, count: usize) -> Option<BlockState> {
        let blocks = self.plugged.get(first..first.checked_add(count)?)?;
        Some(match blocks.iter().filter(|plugged| **plugged).count() {
            _ if blocks.is_empty() => return None,
            0 => BlockState::Unplugged,
            all if all == count => BlockState::Plugged,
            _ => BlockState::Mixed,
        })
    }

    fn plug(&mut self, first: usize, count: usize) -> Response {
        let then = self.config.u64(PLUGGED_SIZE) + count as u64 * BLOCK_BYTES;
        if then > self.config.u64(REQUESTED_SIZE) {
            return Response::Nack;
        }
        self.set(first, count, true);
        Response::Ack
    }

    fn unplug(&mut self, first: usize, count: usize, memory: &GuestMemory) -> Response {
        // Neither overflows: usable blocks have valid addresses.
        let start = GuestAddress(self.start.0 + first as u64 * BLOCK_BYTES);
        let len = usize::try_from(count as u64 * BLOCK_BYTES).unwrap_or(usize::MAX);
        if count == 0 {
            return Response::Ack;
        }
        // Blocks that became usable after this worker took its snapshot are not in it.
        let Ok(slices) = memory.get_slices(start, len, Permissions::ReadWrite) else {
            return Response::Busy;
        };
        for slice in slices {
            let Ok(slice) = slice else { return Response::Busy };
            if let Err(error) = release(memory, &slice) {
                guest_warn!("mem: cannot give {} bytes back to the host: {error}", slice.len());
            }
        }
        self.set(first, count, false);
        Response::Ack
    }

    fn set(&mut self, first: usize, count: usize, plugged: bool) {
        for block in self.plugged.iter_mut().skip(first).take(count) {
            *block = plugged;
        }
        let all = self.plugged.iter().filter(|plugged| **plugged).count() as u64;
        self.config.set_u64(PLUGGED_SIZE, all * BLOCK_BYTES);
    }
}

#[cfg(test)]
mod tests;
