//! The virtio-mmio transport, VIRTIO 1.2 §4.2: one slot of the machine.
//!
//! A slot without a device reads DeviceID 0, which a driver leaves alone (§4.2.2.2); that is how
//! devices are bound late. The transport holds what the driver negotiates until DRIVER_OK, then
//! hands queues over to the device. It trusts nothing: writes out of order are ignored, a queue
//! whose rings are not in memory makes the device fail.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::DeviceQueue;
use super::{Activation, ConfigSpace, VirtioDevice};
use crate::devices::rate_limit::guest_warn;
use crate::memory::Memory;

/// Bytes of a slot in the guest's physical address space.
pub(crate) const SLOT_BYTES: u64 = 0x1000;
/// Offset of the register that a driver writes a queue's number to, §4.2.2.
pub(crate) const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const TRANSPORT_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"BLKH");
/// Where the device-specific configuration space begins.
const CONFIG: u64 = 0x100;

/// Interrupt status bits, §4.2.2 InterruptStatus.
const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// A device's interrupt line, and the state that transport and worker share.
#[derive(Debug)]
pub(crate) struct Line {
    irq: EventFd,
    pending: AtomicU32,
    /// The kernel raises the line too, without setting `pending`.
    by_kernel: AtomicBool,
    failed: AtomicBool,
    notifications: AtomicU64,
    dropped: AtomicU64,
}

