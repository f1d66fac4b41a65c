//! One container and what happens to it. The only caller of the state machine
//! ([`crate::supervisor::lifecycle`]); whatever it decides is written to disk before anybody is answered.
//!
//! How it begins is in `creation`, how it ends in `ending`.

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

/// Why something did not happen to a container.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// Not in this state.
    #[error(transparent)]
    Transition(#[from] InvalidTransition),
    /// There is nothing to signal.
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
    /// A hook that has a say.
    #[error(transparent)]
    Hook(std::io::Error),
    /// The pod's cgroup on the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// How the host weighs the pod.
    #[error("cannot set oomScoreAdj {0}")]
    OomScore(i32, #[source] std::io::Error),
    /// Its stand-in.
    #[error("no process attached to the container's streams")]
    StandIn(#[source] std::io::Error),
    /// Somebody deletes it.
    #[error("the container was deleted while it was being created")]
    Cancelled,
    /// Work that was done apart.
    #[error("a thread of the supervisor failed")]
    Thread(#[source] std::io::Error),
}

/// A container.
#[derive(Debug)]
pub struct Container {
    home: Home,
    /// Cgroups are units of systemd.
    systemd_cgroup: bool,
    /// This process removes the container's cgroup itself, and has to leave it before.
    ephemeral: bool,
    /// The limits of its creator.
    limits: ProcessLimits,
    /// What its creator adds to its bundle.
    additions: Additions,
    /// Who else is in the pod.
    sandbox: Arc<Sandbox>,
    /// True once it must not be created any more.
    cancelled: watch::Sender<bool>,
    life: Mutex<Life>,
    exit: watch::Sender<Option<Exit>>,
    /// That of its state, for those who wait for another.
    status: watch::Sender<Status>,
    /// True once nothing of the pod runs any more.
    over: watch::Sender<bool>,
    /// True once nobody waits for the stand-in to read the rest of the streams.
    hurry: watch::Sender<bool>,
    /// True once its init process was killed: it ends soon, whatever it waits for.
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
}

impl Container {
    /// A container whose id has been claimed; this process keeps its state from now on.
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
            life: Mutex::new(Life { state, pod: None, host: None, poststart: Vec::new() }),
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

    /// What is known of it.
    pub async fn state(&self) -> State {
        self.life.lock().await.state.clone()
    }

    /// Lets the user's program run.
    ///
    /// # Errors
    /// When it is not created, or the guest cannot.
    pub async fn start(&self) -> Result<Process, ContainerError> {
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Started)?;
        let (pod, process) = running(&life)?;
        // What has come since the container was created.
        pod.follow_network().await;
        // On disk before it runs: a program that runs is never said to wait for its start.
        let waiting = life.state.status;
        self.advance(&mut life, Event::Started)?;
        if let Err(error) = pod.agent.start(self.home.id()).await {
            self.set_status(&mut life, waiting)?;
            return Err(error.into());
        }
        let (hooks, view) = (life.poststart.clone(), self.home.view(life.state.clone()));
        drop(life);
        // Hooks take their time, and only this call waits for them.
        let _ = tokio::task::spawn_blocking(move || hooks::run("poststart", &hooks, &view)).await;
        Ok(process)
    }

    /// Signals the init process, or all. One that is killed ends soon: if the guest does not end it, the
    /// machine does.
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
                // It has ended, or is about to.
                Err(error) if error.is_too_late() => Err(ContainerError::NotRunning),
                other => Ok(other?),
            },
            // A guest that stands still answers nothing.
            _ = self.wait() => match signal {
                SIGKILL => Ok(()),
                _ => Err(ContainerError::NotRunning),
            },
        }
    }

    /// Freezes all processes.
    ///
    /// # Errors
    /// When it does not run, or a process does not freeze in time.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        // A process that is just being added would be frozen half-made.
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

    /// Changes limits, inside and on the host. The machine grows with them; it does not shrink.
    ///
    /// # Errors
    /// When it has ended, its machine does not grow, or a kernel refuses one.
    pub async fn update(&self, change: &LinuxResources) -> Result<(), ContainerError> {
        let pod = self.pod().await?;
        bundle::check_files(change).map_err(BundleError::from)?;
        Ok(self.sandbox.update(self.home.id(), change, &pod).await?)
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The sender lives in this container, so the wait ends with a value.
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.unwrap_or_else(proxy::killed)
    }

    /// The processes of the host that stand for it and for those that joined it.
    pub async fn stand_ins(&self) -> Vec<Process> {
        let own = self.life.lock().await.state.stand_in;
        own.into_iter().chain(self.execs.stand_ins()).collect()
    }

    /// Its processes, as the guest numbers them.
    ///
    /// # Errors
    /// When it has ended.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, ContainerError> {
        let pod = self.pod().await?;
        Ok(pod.agent.processes(self.home.id()).await?)
    }

    /// Ends what is left of one that does not run any more, or was never started, and waits until
    /// nothing of its pod is left; with `force`, of any.
    ///
    /// # Errors
    /// While it runs, without `force`.
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
                    // It was about to be created.
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

    /// Waits until its status is another than this one.
    pub(crate) async fn is_not(&self, status: Status) {
        // The sender lives in this container.
        let _ = self.status.subscribe().wait_for(|now| *now != status).await;
    }

    /// Waits until its processes are not frozen.
    pub(crate) async fn is_thawed(&self) {
        // The sender lives in this container.
        let _ = self.status.subscribe().wait_for(|now| !now.is_paused()).await;
    }

    /// Waits until nothing of the pod runs any more.
    pub async fn is_over(&self) {
        // The sender lives in this container.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// Makes the stand-in of a further process one of the pod's processes.
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

    /// Writes down a status; without that it is as it was.
    fn set_status(&self, life: &mut Life, status: Status) -> Result<(), ContainerError> {
        let before = std::mem::replace(&mut life.state.status, status);
        self.home.write(&life.state).inspect_err(|_| life.state.status = before)?;
        self.status.send_replace(status);
        Ok(())
    }
}

/// What the container is to the host's kernel.
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
