//! Growth of a running machine: memory is plugged, and vCPUs are created and started.
//!
//! A machine starts as large as its first container needs; its maximum size is fixed then. It does
//! not shrink: memory that the guest frees returns to the host anyway (the balloon's free page
//! reporting), and an idle vCPU costs only a thread.

use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::Mutex;
use tokio::time::sleep;

use crate::bundle::MachineSize;
use crate::machine::agent::{Agent, AgentError};
use crate::machine::monitor::{Machine, MachineError};

/// How long the guest may take to plug memory.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the plugged memory is checked.
const STEP: Duration = Duration::from_millis(5);

/// Why the machine did not grow.
#[derive(Debug, Error)]
pub enum GrowthError {
    /// A request to the monitor failed.
    #[error("cannot grow the machine: {0}")]
    Machine(#[from] MachineError),
    /// A call to the agent failed.
    #[error("cannot grow the machine: {0}")]
    Agent(#[from] AgentError),
    /// The guest's kernel did not plug all memory in time.
    #[error(
        "the guest plugged {plugged_mib} of {wanted_mib} MiB of memory within {} s; it may not have \
         enough left to describe more: stop what uses it, or create the container with the larger \
         limit", PATIENCE.as_secs()
    )]
    Unplugged {
        /// How much was plugged.
        plugged_mib: u32,
        /// How much was requested, in total.
        wanted_mib: u32,
    },
}

/// The size of a machine.
#[derive(Debug)]
pub struct Growth {
    /// Its size at boot.
    boot: MachineSize,
    /// Its maximum size.
    most: MachineSize,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    size: MachineSize,
    /// The virtio-mem device is attached.
    attached: bool,
}

impl Growth {
    /// The size of a machine that has just booted.
    #[must_use]
    pub fn new(boot: MachineSize, most: MachineSize) -> Self {
        Self { boot, most, now: Mutex::new(Now { size: boot, attached: false }) }
    }

    /// Returns whether [`Growth::grow`] would have something to do.
    pub async fn lacks(&self, to: MachineSize) -> bool {
        let now = self.now.lock().await.size;
        self.within_reach(now, to) != now
    }

    /// Grows the machine to a total size of `to`, or to its maximum. A larger machine stays as it
    /// is.
    ///
    /// # Errors
    /// When the monitor or the guest cannot grow; what has been added before stays.
    pub async fn grow(
        &self,
        machine: &Machine,
        agent: &Agent,
        to: MachineSize,
    ) -> Result<(), GrowthError> {
        let mut now = self.now.lock().await;
        let to = self.within_reach(now.size, to);
        if to.memory_mib > now.size.memory_mib {
            self.plug(machine, agent, &mut now, to.memory_mib).await?;
            now.size.memory_mib = to.memory_mib;
        }
        if to.vcpus > now.size.vcpus {
            machine.add_processors(to.vcpus).await?;
            agent.start_processors(to.vcpus.into()).await?;
            now.size.vcpus = to.vcpus;
        }
        Ok(())
    }

    fn within_reach(&self, now: MachineSize, to: MachineSize) -> MachineSize {
        MachineSize {
            vcpus: to.vcpus.min(self.most.vcpus).max(now.vcpus),
            memory_mib: to.memory_mib.min(self.most.memory_mib).max(now.memory_mib),
        }
    }

    async fn plug(
        &self,
        machine: &Machine,
        agent: &Agent,
        now: &mut Now,
        memory_mib: u32,
    ) -> Result<(), GrowthError> {
        if !now.attached {
            machine.attach_memory(self.most.memory_mib - self.boot.memory_mib).await?;
            now.attached = true;
        }
        // Rescans each time, because the previous rescan may have failed.
        agent.rescan().await?;
        let wanted_mib = memory_mib - self.boot.memory_mib;
        machine.plug(wanted_mib).await?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let plugged_mib = machine.plugged_mib().await?;
            if plugged_mib >= wanted_mib {
                return Ok(());
            }
            if Instant::now() > deadline {
                // Takes the request back, so that the guest does not plug the memory later.
                machine.plug(now.size.memory_mib - self.boot.memory_mib).await?;
                return Err(GrowthError::Unplugged { plugged_mib, wanted_mib });
            }
            sleep(STEP).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(vcpus: u8, memory_mib: u32) -> MachineSize {
        MachineSize { vcpus, memory_mib }
    }

    #[tokio::test]
    async fn a_machine_lacks_what_it_can_get_and_does_not_have() {
        let growth = Growth::new(size(2, 256), size(4, 1024));
        let table = [
            (size(1, 128), size(2, 256)),
            (size(2, 256), size(2, 256)),
            (size(1, 257), size(2, 257)),
            (size(3, 1), size(3, 256)),
            (size(9, 9999), size(4, 1024)),
        ];
        for (to, then) in table {
            assert_eq!(growth.within_reach(size(2, 256), to), then, "{to:?}");
            assert_eq!(growth.lacks(to).await, then != size(2, 256), "{to:?}");
        }
    }
}
