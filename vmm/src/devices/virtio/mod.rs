//! Virtio devices, VIRTIO 1.2.
//!
//! A device is two halves. [`Device`] sits on the bus: identity, configuration space, life cycle;
//! there is one implementation for all. [`Serve`] is what makes a device that device: it answers
//! queues, on its own thread ([`worker`]), and is plain logic that a test can call without one.
//!
//! Everything from a driver is untrusted. [`queue::DeviceQueue`] walks descriptors once, copies and
//! checks them; a device then sees only memory that exists. A driver that breaks the protocol makes
//! its device fail (DEVICE_NEEDS_RESET), never the monitor.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod fs;
#[cfg(any(test, fuzzing))]
pub(crate) mod guided;
pub(crate) mod mem;
#[cfg(any(test, fuzzing))]
pub(crate) mod mock;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod transport;
mod vectored;
pub(crate) mod vsock;
pub(crate) mod worker;

use queue::{DeviceQueue, GuestMemory, QueueError};
use worker::{Slot, Sources};

use crate::memory::Memory;

/// What a device is, as data.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// The device type, VIRTIO 1.2 §5.
    pub(crate) device_id: u32,
    /// Offered features, without those of the transport (VERSION_1, EVENT_IDX, INDIRECT_DESC).
    pub(crate) features: u64,
    /// The largest size of each queue, powers of two.
    pub(crate) queue_sizes: &'static [u16],
}

/// The logic of a device: what to do when a queue or a host-side descriptor is ready.
pub(crate) trait Serve: Send + 'static {
    /// Names the thread and the log lines, at most 15 bytes.
    const NAME: &'static str;
    /// The system calls that serving needs beside the worker's own (`libc::SYS_*`), each with the
    /// reason in a comment. They will become the seccomp filter of the thread.
    #[expect(dead_code, reason = "for the seccomp filter, which is to come")]
    const SYSCALLS: &'static [i64];

    /// Called once after each activation, before anything is ready: note the negotiated features
    /// and register host-side descriptors.
    fn start(&mut self, _features: u64, _sources: &Sources) -> io::Result<()> {
        Ok(())
    }

    /// Called once after [`Serve::start`]: hands queues over to another server, such as the host's
    /// kernel, and removes them from `sources`.
    fn delegate(&mut self, _activation: &Activation, _sources: &Sources) -> io::Result<()> {
        Ok(())
    }

    /// Does what can be done now. Called for spurious wake-ups too.
    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError>;

    /// Called when the driver has reset the device, the activation has failed, or the machine ends:
    /// forgets everything that belongs to the driver.
    fn stop(&mut self, _sources: &Sources) {}
}

/// What made a worker call [`Serve::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// The driver kicked this queue.
    Queue(usize),
    /// A descriptor registered under this token is ready.
    Source(u32),
}

/// What a device may touch while it serves.
pub(crate) struct Context<'a> {
    /// The guest's memory as it is now.
    pub(crate) memory: &'a GuestMemory,
    /// All queues, in the order of the identity; those that the driver left out are not ready.
    pub(crate) queues: &'a mut [DeviceQueue],
    /// For registering and removing host-side descriptors.
    pub(crate) sources: &'a Sources,
}

