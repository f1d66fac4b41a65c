//! The memory balloon, VIRTIO 1.2 §5.5: takes memory back from a guest.
//!
//! There are two ways. The host sets a target and the driver inflates the balloon by as many pages;
//! or the driver reports ranges that it has freed, without being asked (free page reporting).
//! Either way the pages are dropped from this process and read as zeroes when the guest touches
//! them again.
//!
//! Statistics, hints for migration and page poisoning are not offered. A driver whose kernel
//! fills free pages with a pattern thus does not report them, and leaves that queue unset.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Chain, GuestMemory};
use super::worker::Sources;
use super::{ConfigSpace, Context, Device, Identity, Ready, Serve, ServeError};
use crate::devices::rate_limit::guest_warn;
use crate::memory::release;

/// The device type, §5.5.1.
pub(crate) const DEVICE_ID: u32 = 5;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the driver may take pages back instead of killing processes.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_REPORTING`: the driver reports free pages.
const F_REPORTING: u64 = 1 << 5;
/// The queues, §5.5.2. Queues of features that are not offered do not exist, and Linux numbers
/// those that do without gaps.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
const QUEUE_SIZES: &[u16] = &[128, 128, 128];
/// Offsets in the configuration space, §5.5.4.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const CONFIG_BYTES: usize = 8;
/// The unit of page numbers, whatever the guest's pages are, §5.5.6.
const PAGE_BYTES: u64 = 4096;
const PAGES_PER_MIB: u32 = 256;
/// Page numbers that one request may hold; Linux sends 256.
const REQUEST_PAGES_MAX: usize = 1 << 14;
/// Page numbers copied at once.
const CHUNK_PAGES: usize = 256;
/// Token of the handle's event.
const TARGET: u32 = 0;

/// Makes an empty balloon and the handle that sets its size.
///
/// # Errors
/// When the host has no descriptors left.
pub(crate) fn device() -> io::Result<(Device<Balloon>, BalloonHandle)> {
    let config = ConfigSpace::with_writable(vec![0; CONFIG_BYTES], ACTUAL..ACTUAL + 4);
    let changed = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let logic = Balloon { changed: Arc::clone(&changed) };
    let features = F_DEFLATE_ON_OOM | F_REPORTING;
    let identity = Identity { device_id: DEVICE_ID, features, queue_sizes: QUEUE_SIZES };
    let device = Device::new(identity, config.clone(), logic);
    Ok((device, BalloonHandle { config, changed }))
}

/// Sets the size of a balloon and tells how far the driver got.
#[derive(Clone, Debug)]
pub(crate) struct BalloonHandle {
    config: ConfigSpace,
    changed: Arc<EventFd>,
}

impl BalloonHandle {
    /// Asks the driver to give up `mib` in total.
    ///
    /// # Errors
    /// When no guest can have that much memory, or the device's thread cannot be woken; in the
    /// second case the driver sees the target when it next reads the configuration.
    pub(crate) fn set_target_mib(&self, mib: u32) -> io::Result<()> {
        let pages = mib.checked_mul(PAGES_PER_MIB).ok_or(io::ErrorKind::InvalidInput)?;
        self.config.set_u32(NUM_PAGES, pages);
        match self.changed.write(1) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// The size of the balloon as the driver reports it, rounded down.
    pub(crate) fn actual_mib(&self) -> u32 {
        self.config.u32(ACTUAL) / PAGES_PER_MIB
    }
}

/// The logic of the device.
#[derive(Debug)]
pub(crate) struct Balloon {
    /// Readable when the target changed.
    changed: Arc<EventFd>,
}

impl Serve for Balloon {
    const NAME: &'static str = "balloon";
    // Pages are given back by `madvise`, which the worker's own list has.
    const SYSCALLS: &'static [i64] = &[];

    fn start(&mut self, _features: u64, sources: &Sources) -> io::Result<()> {
        sources.add(&*self.changed, TARGET, EventSet::IN)
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        match ready {
            Ready::Queue(index) => drain(index, context),
            Ready::Source(_) => {
                // Nonblocking: a spurious wake-up finds nothing to clear.
                let _ = self.changed.read();
                if let Some(queue) = context.queues.first() {
                    queue.line().raise_config()?;
                }
                Ok(())
            }
        }
    }

    fn stop(&mut self, sources: &Sources) {
        // Does not fail: it is registered, or the epoll instance is about to be closed.
        let _ = sources.remove(&*self.changed);
    }
}

/// Answers the requests that wait in a queue.
fn drain(index: usize, context: &mut Context<'_>) -> Result<(), ServeError> {
    let memory = context.memory;
    let Some(queue) = context.queues.get_mut(index) else { return Ok(()) };
    queue.drain(memory, |chain| {
        match index {
            INFLATE => inflate(chain, memory)?,
            REPORTING => take_reported(chain, memory)?,
            // §5.5.6.1: the driver may use deflated pages at once; there is nothing to prepare.
            DEFLATE => {}
            _ => return Err(ServeError::Request("balloon has no such queue")),
        }
        Ok(0)
    })
}

/// Drops the pages whose numbers the driver lists, §5.5.6.
fn inflate(chain: &mut Chain, memory: &GuestMemory) -> Result<(), ServeError> {
    let list = &mut chain.readable;
    if !list.left().is_multiple_of(4) || list.left() > REQUEST_PAGES_MAX * 4 {
        return Err(ServeError::Request("list of balloon pages has an odd length"));
    }
    let mut run = 0..0;
    while list.left() > 0 {
        let mut bytes = [0; CHUNK_PAGES * 4];
        let count = list.left().min(bytes.len());
        let bytes = bytes.get_mut(..count).unwrap_or_default();
        list.read(memory, bytes)?;
        for number in bytes.as_chunks::<4>().0 {
            let page = u64::from(u32::from_le_bytes(*number));
            // Adjacent pages, in either order, are given back with one call.
            if page == run.end {
                run.end += 1;
            } else if page + 1 == run.start {
                run.start = page;
            } else {
                release_pages(&run, memory)?;
                run = page..page + 1;
            }
        }
    }
    release_pages(&run, memory)
}

fn release_pages(run: &std::ops::Range<u64>, memory: &GuestMemory) -> Result<(), ServeError> {
    const OUTSIDE: ServeError = ServeError::Request("balloon page is outside of memory");
    if run.is_empty() {
        return Ok(());
    }
    // Page numbers have 32 bits: neither product overflows.
    let start = GuestAddress(run.start * PAGE_BYTES);
    let len = usize::try_from((run.end - run.start) * PAGE_BYTES).map_err(|_| OUTSIDE)?;
    if !memory.check_range(start, len, Permissions::ReadWrite) {
        return Err(OUTSIDE);
    }
    for slice in memory.get_slices(start, len, Permissions::ReadWrite).map_err(|_| OUTSIDE)? {
        give_back(memory, &slice.map_err(|_| OUTSIDE)?);
    }
    Ok(())
}

/// Drops the ranges that the driver reports: here the buffers themselves are the pages.
fn take_reported(chain: &mut Chain, memory: &GuestMemory) -> Result<(), ServeError> {
    let all = chain.writable.left();
    for slice in chain.writable.slices(memory, all)? {
        give_back(memory, &slice);
    }
    Ok(())
}

/// Drops the whole pages of a run of guest memory.
fn give_back(memory: &GuestMemory, slice: &VolatileSlice<'_>) {
    if let Err(error) = release(memory, slice) {
        guest_warn!("balloon: cannot give {} bytes back to the host: {error}", slice.len());
    }
}

#[cfg(test)]
mod tests;
