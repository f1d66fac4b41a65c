//! A virtqueue from the device's side, VIRTIO 1.2 §2.7.
//!
//! [`DeviceQueue::pop_or_arm`] walks a chain once: every descriptor is copied out of guest memory,
//! its range checked against the memory that exists, and only then kept in a [`Chain`]. A chain
//! owns addresses, not references, so a device can keep it for as long as a request takes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, Permissions, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

use super::ServeError;
use super::transport::Line;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, the one flag of a driver.
const NO_INTERRUPT: u16 = 1;
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
    /// Another server of the queue, such as vhost-net, needs each ring in one piece.
    #[error("{len} bytes of a ring at {addr:#x} are not one piece of memory")]
    Pieces { addr: u64, len: usize },
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
    /// In reverse order, so that consuming is popping.
    segments: Vec<Segment>,
    left: usize,
    used: usize,
}

impl Buffers {
    fn clear(&mut self) {
        self.segments.clear();
        (self.left, self.used) = (0, 0);
    }

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

    /// How many pieces of guest memory they are.
    pub(crate) fn pieces(&self) -> usize {
        self.segments.len()
    }

    /// Appends the bytes that are not yet consumed to `slices`, without consuming them.
    pub(crate) fn gather<'m>(
        &self,
        memory: &'m GuestMemory,
        slices: &mut Vec<VolatileSlice<'m>>,
    ) -> Result<(), QueueError> {
        for segment in self.segments.iter().rev() {
            visit(memory, segment.addr, segment.len as usize, |slice| slices.push(slice))?;
        }
        Ok(())
    }

    /// Consumes up to `len` bytes as host slices; fewer when the buffers end.
    pub(crate) fn slices<'m>(
        &mut self,
        memory: &'m GuestMemory,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'m>>, QueueError> {
        let mut slices = Vec::new();
        self.consume(memory, len, |slice| slices.push(slice))?;
        Ok(slices)
    }

    /// Copies exactly `data.len()` bytes out of the guest.
    pub(crate) fn read(&mut self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), QueueError> {
        self.check(data.len())?;
        let len = data.len();
        let mut rest = data;
        self.consume(memory, len, |slice| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(slice.len());
            slice.copy_to(now);
            rest = later;
        })
    }

    /// Copies all of `data` into the guest.
    pub(crate) fn write(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), QueueError> {
        self.check(data.len())?;
        let mut rest = data;
        self.consume(memory, data.len(), |slice| {
            let (now, later) = rest.split_at(slice.len());
            slice.copy_from(now);
            rest = later;
        })
    }

    /// Consumes up to `len` bytes, one run of host memory after the other.
    fn consume<'m>(
        &mut self,
        memory: &'m GuestMemory,
        len: usize,
        mut each: impl FnMut(VolatileSlice<'m>),
    ) -> Result<(), QueueError> {
        let mut wanted = len.min(self.left);
        while wanted > 0
            && let Some(mut segment) = self.segments.pop()
        {
            let take = (segment.len as usize).min(wanted);
            visit(memory, segment.addr, take, &mut each)?;
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
        Ok(())
    }

    fn check(&self, needs: usize) -> Result<(), QueueError> {
        let has = self.left;
        if has < needs { Err(QueueError::Short { has, needs }) } else { Ok(()) }
    }
}

/// Calls `each` for the runs of host memory that back a range of guest memory.
fn visit<'m>(
    memory: &'m GuestMemory,
    addr: GuestAddress,
    len: usize,
    mut each: impl FnMut(VolatileSlice<'m>),
) -> Result<(), QueueError> {
    let range = memory
        .get_slices(addr, len, Permissions::ReadWrite)
        .map_err(virtio_queue::Error::GuestMemoryError)?;
    for slice in range {
        each(slice.map_err(virtio_queue::Error::GuestMemoryError)?);
    }
    Ok(())
}