/// Why a device stops serving until the driver resets it.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    /// The driver broke the rules of the queue.
    #[error("queue broken by the driver")]
    Queue(#[from] QueueError),
    /// The driver sent a malformed request.
    #[error("malformed request: {0}")]
    Request(&'static str),
    /// The host side failed.
    #[error("host side failed")]
    Host(#[from] io::Error),
}

/// The device-specific configuration space, shared by the transport and the device's logic.
///
/// VIRTIO 1.2 §2.5: the driver reads it at any width. A generation counter lets the driver notice
/// that the space has changed between its reads.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    shared: Arc<Mutex<ConfigBytes>>,
}

struct ConfigBytes {
    bytes: Vec<u8>,
    writable: std::ops::Range<usize>,
    generation: u32,
}

impl ConfigSpace {
    /// A space that the driver only reads.
    pub(crate) fn read_only(bytes: Vec<u8>) -> Self {
        Self::with_writable(bytes, 0..0)
    }

    /// A space in which the driver may write the bytes of one range.
    pub(crate) fn with_writable(bytes: Vec<u8>, writable: std::ops::Range<usize>) -> Self {
        let shared = Arc::new(Mutex::new(ConfigBytes { bytes, writable, generation: 0 }));
        Self { shared }
    }

    /// A read of the driver; what lies outside reads as 0.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let space = self.lock();
        for (position, byte) in data.iter_mut().enumerate() {
            let position = place(offset, position);
            *byte = space.bytes.get(position).copied().unwrap_or(0);
        }
    }

    /// A write of the driver; what lies outside the writable range is ignored.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let mut space = self.lock();
        for (position, byte) in data.iter().enumerate() {
            let position = place(offset, position);
            if space.writable.contains(&position)
                && let Some(target) = space.bytes.get_mut(position)
            {
                *target = *byte;
            }
        }
    }

    /// Changes a little-endian field from the device's side; the caller signals the change.
    pub(crate) fn set_u32(&self, offset: usize, value: u32) {
        self.set(offset, value.to_le_bytes());
    }

    /// Like [`ConfigSpace::set_u32`], of 64 bits.
    pub(crate) fn set_u64(&self, offset: usize, value: u64) {
        self.set(offset, value.to_le_bytes());
    }

    /// A little-endian field; 0 outside the space.
    pub(crate) fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }

    /// Like [`ConfigSpace::u32`], of 64 bits.
    pub(crate) fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.get(offset))
    }

    /// Like [`ConfigSpace::set_u32`], of bytes.
    pub(crate) fn set<const N: usize>(&self, offset: usize, value: [u8; N]) {
        let mut space = self.lock();
        if let Some(field) = space.bytes.get_mut(offset..offset + N) {
            field.copy_from_slice(&value);
            space.generation = space.generation.wrapping_add(1);
        }
    }

    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut field = [0; N];
        self.read(offset as u64, &mut field);
        field
    }

    fn generation(&self) -> u32 {
        self.lock().generation
    }

    fn lock(&self) -> MutexGuard<'_, ConfigBytes> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A position in a space; far outside of it when the numbers overflow.
fn place(offset: u64, position: usize) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(position)
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConfigSpace").field(&self.lock().bytes).finish()
    }
}

/// What a transport hands over when the driver says DRIVER_OK.
#[derive(Debug)]
pub(crate) struct Activation {
    pub(crate) memory: Arc<Memory>,
    pub(crate) queues: Vec<DeviceQueue>,
    pub(crate) features: u64,
}

/// A device as its transport sees it; [`Device`] is the one implementation.
pub(crate) trait VirtioDevice: Send + fmt::Debug {
    fn identity(&self) -> &Identity;
    fn config(&self) -> &ConfigSpace;
    /// Starts serving. If this fails, it can be tried again after a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;
    /// Stops serving; can be activated again. Blocks until the worker has stopped.
    fn reset(&mut self);
}

/// Identity, configuration space, and the slot of the logic.
pub(crate) struct Device<S: Serve> {
    identity: Identity,
    config: ConfigSpace,
    slot: Slot<S>,
}

impl<S: Serve> Device<S> {
    pub(crate) fn new(identity: Identity, config: ConfigSpace, logic: S) -> Self {
        Self { identity, config, slot: Slot::Idle(logic) }
    }
}

impl<S: Serve> fmt::Debug for Device<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple(S::NAME).field(&self.identity).finish()
    }
}

impl<S: Serve> VirtioDevice for Device<S> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.slot.start(activation)
    }

    fn reset(&mut self) {
        self.slot.stop();
    }
}

impl<S: Serve> Drop for Device<S> {
    fn drop(&mut self) {
        self.slot.stop();
    }
}

#[cfg(test)]
mod tests;
