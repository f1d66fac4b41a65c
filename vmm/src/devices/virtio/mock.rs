//! A driver for tests: lays queues and requests out in guest memory, as a guest would, and calls
//! a device's logic without a thread.

#![expect(clippy::unwrap_used, reason = "a guest that cannot be set up is a failed test")]

use std::sync::Arc;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{DeviceQueue, GuestMemory};
use super::transport::Line;
use super::worker::Sources;
use super::{Context, Ready, Serve, ServeError};

#[cfg(test)]
mod hostile;
mod script;

#[cfg(test)]
pub(crate) use hostile::{Random, malformed, survives_malformed, survives_noise};
pub(crate) use script::Script;

/// Descriptor flags, VIRTIO 1.2 §2.7.5.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Guest memory is two regions with a hole between them.
pub(crate) const LOW_END: u64 = 0x10_0000;
pub(crate) const HIGH_START: u64 = 0x20_0000;
pub(crate) const HIGH_END: u64 = 0x40_0000;
/// Address of the first queue; nothing lies below it.
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x4000;
/// Memory that is never allocated, free for indirect tables.
pub(crate) const TABLES: u64 = 0xf_0000;
/// Start of the buffers, which are reused in turn.
const BUFFERS: u64 = HIGH_START;

/// The memory of a guest.
pub(crate) fn memory() -> GuestMemory {
    let high = usize::try_from(HIGH_END - HIGH_START).unwrap();
    let low = usize::try_from(LOW_END).unwrap();
    GuestMemory::from_ranges(&[(GuestAddress(0), low), (GuestAddress(HIGH_START), high)]).unwrap()
}

/// A part of a request.
pub(crate) enum Part<'a> {
    /// For the device to read.
    Out(&'a [u8]),
    /// So many bytes for the device to write.
    In(u32),
}

/// A descriptor as it lies in memory: address, length, flags, next.
pub(crate) type Raw = (u64, u32, u16, u16);

/// A request that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) head: u16,
    /// The addresses and lengths of its writable parts.
    writable: Vec<(u64, u32)>,
}

/// A driver of one device.
pub(crate) struct Driver<'m> {
    memory: &'m GuestMemory,
    rings: Vec<Ring<'m>>,
    pub(crate) queues: Vec<DeviceQueue>,
    pub(crate) sources: Sources,
    pub(crate) line: Arc<Line>,
    next_buffer: u64,
}

/// One queue in memory. `MockSplitQueue` would lay it out, but lets the rings of a queue with more
/// than a few descriptors overlap.
struct Ring<'m> {
    table: DescriptorTable<'m, GuestMemory>,
    avail: AvailRing<'m, GuestMemory>,
    used: UsedRing<'m, GuestMemory>,
    size: u16,
    next_descriptor: u16,
    used_seen: u16,
}