/// A field of a ring, read once.
fn load(memory: &GuestMemory, addr: u64) -> Result<u16, QueueError> {
    let value = memory.load(GuestAddress(addr), Ordering::Relaxed).map(u16::from_le);
    Ok(value.map_err(virtio_queue::Error::GuestMemory)?)
}

/// Address of a range of guest memory in this process. Guest memory stays mapped.
fn in_process(memory: &GuestMemory, addr: u64, len: usize) -> Result<u64, QueueError> {
    let mut found = None;
    visit(memory, GuestAddress(addr), len, |slice| found = found.or(Some(slice)))?;
    let whole = found.filter(|slice| slice.len() == len);
    let slice = whole.ok_or(QueueError::Pieces { addr, len })?;
    Ok(slice.ptr_guard_mut().as_ptr() as u64)
}

/// A request of the driver: what the device reads, then what it writes.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// Names the chain when it is given back.
    pub(crate) head: u16,
    /// For the device to read.
    pub(crate) readable: Buffers,
    /// For the device to write.
    pub(crate) writable: Buffers,
}

impl Chain {
    /// Copies a chain's descriptors out of guest memory and checks them. Replaces what the chain
    /// was before, and reuses its allocations.
    fn walk(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
        length_max: u16,
    ) -> Result<(), QueueError> {
        let head = chain.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
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
                self.writable.push(segment);
            } else if self.writable.segments.is_empty() {
                self.readable.push(segment);
            } else {
                return Err(QueueError::Order { head });
            }
        }
        self.readable.segments.reverse();
        self.writable.segments.reverse();
        if complete { Ok(()) } else { Err(QueueError::Chain { head }) }
    }
}

/// The addresses of a queue's rings in this process, for another server of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rings {
    pub(crate) size: u16,
    /// The first index of the available ring that was not taken yet.
    pub(crate) next: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// A queue that the driver set up.
#[derive(Debug)]
pub(crate) struct DeviceQueue {
    queue: Queue,
    /// Readable when the driver kicked.
    kick: Arc<EventFd>,
    line: Arc<Line>,
    /// The used index when the driver was last considered for an interrupt.
    signalled: u16,
}

impl DeviceQueue {
    pub(crate) fn new(queue: Queue, kick: Arc<EventFd>, line: Arc<Line>) -> Self {
        let signalled = queue.next_used();
        Self { queue, kick, line, signalled }
    }

    /// Whether the driver set the queue up. It may leave out those that it does not use.
    pub(crate) fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// The most chains that the driver can have made available at once.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The addresses of its rings, VIRTIO 1.3 §2.7.
    pub(crate) fn rings(&self, memory: &GuestMemory) -> Result<Rings, QueueError> {
        let count = usize::from(self.queue.size());
        Ok(Rings {
            size: self.queue.size(),
            next: self.queue.next_avail(),
            descriptors: in_process(memory, self.queue.desc_table(), 16 * count)?,
            available: in_process(memory, self.queue.avail_ring(), 6 + 2 * count)?,
            used: in_process(memory, self.queue.used_ring(), 6 + 8 * count)?,
        })
    }

    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The interrupt line and status of the device that the queue belongs to.
    pub(crate) fn line(&self) -> &Line {
        &self.line
    }

