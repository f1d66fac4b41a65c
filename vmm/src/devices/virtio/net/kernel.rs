//! vhost-net: the host's kernel moves frames between the driver's queues and the taps.
//!
//! A frame then costs no switch to this process, which still serves the control queue and chooses
//! the pairs that are used. Two functions are lost. The driver gets all frames, whatever its
//! filter, which §5.1.6.5.1 allows. And there are no limits, so an interface with limits does not
//! use this.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::worker::Sources;
use super::super::{Activation, ServeError};
use super::F_MRG_RXBUF;
use super::vhost::{Direction, Ends, Vhost};
use crate::memory::{Memory, Onlooker};

/// Features that the kernel must have as the driver negotiated them: how rings and headers look.
/// The other features concern only driver and tap.
const FEATURES: u64 = F_MRG_RXBUF
    | 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;
const DIRECTIONS: [Direction; 2] = [Direction::Receive, Direction::Transmit];

/// The kernel's part of an interface.
#[derive(Debug)]
pub(super) struct Kernel {
    /// One for each pair of queues.
    pairs: Vec<Arc<Vhost>>,
    /// Readable when the driver broke the rules of a queue.
    broken: EventFd,
}

impl Kernel {
    /// Takes one `/dev/vhost-net` for each pair.
    ///
    /// # Errors
    /// When a descriptor is something else, or the kernel lacks a feature that drivers are offered.
    pub(super) fn new(devices: Vec<OwnedFd>, memory: &Memory) -> io::Result<Self> {
        let pairs = devices.into_iter().map(|device| {
            let vhost = Vhost::new(device)?;
            let missing = FEATURES & !vhost.features()?;
            if missing != 0 {
                let words = format!("vhost-net of this kernel lacks the features {missing:#x}");
                return Err(io::Error::new(io::ErrorKind::Unsupported, words));
            }
            let vhost = Arc::new(vhost);
            let onlooker: Arc<dyn Onlooker> = Arc::<Vhost>::clone(&vhost);
            memory.introduce(&onlooker)?;
            Ok(vhost)
        });
        let pairs = pairs.collect::<io::Result<_>>()?;
        Ok(Self { pairs, broken: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Lets the kernel serve the pairs that the driver set up; `token` is ready when it fails.
    ///
    /// # Errors
    /// When the kernel refuses a queue; it may serve others until [`Kernel::stop`].
    pub(super) fn start<'t>(
        &self,
        activation: &Activation,
        taps: impl Iterator<Item = &'t (impl AsRawFd + 't)>,
        (sources, token): (&Sources, u32),
    ) -> io::Result<()> {
        sources.add(&self.broken, token, EventSet::IN)?;
        let Some(first) = activation.queues.first() else { return Ok(()) };
        first.line().leave_to_kernel();
        for (place, (vhost, tap)) in self.pairs.iter().zip(taps).enumerate() {
            let queues = activation.queues.get(2 * place..2 * place + 2).unwrap_or_default();
            if queues.iter().any(|queue| !queue.ready()) {
                continue;
            }
            for queue in queues {
                sources.remove(queue.kick())?;
            }
            vhost.set_features(activation.features & FEATURES)?;
            let memory = activation.memory.snapshot();
            for (direction, queue) in DIRECTIONS.into_iter().zip(queues) {
                let rings = queue.rings(&memory).map_err(io::Error::other)?;
                let call = queue.line().irq();
                let ends = Ends { kick: queue.kick(), call, error: &self.broken };
                vhost.start(direction, rings, &ends, tap)?;
            }
        }
        Ok(())
    }

    /// Returns an error if the kernel has reported that the driver broke the rules.
    pub(super) fn complaint(&self) -> Result<(), ServeError> {
        if self.broken.read().is_err() {
            // Nonblocking: this was a spurious wake-up.
            return Ok(());
        }
        self.let_go();
        Err(ServeError::Request("a queue is broken, says the host's kernel"))
    }

    /// Stops the kernel: it does not touch the driver's memory any more.
    pub(super) fn stop(&self, sources: &Sources) {
        self.let_go();
        // Does not fail: it was registered. A report about this driver is not for the next one.
        let _ = sources.remove(&self.broken);
        let _ = self.broken.read();
    }

    fn let_go(&self) {
        for vhost in &self.pairs {
            for direction in DIRECTIONS {
                if let Err(error) = vhost.stop(direction) {
                    log::error!("net: cannot stop vhost-net: {error}");
                }
            }
        }
    }
}