impl Line {
    /// A line that is not registered with KVM yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            irq: EventFd::new(EFD_NONBLOCK)?,
            pending: AtomicU32::new(0),
            by_kernel: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            notifications: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        })
    }

    /// The eventfd that raises the interrupt; KVM listens to it.
    pub(crate) fn irq(&self) -> &EventFd {
        &self.irq
    }

    /// Lets the kernel raise the line for queues that it serves, until the driver resets the
    /// device. From now on InterruptStatus always reports used chains, even if there are none.
    pub(crate) fn leave_to_kernel(&self) {
        self.by_kernel.store(true, Ordering::Release);
    }

    /// What the line was raised for, §4.2.2 InterruptStatus.
    fn pending(&self) -> u32 {
        let by_kernel = self.by_kernel.load(Ordering::Acquire);
        self.pending.load(Ordering::Acquire) | if by_kernel { INTERRUPT_QUEUE } else { 0 }
    }

    /// Interrupts the driver: a queue has used chains.
    pub(crate) fn raise_queue(&self) -> io::Result<()> {
        self.raise(INTERRUPT_QUEUE)
    }

    /// Interrupts the driver: the configuration space has changed.
    pub(crate) fn raise_config(&self) -> io::Result<()> {
        self.raise(INTERRUPT_CONFIG)
    }

    /// Makes the device fail: the driver sees DEVICE_NEEDS_RESET, §2.1.2.
    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        if let Err(error) = self.raise_config() {
            log::error!("cannot report a failed device to its driver: {error}");
        }
    }

    pub(crate) fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(crate) fn count_notification(&self) {
        self.notifications.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }

    pub(crate) fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn raise(&self, bit: u32) -> io::Result<()> {
        self.pending.fetch_or(bit, Ordering::AcqRel);
        match self.irq.write(1) {
            // The counter is full, so an interrupt is pending already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// One slot: registers, and the device once it is attached.
#[derive(Debug)]
pub(crate) struct Transport {
    memory: Arc<Memory>,
    /// The attached device. It is boxed, so that a placeholder costs nothing.
    attached: Option<Box<Attached>>,
}

#[derive(Debug)]
struct Attached {
    device: Box<dyn VirtioDevice>,
    line: Arc<Line>,
    kicks: Vec<Arc<EventFd>>,
    queues: Vec<Queue>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

impl Transport {
    /// A placeholder.
    pub(crate) fn new(memory: Arc<Memory>) -> Self {
        Self { memory, attached: None }
    }

    /// Refuses when the slot holds a device.
    pub(crate) fn check_free(&self) -> io::Result<()> {
        match &self.attached {
            None => Ok(()),
            Some(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "the slot holds a device")),
        }
    }

    /// Attaches a device to the slot.
    ///
    /// # Errors
    /// When the slot is taken, or the host has no descriptors left.
    pub(crate) fn attach(&mut self, device: Box<dyn VirtioDevice>) -> io::Result<()> {
        self.check_free()?;
        let sizes = device.identity().queue_sizes;
        let kicks = sizes
            .iter()
            .map(|_| Ok(Arc::new(EventFd::new(EFD_NONBLOCK)?)))
            .collect::<io::Result<Vec<_>>>()?;
        let queues = sizes
            .iter()
            .map(|size| Queue::new(*size).map_err(io::Error::other))
            .collect::<io::Result<Vec<_>>>()?;
        self.attached = Some(Box::new(Attached {
            device,
            line: Arc::new(Line::new()?),
            kicks,
            queues,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
        }));
        Ok(())
    }

    /// Removes the device; the slot is a placeholder again.
    pub(crate) fn detach(&mut self) -> Option<Box<dyn VirtioDevice>> {
        let mut attached = self.attached.take()?;
        attached.device.reset();
        Some(attached.device)
    }

    /// The interrupt line and the eventfds for kicks, to be registered with KVM.
    pub(crate) fn wiring(&self) -> Option<(&Arc<Line>, &[Arc<EventFd>])> {
        self.attached.as_ref().map(|attached| (&attached.line, attached.kicks.as_slice()))
    }

    /// The attached device's type.
    pub(crate) fn device_id(&self) -> Option<u32> {
        self.attached.as_ref().map(|attached| attached.device.identity().device_id)
    }

    /// Changes the configuration of the device, if there is one, and tells the driver.
    ///
    /// # Errors
    /// When the driver cannot be interrupted; it sees the change when it next reads the space.
    pub(crate) fn change_config(&self, change: impl FnOnce(&ConfigSpace)) -> io::Result<()> {
        let Some(attached) = &self.attached else { return Ok(()) };
        change(attached.device.config());
        attached.line.raise_config()
    }

    /// A guest's read of `data.len()` bytes at `offset` of the slot.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            match &self.attached {
                Some(attached) => attached.device.config().read(offset - CONFIG, data),
                None => data.fill(0),
            }
            return;
        }
        // §4.2.2.2: registers are read as 32 bits at their own offset only. Any other read returns
        // zeroes, not what the buffer had in it before.
        data.fill(0);
        let Ok(register) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match (offset, &self.attached) {
            (0x000, _) => MAGIC,
            (0x004, _) => TRANSPORT_VERSION,
            (0x00c, _) => VENDOR,
            (_, Some(attached)) => attached.read(offset),
            (_, None) => 0,
        };
        *register = value.to_le_bytes();
    }

    /// A guest's write of `data` at `offset` of the slot.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(attached) = &mut self.attached else { return };
        if offset >= CONFIG {
            return attached.device.config().write(offset - CONFIG, data);
        }
        if let Ok(register) = <[u8; 4]>::try_from(data) {
            attached.write(offset, u32::from_le_bytes(register), &self.memory);
        }
    }
}

