//! The machine's network interfaces: one for each that the container's network namespace has.
//!
//! Whoever made the container may add, change and remove interfaces at any time. The guest follows
//! by itself, some milliseconds later. A process that is started then finds what was there before
//! it, because [`Interfaces::update`] is called first.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_netlink::Changes;
use bulkhead_protocol::agent;
use bulkhead_vmm::config::PAIRS_MAX;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::machine::agent::{Agent, AgentError};
use crate::machine::channel::watch;
use crate::machine::monitor::{FIRST_NETWORK_SLOT, Machine, MachineError};
use crate::network::mirror::{Interface, Mirror, MirrorError, Update, View};
use crate::network::vhost;
use crate::policy::NetworkPolicy;

/// How long to wait for further changes after one: an interface is set up in several steps.
const SETTLE: Duration = Duration::from_millis(20);
/// The device allows any MTU; the agent sets the one that the interface has.
const MTU_MAX: u16 = u16::MAX;

/// Why the machine's network is not the container's.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The host's side.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// The monitor.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest's side.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The socket that reports changes.
    #[error("changes of the container's network")]
    Changes(#[source] io::Error),
}

/// The interfaces of one machine.
#[derive(Debug)]
pub struct Interfaces {
    /// Queue pairs of each interface.
    pairs: usize,
    policy: NetworkPolicy,
    /// `None` while the machine has no network of a container.
    mirror: Mutex<Option<Mirror>>,
    changes: OnceLock<Changes>,
    /// A change was reported that has not been read yet.
    stale: AtomicBool,
}

impl Interfaces {
    /// No interfaces yet, for a machine with so many processors: each can have a queue pair of its
    /// own.
    #[must_use]
    pub fn new(processors: u8, policy: NetworkPolicy) -> Self {
        Self {
            pairs: usize::from(processors).clamp(1, PAIRS_MAX),
            policy,
            mirror: Mutex::default(),
            changes: OnceLock::new(),
            stale: AtomicBool::new(false),
        }
    }

    /// Gives the machine an interface for each that a network namespace has, and the guest its
    /// addresses, routes and neighbours. To be called once. The [`Bell`] that it returns tells when
    /// to call [`Interfaces::update`].
    ///
    /// # Errors
    /// When an interface cannot be attached; the machine may have others then.
    pub async fn attach(
        &self,
        (machine, agent): (&Machine, &Agent),
        namespace: PathBuf,
    ) -> Result<Bell, NetworkError> {
        let pairs = self.pairs;
        let opened = spawn_blocking(move || Mirror::open(&namespace, pairs)).await;
        let (mirror, changes) = opened.map_err(|error| NetworkError::Changes(error.into()))??;
        let bell = Bell::of(&changes).map_err(NetworkError::Changes)?;
        // Cannot fail, as this is called once.
        let _ = self.changes.set(changes);
        let mut place = self.mirror.lock().await;
        let (mirror, update) = looked_at(mirror).await?;
        *place = Some(mirror);
        let Some(mut update) = update? else { return Ok(bell) };
        if !update.refused.is_empty() {
            return Err(update.refused.swap_remove(0).into());
        }
        self.pass_on(machine, agent, update).await?;
        Ok(bell)
    }

    /// Passes on to the guest what has changed since the last time; returns whether anything had.
    /// An interface that the guest cannot get is a warning.
    ///
    /// # Errors
    /// When the machine or the guest does not accept the rest.
    pub async fn update(&self, machine: &Machine, agent: &Agent) -> Result<bool, NetworkError> {
        let Some(changes) = self.changes.get() else { return Ok(false) };
        if changes.take().map_err(NetworkError::Changes)? {
            self.stale.store(true, Ordering::Relaxed);
        }
        // A caller that has the lock already may not have seen the change.
        let mut place = self.mirror.lock().await;
        if !self.stale.swap(false, Ordering::Relaxed) {
            return Ok(false);
        }
        let Some(mirror) = place.take() else { return Ok(false) };
        let (mirror, update) = looked_at(mirror).await?;
        *place = Some(mirror);
        let update = update.inspect_err(|_| self.stale.store(true, Ordering::Relaxed))?;
        let Some(mut update) = update else { return Ok(false) };
        for error in update.refused.drain(..) {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(error, "cannot give the guest an interface of the container's network");
        }
        self.pass_on(machine, agent, update).await?;
        Ok(true)
    }

