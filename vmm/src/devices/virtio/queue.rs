//! A virtqueue from the device's side, VIRTIO 1.2 §2.7.
//!
//! [`DeviceQueue::pop`] walks a chain once: every descriptor is copied out of guest memory, its
//! range checked against the memory that exists, and only then kept in a [`Chain`]. A chain owns
//! addresses, not references, so a device can keep it for as long as a request takes.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::ServeError;
use super::transport::Line;

/// Chains served before the worker looks at anything else.
const BATCH: usize = 128;

/// The guest's memory.
pub(crate) type GuestMemory = GuestMemoryMmap<()>;

/// The driver broke the rules of a queue.
#[derive(Debug, Error)]
pub(crate) enum QueueError {
    /// More chains than the queue has, or rings outside of memory.
    #[error("rings are inconsistent: {0}")]
    Rings(#[from] virtio_queue::Error),
    /// No descriptors, more than the queue has, or a next one that cannot be followed.
    #[error("chain {head} is cut off, loops or is too long")]
    Chain { head: u16 },
    /// A buffer that is not guest memory.
    #[error("chain {head} has {len} bytes at {addr:#x} outside of memory")]
    Buffer { head: u16, addr: u64, len: u32 },
    /// VIRTIO 1.2 §2.7.4.2: device-readable descriptors come first.
    #[error("chain {head} has a readable buffer after a writable one")]
    Order { head: u16 },
    /// More bytes than any request has.
    #[error("chain {head} is longer than 4 GiB")]
    Length { head: u16 },
    /// A request ended before its fields did.
    #[error("chain has {has} bytes left where {needs} are needed")]
    Short { has: usize, needs: usize },
}

/// A run of guest memory, checked to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    addr: GuestAddress,
    len: u32,
}

/// The buffers of one direction, consumed front to back.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    /// Back to front, so that consuming is popping.
    segments: Vec<Segment>,
    left: usize,
    used: usize,
}

impl Buffers {
    fn push(&mut self, segment: Segment) {
        self.left += segment.len as usize;
        self.segments.push(segment);
    }

    /// Bytes not yet consumed.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Bytes consumed.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Consumes up to `len` bytes as host slices; fewer when the buffers end.
    pub(crate) fn slices<'m>(
        &mut self,
        memory: &'m GuestMemory,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'m>>, QueueError> {
        let mut slices = Vec::new();
        let mut wanted = len.min(self.left);
        while wanted > 0
            && let Some(mut segment) = self.segments.pop()
        {
            let take = (segment.len as usize).min(wanted);
            let range = memory
                .get_slices(segment.addr, take, Permissions::ReadWrite)
                .map_err(virtio_queue::Error::GuestMemoryError)?;
            for slice in range {
                slices.push(slice.map_err(virtio_queue::Error::GuestMemoryError)?);
            }
            if take < segment.len as usize {
                segment.addr = GuestAddress(segment.addr.0 + take as u64);
                // `take` is below `segment.len`, which is a u32.
                segment.len -= u32::try_from(take).unwrap_or(segment.len);
                self.segments.push(segment);
            }
            wanted -= take;
            self.left -= take;
            self.used += take;
        }
        Ok(slices)
    }