impl Attached {
    fn read(&self, offset: u64) -> u32 {
        match offset {
            0x008 => self.device.identity().device_id,
            0x010 => half(self.offered(), self.device_features_select),
            0x034 => self.queue().map_or(0, |queue| u32::from(queue.max_size())),
            0x044 => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            0x060 => self.line.pending(),
            0x070 => self.status(),
            // A shared memory region that does not exist has length and base of all ones.
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => self.device.config().generation(),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32, memory: &Arc<Memory>) {
        match offset {
            0x014 => self.device_features_select = value,
            0x020 => self.select_features(value),
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            0x038 => self.configure(|queue| queue.set_size(u16::try_from(value).unwrap_or(0))),
            0x044 => self.configure(|queue| queue.set_ready(value == 1)),
            QUEUE_NOTIFY => self.kick(value),
            0x064 => {
                self.line.pending.fetch_and(!value, Ordering::AcqRel);
            }
            0x070 => self.set_status(value, memory),
            0x080 => self.configure(|queue| queue.set_desc_table_address(Some(value), None)),
            0x084 => self.configure(|queue| queue.set_desc_table_address(None, Some(value))),
            0x090 => self.configure(|queue| queue.set_avail_ring_address(Some(value), None)),
            0x094 => self.configure(|queue| queue.set_avail_ring_address(None, Some(value))),
            0x0a0 => self.configure(|queue| queue.set_used_ring_address(Some(value), None)),
            0x0a4 => self.configure(|queue| queue.set_used_ring_address(None, Some(value))),
            _ => {}
        }
    }

    fn offered(&self) -> u64 {
        self.device.identity().features
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn status(&self) -> u32 {
        if self.line.failed() { self.status | VIRTIO_CONFIG_S_NEEDS_RESET } else { self.status }
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK only, §3.1.1.
    fn configure(&mut self, change: impl FnOnce(&mut Queue)) {
        let negotiated = self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let running = self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if negotiated
            && !running
            && let Some(queue) = self.queues.get_mut(self.queue_select as usize)
        {
            change(queue);
        }
    }

    fn select_features(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            let shift = match self.driver_features_select {
                0 => 0,
                1 => 32,
                _ => return,
            };
            self.driver_features &= !(u64::from(u32::MAX) << shift);
            self.driver_features |= u64::from(value) << shift;
        }
    }

    /// Handles a kick that came as a write; with ioeventfd none does.
    fn kick(&self, queue: u32) {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && let Some(kick) = self.kicks.get(queue as usize)
            && let Err(error) = kick.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("a kick was lost: {error}");
        }
    }

    fn set_status(&mut self, value: u32, memory: &Arc<Memory>) {
        if value == 0 {
            return self.reset();
        }
        // A driver adds bits; those it leaves out stay, §2.1.1.
        let added = value & !self.status;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_acceptable() {
            // The bit stays unset: the driver sees that the device refuses these features.
            self.status |= added & !VIRTIO_CONFIG_S_FEATURES_OK;
            return;
        }
        self.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.activate(memory);
        }
    }

    fn features_acceptable(&self) -> bool {
        let required = 1 << VIRTIO_F_VERSION_1;
        self.driver_features & !self.offered() == 0 && self.driver_features & required != 0
    }

    fn activate(&mut self, memory: &Arc<Memory>) {
        let steps = VIRTIO_CONFIG_S_ACKNOWLEDGE
            | VIRTIO_CONFIG_S_DRIVER
            | VIRTIO_CONFIG_S_FEATURES_OK
            | VIRTIO_CONFIG_S_DRIVER_OK;
        if self.status & (steps | VIRTIO_CONFIG_S_FAILED) != steps {
            return self.line.fail();
        }
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let snapshot = memory.snapshot();
        let mut queues = Vec::with_capacity(self.queues.len());
        for (queue, kick) in self.queues.iter_mut().zip(&self.kicks) {
            queue.set_event_idx(event_idx);
            // A queue that the driver does not use need not be set up, §3.1.1; it is never ready.
            if queue.ready() && !queue.is_valid(&*snapshot) {
                guest_warn!("{:?}: a queue is not in guest memory", self.device);
                return self.line.fail();
            }
            let state = Queue::try_from(queue.state());
            let Ok(queue) = state else { return self.line.fail() };
            queues.push(DeviceQueue::new(queue, Arc::clone(kick), Arc::clone(&self.line)));
        }
        drop(snapshot);
        let (memory, features) = (Arc::clone(memory), self.driver_features);
        if let Err(error) = self.device.activate(Activation { memory, queues, features }) {
            guest_warn!("{:?}: cannot activate the device: {error}", self.device);
            self.line.fail();
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        for kick in &self.kicks {
            // Kicks of the old driver are not for the next one.
            let _ = kick.read();
        }
        self.line.pending.store(0, Ordering::Release);
        self.line.by_kernel.store(false, Ordering::Release);
        self.line.failed.store(false, Ordering::Release);
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }
}

/// The 32 bits that a selector chooses out of a feature set of 64 bits.
fn half(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    // Truncation is the point: the register shows 32 bits.
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