    /// From now on, answers to name servers in the container's network namespace reach them. These
    /// servers ask others through its interfaces, whose frames go to the guest.
    ///
    /// # Errors
    /// When the host's kernel cannot filter these answers.
    pub async fn share_answers(&self) -> Result<(), NetworkError> {
        let mut place = self.mirror.lock().await;
        let Some(mut mirror) = place.take() else { return Ok(()) };
        let shared = spawn_blocking(move || {
            let shared = mirror.share_answers();
            (mirror, shared)
        });
        let (mirror, shared) = shared.await.map_err(|error| NetworkError::Changes(error.into()))?;
        *place = Some(mirror);
        Ok(shared?)
    }

    /// Applies an update to the machine and the guest.
    async fn pass_on(
        &self,
        machine: &Machine,
        agent: &Agent,
        update: Update,
    ) -> Result<(), NetworkError> {
        if !update.gone.is_empty() {
            let slots = update.gone.iter().map(|place| FIRST_NETWORK_SLOT + place);
            agent.release(slots.clone().map(u32::from).collect()).await?;
            for slot in slots {
                machine.detach(slot).await?;
            }
        }
        for (place, taps) in &update.new {
            let of_place = |(it, _): &&(u8, Interface)| it == place;
            if let Some((_, interface)) = update.view.interfaces.iter().find(of_place) {
                let slot = FIRST_NETWORK_SLOT + place;
                attach(machine, (slot, self.policy), taps, interface).await?;
            }
        }
        for (place, plugged) in update.cables {
            machine.set_link(FIRST_NETWORK_SLOT + place, plugged).await?;
        }
        if !update.new.is_empty() {
            agent.rescan().await?;
        }
        Ok(agent.configure(request(update.view)).await?)
    }
}

/// Reads the namespace on another thread, because it may take long.
async fn looked_at(
    mut mirror: Mirror,
) -> Result<(Mirror, Result<Option<Update>, MirrorError>), NetworkError> {
    let looked = spawn_blocking(move || {
        let update = mirror.update();
        (mirror, update)
    });
    looked.await.map_err(|error| NetworkError::Changes(error.into()))
}

/// Gives the machine one interface. The host's kernel moves its frames if it can, else the monitor.
async fn attach(
    machine: &Machine,
    (slot, policy): (u8, NetworkPolicy),
    taps: &[OwnedFd],
    interface: &Interface,
) -> Result<(), NetworkError> {
    let (name, mac) = (&interface.name, interface.mac);
    let reason = match vhost::open(taps.len(), policy) {
        Ok(vhost) => match machine.attach_network(slot, (taps, &vhost), mac, MTU_MAX).await {
            Ok(()) => {
                tracing::info!(interface = %name, "the kernel moves the frames, by vhost-net");
                return Ok(());
            }
            Err(error) => anyhow::Error::from(error),
        },
        Err(error) => error.into(),
    };
    machine.attach_network(slot, (taps, &[]), mac, MTU_MAX).await?;
    let reason = format!("{reason:#}");
    tracing::info!(interface = %name, reason, "the monitor moves the frames, without vhost-net");
    Ok(())
}

fn request(view: View) -> agent::ConfigureRequest {
    let interfaces = view.interfaces.into_iter().map(|(place, interface)| agent::Interface {
        slot: (FIRST_NETWORK_SLOT + place).into(),
        index: interface.index,
        name: interface.name,
        mac: interface.mac.to_vec(),
        mtu: interface.mtu.min(MTU_MAX.into()),
        queue_len: interface.queue_len,
        up: interface.up,
        ipv6: interface.ipv6,
    });
    agent::ConfigureRequest {
        interfaces: interfaces.collect(),
        settings: view.settings,
        ipv6: view.ipv6,
    }
}

/// Rings when something changes in a network namespace.
#[derive(Debug)]
pub struct Bell(AsyncFd<OwnedFd>);

impl Bell {
    fn of(changes: &Changes) -> io::Result<Self> {
        let socket = changes.as_fd().try_clone_to_owned()?;
        Ok(Self(watch(socket)?))
    }

    /// Waits for a change, and then until others have had time to follow.
    ///
    /// # Errors
    /// When the runtime has shut down.
    pub async fn rung(&self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        sleep(SETTLE).await;
        Ok(())
    }
}
