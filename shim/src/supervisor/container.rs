//! One container and the operations on it. This module is the only caller of the state machine
//! ([`crate::supervisor::lifecycle`]). A new status is written to disk before the caller gets an
//! answer.
//!
//! `creation` creates a container, `ending` ends it.

mod creation;
mod ending;

use std::sync::Arc;

use bulkhead_protocol::agent::ProcessInfo;
use oci_spec::runtime::{Hook, LinuxResources};
use thiserror::Error;
use tokio::sync::{Mutex, watch};

use crate::bundle::{self, Additions, BundleError, ProcessLimits};
use crate::cgroup::{Cgroup, CgroupError};
use crate::machine::agent::{AgentError, Target};
use crate::sockets::{Connections, NodeError};
use crate::state::process::Process;
use crate::state::{Exit, Home, State, StateError};
use crate::streams::attach::StandIn;
use crate::supervisor::exec::{ExecError, Execs};
use crate::supervisor::lifecycle::{Event, InvalidTransition, Status};
use crate::supervisor::pod::{Pod, PodError};
use crate::supervisor::sandbox::{Sandbox, SandboxError};
use crate::supervisor::{ServeRequest, hooks, proxy};

/// The signal that no process survives.
const SIGKILL: u32 = 9;

/// Why an operation on a container failed.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// The container's status does not allow it.
    #[error(transparent)]
    Transition(#[from] InvalidTransition),
    /// The container does not run.
    #[error("container not running")]
    NotRunning,
    /// Its bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Its pod.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The pod that it joins.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A further process of it.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// A socket or FIFO of the host that it mounts.
    #[error(transparent)]
    HostSocket(#[from] NodeError),
    /// A hook whose failure stops the creation.
    #[error(transparent)]
    Hook(std::io::Error),
    /// The pod's cgroup on the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The OOM score adjustment of a process of the pod on the host.
    #[error("cannot set oomScoreAdj {0}")]
    OomScore(i32, #[source] std::io::Error),
    /// Its stand-in.
    #[error("no process attached to the container's streams")]
    StandIn(#[source] std::io::Error),
    /// The container was deleted while it was being created.
    #[error("the container was deleted while it was being created")]
    Cancelled,
    /// A thread that did blocking work failed.
    #[error("a thread of the supervisor failed")]
    Thread(#[source] std::io::Error),
}

/// A container.
#[derive(Debug)]
pub struct Container {
    home: Home,
    /// Cgroups are units of systemd.
    systemd_cgroup: bool,
    /// The supervisor removes the container's cgroup itself, so it has to leave the cgroup first.
    ephemeral: bool,
    /// The limits of its creator.
    limits: ProcessLimits,
    /// What its creator adds to its bundle.
    additions: Additions,
    /// The containers of the pod.
    sandbox: Arc<Sandbox>,
    /// True once the creation is cancelled.
    cancelled: watch::Sender<bool>,
    life: Mutex<Life>,
    exit: watch::Sender<Option<Exit>>,
    /// The status in `life.state`, for callers that wait for a change.
    status: watch::Sender<Status>,
    /// True once nothing of the container runs any more; for the last container, nothing of the
    /// pod.
    over: watch::Sender<bool>,
    /// True once nobody waits for the stand-in to read the rest of the streams.
    hurry: watch::Sender<bool>,
    /// True once its init process was sent SIGKILL: it has to end within a bounded time.
    doomed: watch::Sender<bool>,
    /// Processes beside the init process.
    pub(crate) execs: Execs,
}

#[derive(Debug)]
struct Life {
    state: State,
    pod: Option<Arc<Pod>>,
    host: Option<OnHost>,
    poststart: Vec<Hook>,
    /// To sockets of the host.
    connections: Connections,
}

impl Container {
    /// Takes over a container whose id has been claimed: from now on this process writes its state.
    ///
    /// # Errors
    /// When its directory cannot be written.
    pub fn take_over(
        home: Home,
        request: &ServeRequest,
        sandbox: Arc<Sandbox>,
    ) -> Result<Arc<Self>, ContainerError> {
        let mut state = home.read()?;
        state.joined = sandbox.has_begun();
        state.keeper = Some(Process::current().map_err(ContainerError::StandIn)?);
        home.write(&state)?;
        Ok(Arc::new(Self {
            home,
            systemd_cgroup: request.systemd_cgroup,
            ephemeral: request.ephemeral,
            limits: request.limits.clone(),
            additions: request.additions.clone(),
            sandbox,
            cancelled: watch::channel(false).0,
            status: watch::channel(state.status).0,
            life: Mutex::new(Life {
                state,
                pod: None,
                host: None,
                poststart: Vec::new(),
                connections: Connections::default(),
            }),
            exit: watch::channel(None).0,
            over: watch::channel(false).0,
            hurry: watch::channel(false).0,
            doomed: watch::channel(false).0,
            execs: Execs::default(),
        }))
    }

    /// Its directory.
    #[must_use]
    pub const fn home(&self) -> &Home {
        &self.home
    }

    /// A copy of its state.
    pub async fn state(&self) -> State {
        self.life.lock().await.state.clone()
    }

    /// Starts the user's program.
    ///
    /// # Errors
    /// When the status is not `created`, or the guest cannot start it.
    pub async fn start(&self) -> Result<Process, ContainerError> {
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Started)?;
        let (pod, process) = running(&life)?;
        // The network may have changed since the container was created.
        pod.follow_network().await;
        // Written before the start, so that the state never says "created" while the program runs.
        let waiting = life.state.status;
        self.advance(&mut life, Event::Started)?;
        if let Err(error) = pod.agent.start(self.home.id()).await {
            self.set_status(&mut life, waiting)?;
            return Err(error.into());
        }
        let (hooks, view) = (life.poststart.clone(), self.home.view(life.state.clone()));
        drop(life);
        // Hooks can take long; only this call waits for them.
        let _ = tokio::task::spawn_blocking(move || hooks::run("poststart", &hooks, &view)).await;
        Ok(process)
    }

    /// Signals the init process, or all processes. After SIGKILL the container ends within a
    /// bounded time: if the guest does not end it, the supervisor ends the machine.
    ///
    /// # Errors
    /// When it has ended.
    pub async fn kill(&self, signal: u32, all: bool) -> Result<(), ContainerError> {
        let pod = self.pod().await?;
        if signal == SIGKILL {
            self.doomed.send_replace(true);
        }
        let target = Target::init(self.home.id());
        tokio::select! {
            signalled = pod.agent.kill(target, signal, all) => match signalled {
                // The process has ended, or is about to.
                Err(error) if error.is_too_late() => Err(ContainerError::NotRunning),
                other => Ok(other?),
            },
            // A guest that hangs does not answer, so also wait for the end of the container.
            _ = self.wait() => match signal {
                SIGKILL => Ok(()),
                _ => Err(ContainerError::NotRunning),
            },
        }
    }

    /// Freezes all processes.
    ///
    /// # Errors
    /// When the status does not allow it, or a process does not freeze in time.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        // Waits for processes that are being started: they must not be frozen halfway.
        let _still = self.execs.gate.write().await;
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Frozen)?;
        running(&life)?.0.agent.pause(self.home.id()).await?;
        self.advance(&mut life, Event::Frozen)
    }

    /// Lets a frozen container run again.
    ///
    /// # Errors
    /// When it is not frozen.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Thawed)?;
        running(&life)?.0.agent.resume(self.home.id()).await?;
        self.advance(&mut life, Event::Thawed)
    }

    /// Changes limits in the guest and on the host. The machine grows with them; it does not
    /// shrink.
    ///
    /// # Errors
    /// When the container has ended, its machine does not grow, or a kernel refuses a limit.
    pub async fn update(&self, change: &LinuxResources) -> Result<(), ContainerError> {
        let pod = self.pod().await?;
        bundle::check_files(change).map_err(BundleError::from)?;
        Ok(self.sandbox.update(self.home.id(), change, &pod).await?)
    }

    /// Waits for the end of the init process.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The container owns the sender, so the wait ends with a value.
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.unwrap_or_else(proxy::killed)
    }

    /// The stand-ins of its init process and of its further processes.
    pub async fn stand_ins(&self) -> Vec<Process> {
        let own = self.life.lock().await.state.stand_in;
        own.into_iter().chain(self.execs.stand_ins()).collect()
    }

    /// Its processes, with the pids of the guest.
    ///
    /// # Errors
    /// When it has ended.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, ContainerError> {
        let pod = self.pod().await?;
        Ok(pod.agent.processes(self.home.id()).await?)
    }

    /// Ends a container that has stopped or was never started, or with `force` any container, and
    /// waits until nothing of it runs any more.
    ///
    /// # Errors
    /// When the container runs, is paused or is being created, without `force`.
    pub async fn delete(&self, force: bool) -> Result<Exit, ContainerError> {
        // The container itself is locked while it is being created.
        let status = *self.status.borrow();
        match status {
            Status::Stopped => {}
            Status::Creating if force => {
                self.cancelled.send_replace(true);
                tokio::select! {
                    biased;
                    () = self.is_over() => return Ok(proxy::killed()),
                    // The creation finished before it could be cancelled.
                    () = self.is_not(Status::Creating) => self.kill_if_running().await?,
                }
            }
            Status::Created => self.kill_if_running().await?,
            _ if force => self.kill_if_running().await?,
            from => return Err(InvalidTransition { from, event: Event::Exited }.into()),
        }
        let exit = self.wait().await;
        self.hurry.send_replace(true);
        self.is_over().await;
        Ok(exit)
    }

    async fn kill_if_running(&self) -> Result<(), ContainerError> {
        match self.kill(SIGKILL, true).await {
            Err(ContainerError::NotRunning) => Ok(()),
            other => other,
        }
    }

    /// Waits until its status is not `status`.
    pub(crate) async fn is_not(&self, status: Status) {
        // The container owns the sender, so waiting does not fail.
        let _ = self.status.subscribe().wait_for(|now| *now != status).await;
    }

    /// Waits until the container is not paused.
    pub(crate) async fn is_thawed(&self) {
        // The container owns the sender, so waiting does not fail.
        let _ = self.status.subscribe().wait_for(|now| !now.is_paused()).await;
    }

    /// Waits until nothing of the container runs any more; for the last container, nothing of the
    /// pod.
    pub async fn is_over(&self) {
        // The container owns the sender, so waiting does not fail.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// Moves the stand-in of a further process to the container's cgroup and sets its OOM score.
    pub(crate) async fn adopt(&self, stand_in: &StandIn) -> Result<(), ContainerError> {
        let host = self.life.lock().await.host.clone();
        match host {
            Some(host) => host.adopt(stand_in).await,
            None => Ok(()),
        }
    }

    /// The pod, while the container has not ended.
    pub(crate) async fn pod(&self) -> Result<Arc<Pod>, ContainerError> {
        Ok(running(&*self.life.lock().await)?.0)
    }

    fn advance(&self, life: &mut Life, event: Event) -> Result<(), ContainerError> {
        let next = life.state.status.on(event)?;
        self.set_status(life, next)
    }

    /// Writes a status to disk; if that fails, the status stays as it was.
    fn set_status(&self, life: &mut Life, status: Status) -> Result<(), ContainerError> {
        let before = std::mem::replace(&mut life.state.status, status);
        self.home.write(&life.state).inspect_err(|_| life.state.status = before)?;
        self.status.send_replace(status);
        Ok(())
    }
}

/// The container's cgroup and OOM score adjustment on the host.
#[derive(Clone, Debug)]
struct OnHost {
    cgroup: Cgroup,
    score: Option<i32>,
}

/// The pod and the stand-in of a container that has not ended.
fn running(life: &Life) -> Result<(Arc<Pod>, Process), ContainerError> {
    let pod = life.pod.clone().ok_or(ContainerError::NotRunning)?;
    Ok((pod, life.state.stand_in.ok_or(ContainerError::NotRunning)?))
}
