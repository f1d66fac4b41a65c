//! Growth of a running machine: memory is plugged, and vCPUs are created and started.
//!
//! A machine starts as large as the limits of its first container need; its maximum size is fixed
//! then. Memory that containers without a limit use beyond that is plugged when the guest asks
//! (`docs/decisions/0021-memory-on-demand.md`). A machine does not shrink: memory that the guest frees returns to the host anyway (the balloon's free page
//! reporting), and an idle vCPU costs only a thread. Huge pages of the host's pool stay until the
//! machine ends (`docs/decisions/0033-huge-pages-of-the-pool.md`).

use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{MemorySize, MemoryWanted};
use thiserror::Error;
use tokio::sync::{Mutex, mpsc};
use tokio::time::sleep;
use tonic::Streaming;

use crate::bundle::{HUGE_PAGE_MIB, MachineSize, Pool, Shortage};
use crate::machine::agent::{Agent, AgentError};
use crate::machine::monitor::{Machine, MachineError};

/// How long the guest may take to plug memory.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the plugged memory is checked.
const STEP: Duration = Duration::from_millis(5);
/// The least memory that is added when the guest asks for more, in MiB: a block of the guest's
/// kernel.
const DEMAND_MIN_MIB: u32 = 128;
/// The most sizes that wait to be sent: one that answers a request, and those of updates meanwhile.
const SIZES: usize = 4;
/// How long a guest that is given no memory waits before it may ask again.
const RETRY: Duration = Duration::from_secs(1);

