//! From a tap to the driver, VIRTIO 1.3 §5.1.6.3 and §5.1.6.4.
//!
//! The device takes chains from the queue until the longest frame fits, but it reads a frame
//! directly into only as many of them as earlier frames have filled: translating the addresses of
//! all of them each time costs more than a small frame. The end of a longer frame is copied from a
//! buffer of the device. Chains that were not filled are kept for the next frame. Nothing else is
//! kept: a frame for which there is no room stays in the tap.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::super::ServeError;
use super::super::queue::{Chain, DeviceQueue, GuestMemory, QueueError};
use super::super::vectored::{RUNS_MAX, Vectors};
use super::filter::{Filter, Mac};
use super::header::{BUFFERS, FLAGS, FRAME_MAX, FRAME_MIN, HEADER_BYTES};
use super::limit::Limit;
use super::tap::Tap;
use super::{F_GUEST_CSUM, F_GUEST_LARGE, F_MRG_RXBUF};

/// Frames taken before the worker looks at anything else.
const BATCH: usize = 64;

/// Why a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The tap has no more frames, or a whole batch was taken; epoll reports the next ones.
    Served,
    /// The driver has no more buffers.
    NoRoom,
    /// The limit is reached.
    Limited,
    /// The tap's interface was removed.
    Gone,
}

/// One queue of the driver's buffers.
#[derive(Debug, Default)]
pub(super) struct Receive {
    /// Chains taken from the queue and not yet filled, at most as many as the queue has.
    held: VecDeque<Chain>,
    /// Room in the held chains: in bytes, and in pieces of memory.
    room: usize,
    pieces: usize,
    /// How many chains the next frame is expected to fill, judging by earlier ones.
    expected: usize,
    /// Receives the end of a frame that is longer than expected.
    rest: Vec<u8>,
    /// Completed chains, kept to reuse their allocations.
    spare: Vec<Chain>,
    /// A frame may be put into several buffers.
    mergeable: bool,
    /// The driver accepts frames whose checksum is not computed yet.
    checksums: bool,
    /// The longest frame to expect, with its header.
    longest: usize,
}

/// What a round needs beside its queue.
pub(super) struct Round<'a, T> {
    pub(super) tap: &'a T,
    pub(super) memory: &'a GuestMemory,
    pub(super) filter: &'a Filter,
    pub(super) limit: &'a mut Limit,
}

impl Receive {
    /// Prepares for a driver that negotiated `features`.
    pub(super) fn start(&mut self, features: u64, mtu: u16) {
        self.mergeable = features & F_MRG_RXBUF != 0;
        self.checksums = features & F_GUEST_CSUM != 0;
        let large = features & F_GUEST_LARGE != 0;
        let frame = if large { FRAME_MAX } else { FRAME_MIN + 8 + usize::from(mtu) };
        self.longest = HEADER_BYTES + frame;
        self.expected = 1;
        // Untouched memory costs nothing; it is used only if a frame is longer than expected.
        self.rest = vec![0; HEADER_BYTES + FRAME_MAX];
    }

    /// Forgets the driver's buffers.
    pub(super) fn stop(&mut self) {
        self.held.clear();
        self.spare.clear();
        (self.room, self.pieces) = (0, 0);
    }

    /// How many chains are allocated.
    #[cfg(test)]
    pub(super) fn chains(&self) -> usize {
        self.held.len() + self.spare.len()
    }

    /// Gives the driver frames until a reason of [`Ended`] occurs.
    pub(super) fn round<T: Tap>(
        &mut self,
        queue: &mut DeviceQueue,
        mut round: Round<'_, T>,
    ) -> Result<Ended, ServeError> {
        let before = queue.published();
        let ended = self.frames(queue, &mut round)?;
        if queue.published() != before {
            queue.signal(round.memory)?;
        }
        Ok(ended)
    }

