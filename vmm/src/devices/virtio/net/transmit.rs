//! From the driver to a tap, VIRTIO 1.3 §5.1.6.2.
//!
//! A frame is written directly from the driver's buffers, after a copy of its header that was
//! checked. A frame that the tap cannot take now stays in the queue; one that it refuses is
//! dropped.

use std::time::Instant;

use vm_memory::VolatileSlice;

use super::super::ServeError;
use super::super::queue::{Chain, DeviceQueue, GuestMemory};
use super::super::vectored::{RUNS_MAX, Vectors};
use super::header::{self, HEADER_BYTES};
use super::limit::Limit;
use super::tap::Tap;
use crate::devices::rate_limit::guest_warn;

/// Frames sent before the worker looks at anything else.
const BATCH: usize = 64;

/// Why a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The driver has no more frames, and will kick at the next one.
    Served,
    /// There may be more, but others are to be served first.
    Batch,
    /// The limit is reached.
    Limited,
    /// The tap takes no frame now.
    Blocked,
}

/// One queue of the driver's frames.
#[derive(Debug, Default)]
pub(super) struct Transmit {
    /// The chain of the frame that is being sent; its allocations are reused.
    chain: Chain,
    features: u64,
}

/// The result of sending a frame.
enum Sent {
    /// The frame was sent or dropped.
    Done,
    Later,
}

impl Transmit {
    /// Prepares for a driver that negotiated `features`.
    pub(super) fn start(&mut self, features: u64) {
        self.features = features;
    }

    /// Sends frames until a reason of [`Ended`] occurs.
    pub(super) fn round<T: Tap>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &GuestMemory,
        tap: &T,
        limit: &mut Limit,
    ) -> Result<Ended, ServeError> {
        let before = queue.published();
        let ended = self.frames(queue, memory, tap, limit)?;
        if queue.published() != before {
            queue.signal(memory)?;
        }
        Ok(ended)
    }

    fn frames<T: Tap>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &GuestMemory,
        tap: &T,
        limit: &mut Limit,
    ) -> Result<Ended, ServeError> {
        let (mut slices, mut vectors) = (Vec::new(), Vectors::default());
        let now = Instant::now();
        for _ in 0..BATCH {
            if limit.wait(now).is_some() {
                return Ok(Ended::Limited);
            }
            if !queue.pop_or_arm_into(memory, &mut self.chain)? {
                return Ok(Ended::Served);
            }
            if self.chain.writable.left() > 0 {
                return Err(ServeError::Request("a frame to send is not for reading"));
            }
            slices.clear();
            let mut told = [0; HEADER_BYTES];
            self.chain.readable.read(memory, &mut told)?;
            self.chain.readable.gather(memory, &mut slices)?;
            match self.send(told, (&slices, &mut vectors), queue, tap) {
                Sent::Done => {}
                Sent::Later => {
                    queue.unpop();
                    return Ok(Ended::Blocked);
                }
            }
            limit.take(self.chain.readable.left(), now);
            queue.complete(memory, self.chain.head, 0)?;
        }
        Ok(Ended::Batch)
    }

    fn send<T: Tap>(
        &self,
        told: [u8; HEADER_BYTES],
        (slices, vectors): (&[VolatileSlice<'_>], &mut Vectors),
        queue: &DeviceQueue,
        tap: &T,
    ) -> Sent {
        let checked =
            header::check(told, self.chain.readable.left(), self.features).and_then(|header| {
                let fits = slices.len() < RUNS_MAX;
                fits.then_some(header).ok_or("it is in too many pieces")
            });
        let header = match checked {
            Ok(header) => header,
            Err(reason) => {
                guest_warn!("net: a frame of the guest is dropped: {reason}");
                queue.line().count_dropped();
                return Sent::Done;
            }
        };
        match vectors.write(tap, &header, slices) {
            Ok(_) => Sent::Done,
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Sent::Later,
            // The interface is down or gone, or refuses the frame.
            Err(_) => {
                queue.line().count_dropped();
                Sent::Done
            }
        }
    }
}