impl<'m> Driver<'m> {
    /// Sets up queues of these sizes.
    pub(crate) fn new(memory: &'m GuestMemory, sizes: &[u16]) -> Self {
        let line = Arc::new(Line::new().unwrap());
        let mut rings = Vec::new();
        let mut queues = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let queue = queue(index, size);
            assert!(queue.is_valid(memory));
            let table = DescriptorTable::new(memory, GuestAddress(queue.desc_table()), size);
            let avail = AvailRing::new(memory, GuestAddress(queue.avail_ring()), size);
            let used = UsedRing::new(memory, GuestAddress(queue.used_ring()), size);
            let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            queues.push(DeviceQueue::new(queue, kick, Arc::clone(&line)));
            rings.push(Ring { table, avail, used, size, next_descriptor: 0, used_seen: 0 });
        }
        let sources = Sources::new().unwrap();
        Self { memory, rings, queues, sources, line, next_buffer: BUFFERS }
    }

    /// Makes a request available.
    pub(crate) fn add(&mut self, queue: usize, parts: &[Part<'_>]) -> Request {
        let mut raw = Vec::new();
        let mut writable = Vec::new();
        let ring = &self.rings[queue];
        let count = u16::try_from(parts.len()).unwrap();
        let head = if ring.next_descriptor + count > ring.size { 0 } else { ring.next_descriptor };
        for (position, part) in parts.iter().enumerate() {
            let next = head + u16::try_from(position).unwrap() + 1;
            let chained = if position + 1 < parts.len() { NEXT } else { 0 };
            raw.push(match *part {
                Part::Out(bytes) => {
                    let len = u32::try_from(bytes.len()).unwrap();
                    let addr = self.take_buffer(len);
                    self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
                    (addr, len, chained, next)
                }
                Part::In(len) => {
                    let addr = self.take_buffer(len);
                    writable.push((addr, len));
                    (addr, len, chained | WRITE, next)
                }
            });
        }
        self.store(queue, head, &raw);
        self.offer(queue, head);
        self.rings[queue].next_descriptor = head + count;
        Request { head, writable }
    }

    /// Writes descriptors from `at` of the table.
    pub(crate) fn store(&self, queue: usize, at: u16, raw: &[Raw]) {
        let table = &self.rings[queue].table;
        for (index, &(addr, len, flags, next)) in (at..).zip(raw) {
            table
                .store(index, RawDescriptor::from(Descriptor::new(addr, len, flags, next)))
                .unwrap();
        }
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&self, queue: usize, head: u16) {
        let Ring { avail, size, .. } = &self.rings[queue];
        let index = avail.idx().load();
        avail.ring().ref_at(usize::from(index % size)).unwrap().store(head);
        avail.idx().store(index.wrapping_add(1));
    }

    /// Sets the index up to which chains are available.
    pub(crate) fn set_available(&self, queue: usize, index: u16) {
        self.rings[queue].avail.idx().store(index);
    }

    /// What the device has completed since the last call: heads and lengths.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let Ring { used, size, used_seen, .. } = &mut self.rings[queue];
        let mut elements = Vec::new();
        while *used_seen != used.idx().load() {
            let index = usize::from(*used_seen % *size);
            let element = used.ring().ref_at(index).unwrap().load();
            elements.push((u16::try_from(element.id()).unwrap(), element.len()));
            *used_seen = used_seen.wrapping_add(1);
        }
        elements
    }

    /// The first `len` bytes that the device wrote into a request.
    #[cfg(test)]
    pub(crate) fn written(&self, request: &Request, len: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(addr, capacity) in &request.writable {
            let left = usize::try_from(len).unwrap() - bytes.len();
            let mut part = vec![0; left.min(usize::try_from(capacity).unwrap())];
            self.memory.read_slice(&mut part, GuestAddress(addr)).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    /// Calls the device.
    pub(crate) fn call(&mut self, logic: &mut impl Serve, ready: Ready) -> Result<(), ServeError> {
        if let Ready::Queue(index) = ready {
            let _ = self.queues[index].kick().read();
        }
        let Self { memory, queues, sources, .. } = self;
        logic.serve(ready, &mut Context { memory, queues, sources })
    }

    fn take_buffer(&mut self, len: u32) -> u64 {
        if self.next_buffer + u64::from(len) > HIGH_END {
            self.next_buffer = BUFFERS;
        }
        let addr = self.next_buffer;
        self.next_buffer += u64::from(len);
        addr
    }
}

/// Queue number `index` of a driver, set up at its place in memory.
pub(crate) fn queue(index: usize, size: u16) -> Queue {
    let start = u32::try_from(RINGS + index as u64 * RING_BYTES).unwrap();
    let avail = start + 16 * u32::from(size);
    let used = (avail + 6 + 2 * u32::from(size)).next_multiple_of(4);
    let end = u64::from(used + 6 + 8 * u32::from(size));
    assert!(end <= u64::from(start) + RING_BYTES, "too large a queue");
    let mut queue = Queue::new(size).unwrap();
    queue.set_size(size);
    queue.set_desc_table_address(Some(start), Some(0));
    queue.set_avail_ring_address(Some(avail), Some(0));
    queue.set_used_ring_address(Some(used), Some(0));
    queue.set_ready(true);
    queue
}