    fn frames<T: Tap>(
        &mut self,
        queue: &mut DeviceQueue,
        round: &mut Round<'_, T>,
    ) -> Result<Ended, ServeError> {
        let mut room = Room::default();
        let mut vectors = Vectors::default();
        let now = Instant::now();
        for _ in 0..BATCH {
            if round.limit.wait(now).is_some() {
                return Ok(Ended::Limited);
            }
            if !self.collect(queue, round.memory)? {
                return Ok(Ended::NoRoom);
            }
            room.become_of(self.held.iter().take(self.expected), round.memory)?;
            let bytes = match vectors.read(round.tap, room.usable(), &mut self.rest) {
                Ok(0) => return Ok(Ended::Gone),
                Ok(bytes) => bytes,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(Ended::Served),
                    // The tap dropped a frame, which it could not describe or had no memory for.
                    Some(libc::EINVAL | libc::ENOMEM) => {
                        queue.line().count_dropped();
                        continue;
                    }
                    _ => return Ok(gone(&error)),
                },
            };
            round.limit.take(bytes.saturating_sub(HEADER_BYTES), now);
            if bytes < HEADER_BYTES + FRAME_MIN || !self.spread(round.memory, &mut room, bytes)? {
                queue.line().count_dropped();
            } else if round.filter.wants(Mac(room.get(HEADER_BYTES))) {
                self.give(queue, round.memory, &room, bytes)?;
            }
        }
        Ok(Ended::Served)
    }

    /// Takes chains from the queue until the longest frame fits; `false` when the driver has to
    /// make more available.
    fn collect(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &GuestMemory,
    ) -> Result<bool, ServeError> {
        while !self.suffices(queue) {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop_or_arm_into(memory, &mut chain)? {
                self.spare.push(chain);
                return Ok(false);
            }
            // §5.1.6.3.1: a buffer has room for the header at least.
            if chain.readable.left() > 0 || chain.writable.left() < HEADER_BYTES {
                return Err(ServeError::Request("receive buffer is not for writing or too short"));
            }
            self.room += chain.writable.left();
            self.pieces += chain.writable.pieces();
            self.held.push_back(chain);
        }
        Ok(true)
    }

    fn suffices(&self, queue: &DeviceQueue) -> bool {
        // If the queue has too little room for the longest frame, half of its chains must do: a
        // driver may wait until that many are used before it makes new ones available.
        let most = if self.mergeable { usize::from(queue.size() / 2).max(1) } else { 1 };
        // A driver may split its buffers into any number of pieces.
        let full = self.held.len() >= most || self.pieces >= RUNS_MAX;
        full || (self.room >= self.longest && !self.held.is_empty())
    }

    /// Copies the end of a frame of `bytes` bytes to its place; `false` if the frame is too long.
    fn spread<'m>(
        &self,
        memory: &'m GuestMemory,
        room: &mut Room<'m>,
        bytes: usize,
    ) -> Result<bool, QueueError> {
        let direct = room.usable_bytes();
        let Some(rest) = self.rest.get(..bytes.saturating_sub(direct)) else { return Ok(false) };
        for chain in self.held.iter().skip(self.expected) {
            if room.bytes >= bytes {
                break;
            }
            room.add(chain, memory)?;
        }
        if room.bytes < bytes {
            return Ok(false);
        }
        room.put(direct, rest);
        Ok(true)
    }

    /// Completes the chains with the frame, which is in the first `bytes` bytes of the room.
    fn give(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &GuestMemory,
        room: &Room<'_>,
        bytes: usize,
    ) -> Result<(), QueueError> {
        let mut left = bytes;
        let mut count = 0_u16;
        while left > 0
            && let Some(chain) = self.held.pop_front()
        {
            let filled = left.min(chain.writable.left());
            queue.fill(memory, count, (chain.head, filled))?;
            left -= filled;
            count += 1;
            self.room -= chain.writable.left();
            self.pieces -= chain.writable.pieces();
            self.spare.push(chain);
        }
        if !self.checksums {
            room.put(FLAGS, &[0]);
        }
        room.put(BUFFERS, &count.to_le_bytes());
        // Grows at once and shrinks slowly.
        self.expected = usize::from(count).max((3 * self.expected + usize::from(count)) / 4);
        queue.publish(memory, count)
    }
}

/// The interface was removed from the host.
fn gone(error: &io::Error) -> Ended {
    log::info!("net: a tap gives no more frames: {error}");
    Ended::Gone
}

/// The slices of one read; one more iovec is for what does not fit.
const SLICES_MAX: usize = RUNS_MAX - 1;

/// The first of the held chains, as host memory in order.
#[derive(Default)]
struct Room<'m> {
    slices: Vec<VolatileSlice<'m>>,
    /// The length of all slices.
    bytes: usize,
}

impl<'m> Room<'m> {
    fn become_of<'c>(
        &mut self,
        chains: impl Iterator<Item = &'c Chain>,
        memory: &'m GuestMemory,
    ) -> Result<(), QueueError> {
        self.slices.clear();
        self.bytes = 0;
        for chain in chains {
            self.add(chain, memory)?;
        }
        Ok(())
    }

    fn add(&mut self, chain: &Chain, memory: &'m GuestMemory) -> Result<(), QueueError> {
        chain.writable.gather(memory, &mut self.slices)?;
        self.bytes += chain.writable.left();
        Ok(())
    }

    /// The slices that one call takes.
    fn usable(&self) -> &[VolatileSlice<'m>] {
        self.slices.get(..SLICES_MAX).unwrap_or(&self.slices)
    }

    fn usable_bytes(&self) -> usize {
        if self.slices.len() <= SLICES_MAX {
            return self.bytes;
        }
        self.usable().iter().map(VolatileSlice::len).sum()
    }

    /// Copies bytes of the frame.
    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.visit(offset, N, |slice, at| {
            let end = at + slice.len();
            slice.copy_to(&mut bytes[at..end]);
        });
        bytes
    }

    /// Overwrites bytes of the frame.
    fn put(&self, offset: usize, bytes: &[u8]) {
        self.visit(offset, bytes.len(), |slice, at| slice.copy_from(&bytes[at..at + slice.len()]));
    }

    /// Calls `each` for the parts of a range that exist, with the offset of each in the range.
    fn visit(&self, offset: usize, len: usize, mut each: impl FnMut(VolatileSlice<'m>, usize)) {
        let (mut skip, mut done) = (offset, 0);
        for slice in &self.slices {
            if done == len {
                break;
            }
            let part = (len - done).min(slice.len().saturating_sub(skip));
            if part > 0
                && let Ok(found) = slice.subslice(skip, part)
            {
                each(found, done);
                (skip, done) = (0, done + part);
            } else {
                skip -= slice.len().min(skip);
            }
        }
    }
}