    /// Copies exactly `data.len()` bytes out of the guest.
    pub(crate) fn read(&mut self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), QueueError> {
        self.check(data.len())?;
        let mut rest = data;
        for slice in self.slices(memory, rest.len())? {
            let (now, later) = rest.split_at_mut(slice.len());
            slice.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    /// Copies all of `data` into the guest.
    pub(crate) fn write(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), QueueError> {
        self.check(data.len())?;
        let mut rest = data;
        for slice in self.slices(memory, rest.len())? {
            let (now, later) = rest.split_at(slice.len());
            slice.copy_from(now);
            rest = later;
        }
        Ok(())
    }

    fn check(&self, needs: usize) -> Result<(), QueueError> {
        let has = self.left;
        if has < needs { Err(QueueError::Short { has, needs }) } else { Ok(()) }
    }
}

/// A request of the driver: what the device reads, then what it writes.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Names the chain when it is given back.
    pub(crate) head: u16,
    /// For the device to read.
    pub(crate) readable: Buffers,
    /// For the device to write.
    pub(crate) writable: Buffers,
}

impl Chain {
    /// Copies a chain's descriptors out of guest memory and checks them.
    fn walk(
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
        length_max: u16,
    ) -> Result<Self, QueueError> {
        let head = chain.head_index();
        let mut walked = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut complete = false;
        let mut total = 0_u32;
        for (descriptor, length) in chain.zip(1_u32..) {
            // §2.7.5.3.1: an indirect table may be larger than the queue, a chain may not.
            if length > u32::from(length_max) {
                return Err(QueueError::Chain { head });
            }
            let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
            complete = !descriptor.has_next();
            total = total.checked_add(segment.len).ok_or(QueueError::Length { head })?;
            // A driver may send an empty buffer; it has no address worth checking.
            if segment.len == 0 {
                continue;
            }
            if !memory.check_range(segment.addr, segment.len as usize, Permissions::ReadWrite) {
                let (addr, len) = (segment.addr.0, segment.len);
                return Err(QueueError::Buffer { head, addr, len });
            }
            if descriptor.is_write_only() {
                walked.writable.push(segment);
            } else if walked.writable.segments.is_empty() {
                walked.readable.push(segment);
            } else {
                return Err(QueueError::Order { head });
            }
        }
        walked.readable.segments.reverse();
        walked.writable.segments.reverse();
        if complete { Ok(walked) } else { Err(QueueError::Chain { head }) }
    }
}

/// A queue that the driver set up.
#[derive(Debug)]
pub(crate) struct DeviceQueue {
    queue: Queue,
    /// Readable when the driver kicked.
    kick: Arc<EventFd>,
    line: Arc<Line>,
}

impl DeviceQueue {
    pub(crate) fn new(queue: Queue, kick: Arc<EventFd>, line: Arc<Line>) -> Self {
        Self { queue, kick, line }
    }

    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The interrupt line and status of the device that the queue belongs to.
    pub(crate) fn line(&self) -> &Line {
        &self.line
    }

    /// The next chain that the driver made available.
    pub(crate) fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        // The iterator borrows the queue for one step only: the ring index is checked each time.
        let Some(chain) = self.queue.iter(memory)?.next() else { return Ok(None) };
        Chain::walk(chain, memory, self.queue.size()).map(Some)
    }

    /// Puts back the chain popped last: nothing can be done with it now.
    pub(crate) fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back, `written` bytes of its writable part filled.
    pub(crate) fn complete(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: usize,
    ) -> Result<(), QueueError> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        Ok(self.queue.add_used(memory, head, written)?)
    }

    /// Interrupts the driver if it asked for that since the last time.
    pub(crate) fn signal(&mut self, memory: &GuestMemory) -> Result<(), ServeError> {
        if self.queue.needs_notification(memory).map_err(QueueError::from)? {
            self.line.raise_queue()?;
        }
        Ok(())
    }

    /// Asks for a kick at the next chain; `true` when one arrived meanwhile.
    pub(crate) fn arm(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// The next chain that the driver made available; without one, the driver kicks at the next.
    pub(crate) fn pop_or_arm(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if let Some(chain) = self.pop(memory)? {
            return Ok(Some(chain));
        }
        // One may have come before the driver saw that a kick is wanted.
        if self.arm(memory)? { self.pop(memory) } else { Ok(None) }
    }

    /// Serves what the driver made available, and interrupts it when something was. `answer` does
    /// what a chain asks for and says how many bytes of its writable part it filled.
    ///
    /// A driver that adds chains as fast as they are served does not keep the worker: after
    /// [`BATCH`] of them the queue kicks itself and comes back.
    pub(crate) fn drain(
        &mut self,
        memory: &GuestMemory,
        mut answer: impl FnMut(&mut Chain) -> Result<usize, ServeError>,
    ) -> Result<(), ServeError> {
        let mut served = 0;
        loop {
            if served == BATCH {
                self.kick_again()?;
                break;
            }
            let Some(mut chain) = self.pop_or_arm(memory)? else { break };
            let written = answer(&mut chain)?;
            self.complete(memory, chain.head, written)?;
            served += 1;
        }
        if served > 0 {
            self.signal(memory)?;
        }
        Ok(())
    }

    /// Makes the worker serve this queue again after it looked at everything else.
    pub(crate) fn kick_again(&self) -> io::Result<()> {
        match self.kick.write(1) {
            // Readable already, which is all that is wanted.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}
