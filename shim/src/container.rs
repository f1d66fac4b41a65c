//! One container and what happens to it. The only caller of the state machine
//! ([`crate::lifecycle`]); whatever it decides is written to disk before anybody is answered.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::Streams;
use oci_spec::runtime::Hook;
use thiserror::Error;
use tokio::sync::{Mutex, MutexGuard, watch};

use crate::agent::AgentError;
use crate::attach::StandIn;
use crate::bundle::{self, BundleError, HostSize, Plan};
use crate::channel::Channel;
use crate::hooks;
use crate::lifecycle::{Event, InvalidTransition, Status};
use crate::pod::{Pod, PodError};
use crate::process::Process;
use crate::state::{Exit, Home, State, StateError};
use crate::trace::Phase;

/// The status of a container whose machine ended under it: as if killed.
const KILLED: u8 = 137;
/// How long a container may live on that is killed because nobody stands for it any more.
const KILL_PATIENCE: Duration = Duration::from_secs(20);

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
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its stand-in.
    #[error("no process attached to the container's streams")]
    StandIn(#[source] std::io::Error),
}

/// A container.
#[derive(Debug)]
pub struct Container {
    home: Home,
    life: Mutex<Life>,
    exit: watch::Sender<Option<Exit>>,
    /// True once nothing of the pod runs any more.
    over: watch::Sender<bool>,
    /// True once nobody waits for the stand-in to read the rest of the streams.
    hurry: watch::Sender<bool>,
}

#[derive(Debug)]
struct Life {
    state: State,
    pod: Option<Arc<Pod>>,
    poststart: Vec<Hook>,
}