    /// The next chain that the driver made available.
    #[cfg(test)]
    pub(crate) fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        let mut chain = Chain::default();
        Ok(self.pop_into(memory, &mut chain)?.then_some(chain))
    }

    /// Reads the next available chain into `chain`, reusing its allocations; `false` without one.
    fn pop_into(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueError> {
        // The iterator lives for one step only, so that the ring index is checked each time.
        let Some(found) = self.queue.iter(memory)?.next() else { return Ok(false) };
        chain.walk(found, memory, self.queue.size())?;
        Ok(true)
    }

    /// Puts back the chain that was popped last, to pop it again later.
    pub(crate) fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Completes a chain, with `written` bytes of its writable part filled.
    pub(crate) fn complete(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: usize,
    ) -> Result<(), QueueError> {
        self.fill(memory, 0, (head, written))?;
        self.publish(memory, 1)
    }

    /// Writes a used element, `ahead` places after those that the driver sees. The driver sees it
    /// only after [`DeviceQueue::publish`], so elements that belong together appear at once.
    pub(crate) fn fill(
        &self,
        memory: &GuestMemory,
        ahead: u16,
        (head, written): (u16, usize),
    ) -> Result<(), QueueError> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        let index = self.queue.next_used().wrapping_add(ahead) % self.queue.size();
        // The ring was inside of memory when it was set up, as were the other addresses here.
        let element = GuestAddress(self.queue.used_ring() + 4 + 8 * u64::from(index));
        // struct virtq_used_elem: the head, then the length.
        let value = u64::from(head) | u64::from(written) << 32;
        let result = memory.write_obj(value.to_le(), element);
        Ok(result.map_err(virtio_queue::Error::GuestMemory)?)
    }

    /// How many chains were completed, modulo 65536.
    pub(crate) fn published(&self) -> u16 {
        self.queue.next_used()
    }

    /// Shows the driver this many chains that were filled.
    pub(crate) fn publish(&mut self, memory: &GuestMemory, count: u16) -> Result<(), QueueError> {
        let next = self.queue.next_used().wrapping_add(count);
        self.queue.set_next_used(next);
        let index = GuestAddress(self.queue.used_ring() + 2);
        let result = memory.store(next.to_le(), index, Ordering::Release);
        Ok(result.map_err(virtio_queue::Error::GuestMemory)?)
    }

    /// Interrupts the driver if it wants to know of what was published since the last call.
    pub(crate) fn signal(&mut self, memory: &GuestMemory) -> Result<(), ServeError> {
        if self.wants_signal(memory)? {
            self.line.raise_queue()?;
        }
        Ok(())
    }

    /// VIRTIO 1.2 §2.7.7.2: whether the driver wants to know of what was published since the last
    /// call. With event indices (§2.7.10) the driver's flags do not count; what counts is whether
    /// the used index has passed the index that the driver waits for.
    fn wants_signal(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let now = self.queue.next_used();
        let before = std::mem::replace(&mut self.signalled, now);
        if now == before {
            return Ok(false);
        }
        // The driver must see what was published before its flags or its event index are read.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        if !self.queue.event_idx_enabled() {
            return Ok(load(memory, avail)? & NO_INTERRUPT == 0);
        }
        let event = load(memory, avail + 4 + 2 * u64::from(self.queue.size()))?;
        Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before))
    }

    /// Asks for a kick at the next chain; `true` when one arrived meanwhile.
    pub(crate) fn arm(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// The next available chain; if there is none, the driver will kick at the next one.
    pub(crate) fn pop_or_arm(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        let mut chain = Chain::default();
        Ok(self.pop_or_arm_into(memory, &mut chain)?.then_some(chain))
    }

    /// Like [`DeviceQueue::pop_or_arm`], into an existing chain; `false` if there is none.
    pub(crate) fn pop_or_arm_into(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        // A chain may have come before the driver saw that a kick is wanted.
        Ok(self.pop_into(memory, chain)? || (self.arm(memory)? && self.pop_into(memory, chain)?))
    }

    /// Serves the available chains, and interrupts the driver if there were any. `answer` executes
    /// the request of a chain and returns how many bytes of its writable part it filled.
    ///
    /// A driver that adds chains as fast as they are served does not occupy the worker for ever:
    /// after [`BATCH`] of them the queue kicks itself, and is served again later.
    pub(crate) fn drain(
        &mut self,
        memory: &GuestMemory,
        mut answer: impl FnMut(&mut Chain) -> Result<usize, ServeError>,
    ) -> Result<(), ServeError> {
        let mut chain = Chain::default();
        let mut served = 0;
        loop {
            if served == BATCH {
                self.kick_again()?;
                break;
            }
            if !self.pop_or_arm_into(memory, &mut chain)? {
                break;
            }
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
            // The eventfd is readable already, which is enough.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}