/// Why the machine did not grow.
#[derive(Debug, Error)]
pub enum GrowthError {
    /// A request to the monitor failed.
    #[error("cannot grow the machine: {0}")]
    Machine(#[from] MachineError),
    /// A call to the agent failed.
    #[error("cannot grow the machine: {0}")]
    Agent(#[from] AgentError),
    /// The host's pool has too few huge pages.
    #[error(transparent)]
    HugePages(#[from] Shortage),
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
    /// The virtio-mem device for memory of huge pages is attached.
    huge_attached: bool,
    /// The huge pages that the monitor has reserved; the guest may have let an attempt fail since.
    huge_reserved: u32,
    /// Memory that is plugged for huge pages, in MiB.
    huge_mib: u32,
    /// The machine could not be given what its containers needed: they have to do with what it has,
    /// and the guest's out-of-memory killer decides.
    is_full: bool,
    /// Tells the agent the size, once it watches the containers' memory.
    sizes: Option<mpsc::Sender<MemorySize>>,
}

impl Growth {
    /// The size of a machine that has just booted.
    #[must_use]
    pub fn new(boot: MachineSize, most: MachineSize) -> Self {
        Self { boot, most, now: Mutex::new(Now::of(MachineSize { huge_pages: 0, ..boot })) }
    }

    /// The huge pages of the host's pool that the machine has, whether its guest has made huge pages
    /// of them or not: it may touch them all.
    pub async fn huge_pages(&self) -> u32 {
        self.now.lock().await.huge_reserved
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
        let counted_on = now.size.expected_mib;
        now.size.expected_mib = to.expected_mib;
        if to.memory_mib > now.size.memory_mib {
            self.plug(machine, agent, &mut now, to.memory_mib).await?;
            now.size.memory_mib = to.memory_mib;
            now.is_full = false;
            now.tell();
        } else if to.expected_mib > counted_on {
            now.tell();
        }
        if to.huge_pages > now.size.huge_pages {
            self.plug_huge(machine, agent, &mut now, to.huge_pages).await?;
            now.size.huge_pages = to.huge_pages;
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
            expected_mib: to.expected_mib.min(self.most.expected_mib).max(now.expected_mib),
            huge_pages: to.huge_pages.max(now.huge_pages),
        }
    }

    /// Lets the agent ask for memory from now on; returns its requests, for [`Growth::meet`].
    ///
    /// # Errors
    /// When the agent cannot watch the containers' memory.
    pub async fn listen(&self, agent: &Agent) -> Result<Streaming<MemoryWanted>, GrowthError> {
        let mut now = self.now.lock().await;
        let (sizes, told) = mpsc::channel(SIZES);
        now.sizes = Some(sizes);
        now.tell();
        Ok(agent.memory(told).await?)
    }

    /// Answers a request of the agent: half of the machine's memory is added, as far as the
    /// containers can count on it. After a failure the machine is as large as it gets by itself.
    pub async fn meet(&self, machine: &Machine, agent: &Agent) {
        match self.add(machine, agent).await {
            Ok(true) => {}
            // A guest that goes on asking must not keep the host busy.
            Ok(false) => sleep(RETRY).await,
            Err(error) => {
                tracing::warn!(error = %error, "cannot add the memory that the containers need");
                self.now.lock().await.is_full = true;
            }
        }
        self.now.lock().await.tell();
    }

    /// Plugs what a request of the agent brings; returns whether that is anything.
    async fn add(&self, machine: &Machine, agent: &Agent) -> Result<bool, GrowthError> {
        let mut now = self.now.lock().await;
        let memory_mib = now.next_mib(self.most);
        if memory_mib <= now.size.memory_mib {
            return Ok(false);
        }
        self.plug(machine, agent, &mut now, memory_mib).await?;
        now.size.memory_mib = memory_mib;
        Ok(true)
    }

    /// Adds huge pages up to so many in total, and has the guest's kernel take them into its pool.
    async fn plug_huge(
        &self,
        machine: &Machine,
        agent: &Agent,
        now: &mut Now,
        pages: u32,
    ) -> Result<(), GrowthError> {
        let pool = Pool::of_the_host();
        let more = pages - now.size.huge_pages;
        let missing = pages.saturating_sub(now.huge_reserved);
        pool.check(missing)?;
        if !now.huge_attached {
            let most = u64::from(pages.max(pool.pages)) * u64::from(HUGE_PAGE_MIB);
            // What is spare beside the pages is less than this, and addresses cost nothing.
            let region = most + most / 16 + u64::from(DEMAND_MIN_MIB);
            let region = u32::try_from(region).unwrap_or(u32::MAX);
            machine.attach_huge_memory(region, self.room_mib()).await?;
            now.huge_attached = true;
        }
        agent.expect_huge_pages().await?;
        let plugged = machine.plug_huge(pages).await;
        if let Ok(mib) = plugged {
            (now.huge_reserved, now.huge_mib) = (now.huge_reserved.max(pages), mib);
        }
        let added =
            agent.add_huge_pages(if plugged.is_ok() { more } else { 0 }, now.huge_mib).await;
        if plugged.is_err() {
            // Another pod may have taken them since.
            Pool::of_the_host().check(missing)?;
        }
        plugged?;
        Ok(added?)
    }

    /// How much memory can be plugged, in MiB, huge pages aside.
    const fn room_mib(&self) -> u32 {
        self.most.memory_mib - self.boot.memory_mib
    }

    async fn plug(
        &self,
        machine: &Machine,
        agent: &Agent,
        now: &mut Now,
        memory_mib: u32,
    ) -> Result<(), GrowthError> {
        if !now.attached {
            machine.attach_memory(self.room_mib()).await?;
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

impl Now {
    fn of(size: MachineSize) -> Self {
        Self {
            size,
            attached: false,
            huge_attached: false,
            huge_reserved: 0,
            huge_mib: 0,
            is_full: false,
            sizes: None,
        }
    }

    /// The memory after the next request of the agent, in MiB.
    fn next_mib(&self, most: MachineSize) -> u32 {
        let step = (self.size.memory_mib / 2).next_multiple_of(DEMAND_MIN_MIB);
        let limit = self.size.expected_mib.min(most.memory_mib);
        self.size.memory_mib.saturating_add(step).min(limit).max(self.size.memory_mib)
    }

    /// Tells the agent how large the machine is, if it wants to know. An agent that does not take
    /// the sizes does not delay the host.
    fn tell(&self) {
        let Self { size: MachineSize { memory_mib: mib, expected_mib, .. }, is_full, .. } = *self;
        let size = MemorySize { mib, expected_mib: if is_full { mib } else { expected_mib } };
        if let Some(sizes) = &self.sizes
            && let Err(error) = sizes.try_send(size)
        {
            tracing::debug!(error = %error, "the agent does not take the size of the machine");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(vcpus: u8, memory_mib: u32) -> MachineSize {
        MachineSize { vcpus, memory_mib, expected_mib: memory_mib, huge_pages: 0 }
    }

    #[test]
    fn a_machine_grows_by_half_as_far_as_its_containers_count_on_it() {
        let next = |memory_mib, expected_mib, most| {
            Now::of(MachineSize { expected_mib, ..size(1, memory_mib) }).next_mib(size(1, most))
        };
        assert_eq!(next(256, 4096, 4096), 384);
        assert_eq!(next(384, 4096, 4096), 640);
        assert_eq!(next(3000, 4096, 4096), 4096);
        assert_eq!(next(256, 256, 4096), 256);
        assert_eq!(next(300, 4096, 256), 300);
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