impl Container {
    /// A container whose id has been claimed; this process keeps its state from now on.
    ///
    /// # Errors
    /// When its directory cannot be written.
    pub fn adopt(home: Home) -> Result<Arc<Self>, ContainerError> {
        let mut state = home.read()?;
        state.keeper = Process::current().map_err(ContainerError::StandIn)?;
        home.write(&state)?;
        Ok(Arc::new(Self {
            home,
            life: Mutex::new(Life { state, pod: None, poststart: Vec::new() }),
            exit: watch::channel(None).0,
            over: watch::channel(false).0,
            hurry: watch::channel(false).0,
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

    /// Reads the bundle, starts the pod, creates the container and hands its streams to the
    /// stand-in that connects to `listener`.
    ///
    /// # Errors
    /// When any of it fails; nothing is left running then.
    pub async fn create(self: &Arc<Self>, listener: &Channel) -> Result<Process, ContainerError> {
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Prepared)?;
        let bundle = bundle::load(&life.state.bundle)?;
        let plan = bundle.plan(self.home.id(), HostSize::measure())?;
        for field in &plan.dropped {
            tracing::warn!(field, "means nothing inside the machine and is left out");
        }
        let attached = async { StandIn::accept(listener).await.map_err(ContainerError::StandIn) };
        let started = async { Ok::<_, ContainerError>(Pod::start(&self.home, &plan).await?) };
        let (stand_in, pod) = tokio::try_join!(attached, started)?;
        let phase = Phase::begin("container create");
        let streams = self.create_in_guest(&pod, &stand_in, &plan).await?;
        stand_in.hand_over(&streams).await.map_err(ContainerError::StandIn)?;
        phase.end();
        let pod = Arc::new(pod);
        life.state.stand_in = Some(stand_in.process);
        life.state.helpers = pod.processes();
        life.state.rootfs = plan.rootfs;
        life.state.annotations = plan.annotations;
        life.state.poststop = plan.hooks.poststop().clone().unwrap_or_default();
        life.poststart = plan.hooks.poststart().clone().unwrap_or_default();
        life.pod = Some(pod.clone());
        self.advance(&mut life, Event::Prepared)?;
        let process = stand_in.process;
        tokio::spawn(self.clone().watch_over(pod, stand_in));
        Ok(process)
    }

    async fn create_in_guest(
        &self,
        pod: &Pod,
        stand_in: &StandIn,
        plan: &Plan,
    ) -> Result<Vec<std::os::unix::net::UnixStream>, ContainerError> {
        let open = async |wanted: bool| -> Result<_, ContainerError> {
            if wanted { Ok(Some(pod.open_stream().await?)) } else { Ok(None) }
        };
        let wants = stand_in.wants;
        let (stdin, stdout, stderr) =
            tokio::try_join!(open(wants.stdin), open(wants.stdout), open(wants.stderr))?;
        let header = |stream: &Option<(bulkhead_protocol::StreamHeader, _)>| {
            stream.as_ref().map_or_else(Vec::new, |(header, _)| header.0.to_vec())
        };
        let streams =
            Streams { stdin: header(&stdin), stdout: header(&stdout), stderr: header(&stderr) };
        tokio::select! {
            created = pod.agent.create(self.home.id(), plan.spec_json.clone(), streams) => created?,
            words = pod.broken() => {
                return Err(PodError::Machine(crate::vm::MachineError::Ended(words)).into());
            }
        };
        Ok([stdin, stdout, stderr].into_iter().flatten().map(|(_, stream)| stream).collect())
    }

    /// Lets the user's program run.
    ///
    /// # Errors
    /// When it is not created, or the guest cannot.
    pub async fn start(&self) -> Result<Process, ContainerError> {
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Started)?;
        let (pod, process) = running(&life)?;
        pod.agent.start(self.home.id()).await?;
        self.advance(&mut life, Event::Started)?;
        let (hooks, view) = (life.poststart.clone(), self.home.view(life.state.clone()));
        drop(life);
        // Hooks take their time, and only this call waits for them.
        let _ = tokio::task::spawn_blocking(move || hooks::run("poststart", &hooks, &view)).await;
        Ok(process)
    }

    /// Signals the init process, or all.
    ///
    /// # Errors
    /// When it has ended.
    pub async fn kill(&self, signal: u32, all: bool) -> Result<(), ContainerError> {
        let pod = running(&*self.life.lock().await)?.0;
        Ok(pod.agent.kill(self.home.id(), signal, all).await?)
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The sender lives in this container, so the wait ends with a value.
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.unwrap_or(Exit { status: KILLED, at_ns: now_ns() })
    }

    /// Its processes, as the guest numbers them.
    ///
    /// # Errors
    /// When it has ended.
    pub async fn processes(&self) -> Result<Vec<u32>, ContainerError> {
        let pod = running(&*self.life.lock().await)?.0;
        Ok(pod.agent.processes(self.home.id()).await?)
    }

    /// Ends what is left of one that does not run any more, or was never started, and waits until
    /// nothing of its pod is left.
    ///
    /// # Errors
    /// While it runs.
    pub async fn delete(&self) -> Result<Exit, ContainerError> {
        let status = self.life.lock().await.state.status;
        match status {
            Status::Stopped => {}
            Status::Created => self.kill(9, true).await?,
            from => return Err(InvalidTransition { from, event: Event::Exited }.into()),
        }
        let exit = self.wait().await;
        self.hurry.send_replace(true);
        self.is_over().await;
        Ok(exit)
    }

    /// Waits until nothing of the pod runs any more.
    pub async fn is_over(&self) {
        // The sender lives in this container.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// Waits for the end, whichever it is, tells everybody, and takes the pod down.
    async fn watch_over(self: Arc<Self>, pod: Arc<Pod>, stand_in: StandIn) {
        let (exit, reason) = self.until_end(&pod, &stand_in).await;
        {
            let mut life = self.life.lock().await;
            life.state.exit = Some(exit);
            life.pod = None;
            if let Err(error) = self.advance(&mut life, Event::Exited) {
                tracing::error!(error = %error, "end of the container was not written");
            }
        }
        self.exit.send_replace(Some(exit));
        if stand_in.tell_exit(exit.status, reason).await.is_ok() {
            let phase = Phase::begin("drain");
            let mut hurry = self.hurry.subscribe();
            tokio::select! {
                // It closes its connection when it has read all; it may still be sent signals.
                () = async { while stand_in.signal().await.is_some() {} } => {}
                _ = hurry.wait_for(|hurry| *hurry) => {}
                _ = pod.broken() => {}
            }
            phase.end();
        }
        // Verbs hold the pod for the length of a call; each call is bounded.
        let mut pod = pod;
        let pod = loop {
            match Arc::try_unwrap(pod) {
                Ok(pod) => break pod,
                Err(shared) => pod = shared,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        pod.end().await;
        self.over.send_replace(true);
    }

    async fn until_end(&self, pod: &Pod, stand_in: &StandIn) -> (Exit, Option<String>) {
        let id = self.home.id();
        let killed = |reason| (Exit { status: KILLED, at_ns: now_ns() }, Some(reason));
        let mut present = true;
        let given_up = tokio::time::sleep(KILL_PATIENCE);
        tokio::pin!(given_up);
        let waited = pod.agent.wait(id);
        tokio::pin!(waited);
        loop {
            tokio::select! {
                answer = &mut waited => return match answer {
                    Ok(reply) => (
                        Exit {
                            status: u8::try_from(reply.exit_status).unwrap_or(u8::MAX),
                            at_ns: reply.exited_at_ns,
                        },
                        None,
                    ),
                    Err(error) => {
                        // The machine's own end explains more than the broken connection.
                        let patience = Duration::from_secs(1);
                        let words = tokio::time::timeout(patience, pod.broken()).await;
                        killed(words.unwrap_or_else(|_| error.to_string()))
                    }
                },
                words = pod.broken() => return killed(words),
                () = &mut given_up, if !present => {
                    return killed("the guest did not end the container".to_owned());
                }
                signal = stand_in.signal(), if present => {
                    present = signal.is_some();
                    if !present {
                        given_up.as_mut().reset(tokio::time::Instant::now() + KILL_PATIENCE);
                    }
                    let (signal, all) = signal.map_or((9, true), |signal| (signal, false));
                    if let Err(error) = pod.agent.kill(id, signal, all).await {
                        tracing::debug!(signal, error = %error, "signal was not passed on");
                    }
                }
            }
        }
    }

    fn advance(&self, life: &mut MutexGuard<'_, Life>, event: Event) -> Result<(), ContainerError> {
        life.state.status = life.state.status.on(event)?;
        Ok(self.home.write(&life.state)?)
    }
}

/// The pod and the stand-in of a container that has not ended.
fn running(life: &Life) -> Result<(Arc<Pod>, Process), ContainerError> {
    let pod = life.pod.clone().ok_or(ContainerError::NotRunning)?;
    Ok((pod, life.state.stand_in.ok_or(ContainerError::NotRunning)?))
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
