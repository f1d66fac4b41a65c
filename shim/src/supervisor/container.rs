//! One container and what happens to it. The only caller of the state machine
//! ([`crate::supervisor::lifecycle`]); whatever it decides is written to disk before anybody is answered.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::{CreateRequest, ProcessInfo};
use oci_spec::runtime::{Hook, Hooks, LinuxResources};
use thiserror::Error;
use tokio::sync::{Mutex, MutexGuard, watch};

use crate::bundle::{self, Additions, Bundle, BundleError, HostSize, Plan};
use crate::cgroup::{self, Cgroup, CgroupError, Limits};
use crate::machine::agent::{AgentError, Target};
use crate::machine::kvm;
use crate::machine::monitor::MachineError;
use crate::machine::share::ShareDir;
use crate::network::namespace::Network;
use crate::state::process::Process;
use crate::state::{Exit, Home, State, StateError};
use crate::streams::attach::{Attachments, StandIn};
use crate::supervisor::exec::{ExecError, Execs};
use crate::supervisor::hooks;
use crate::supervisor::lifecycle::{Event, InvalidTransition, Status};
use crate::supervisor::notify;
use crate::supervisor::oom;
use crate::supervisor::pod::{Pod, PodError};
use crate::supervisor::proxy;
use crate::supervisor::sandbox::{Departure, Sandbox, SandboxError};
use crate::trace::Phase;

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
    #[error("oomScoreAdj {0} cannot be set")]
    OomScore(i32, #[source] std::io::Error),
    /// Its stand-in.
    #[error("no process attached to the container's streams")]
    StandIn(#[source] std::io::Error),
}

/// A container.
#[derive(Debug)]
pub struct Container {
    home: Home,
    /// Cgroups are units of systemd.
    systemd_cgroup: bool,
    /// This process removes the container's cgroup itself, and has to leave it before.
    ephemeral: bool,
    /// Who else is in the pod.
    sandbox: Arc<Sandbox>,
    life: Mutex<Life>,
    exit: watch::Sender<Option<Exit>>,
    /// That of its state, for those who wait for another.
    status: watch::Sender<Status>,
    /// True once nothing of the pod runs any more.
    over: watch::Sender<bool>,
    /// True once nobody waits for the stand-in to read the rest of the streams.
    hurry: watch::Sender<bool>,
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
    pub async fn take_over(
        home: Home,
        systemd_cgroup: bool,
        ephemeral: bool,
        sandbox: Arc<Sandbox>,
    ) -> Result<Arc<Self>, ContainerError> {
        let mut state = home.read()?;
        state.joined = sandbox.has_begun().await;
        state.keeper = Process::current().map_err(ContainerError::StandIn)?;
        home.write(&state)?;
        Ok(Arc::new(Self {
            home,
            systemd_cgroup,
            ephemeral,
            sandbox,
            status: watch::channel(state.status).0,
            life: Mutex::new(Life { state, pod: None, host: None, poststart: Vec::new() }),
            exit: watch::channel(None).0,
            over: watch::channel(false).0,
            hurry: watch::channel(false).0,
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

    /// Reads the bundle, starts the pod or joins one, creates the container and hands its streams to
    /// its stand-in.
    ///
    /// # Errors
    /// When any of it fails; what runs then is taken back by [`Container::abandon`].
    pub async fn create(
        self: &Arc<Self>,
        attachments: &Attachments,
        additions: Additions,
    ) -> Result<Process, ContainerError> {
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Prepared)?;
        let bundle = bundle::read(&life.state.bundle)?;
        let joined = bundle.check(self.home.root())?;
        let cgroup = Cgroup::of(self.home.id(), bundle.cgroups_path(), self.systemd_cgroup)?;
        let resources = bundle.resources();
        let admission = self.sandbox.enter(self.home.id(), (&cgroup, &resources), &joined).await?;
        let notify = additions.notify;
        let surroundings = bundle::Surroundings {
            additions,
            directory: admission.dir.directory(),
            namespaces: admission.namespaces,
        };
        let plan = bundle.plan(self.home.id(), &surroundings, HostSize::measure())?;
        for field in &plan.dropped {
            tracing::warn!(field, "means nothing inside the machine and is left out");
        }
        // On disk before a hook runs: those at the end run even when this fails.
        life.state.poststop = plan.hooks.poststop().clone().unwrap_or_default();
        let host = OnHost { cgroup, score: plan.oom_score_adj };
        let first = admission.pod.is_none();
        let origin = match admission.pod {
            Some(pod) => Origin::Joined(pod),
            // Before the cgroup is entered, in which its caller may have forbidden all but a few devices.
            None => Origin::New(kvm::open().map_err(PodError::from)?),
        };
        let limits = Limits::of(&resources);
        self.claim_cgroup(&mut life.state, &host, first.then_some(&limits))?;
        let attached = async {
            let stand_in = attachments.take("").await.map_err(ContainerError::StandIn)?;
            host.adopt(&stand_in)?;
            if bundle.has_early_hooks() {
                self.run_early_hooks(&plan.hooks, &stand_in, life.state.clone()).await?;
            }
            Ok::<_, ContainerError>(stand_in)
        };
        let up = async { Ok(origin.bring_up(&self.home, &plan, admission.dir).await?) };
        let (stand_in, pod) = tokio::try_join!(attached, up)?;
        if first {
            self.attach_network(&mut life.state, &bundle, &pod, &stand_in).await?;
        }
        let phase = Phase::begin("container create");
        let (init, sockets) = self.create_in_guest(&pod, &stand_in, (&plan, notify)).await?;
        if let Some(held_back) = limits.held_back().filter(|_| first) {
            host.cgroup.limit(&held_back)?;
        }
        stand_in.hand_over(&sockets).await.map_err(ContainerError::StandIn)?;
        phase.end();
        self.sandbox.settle(self.home.id(), init, &pod).await;
        life.state.stand_in = Some(stand_in.process);
        life.state.helpers = pod.processes();
        life.state.rootfs = plan.rootfs;
        life.state.annotations = plan.annotations;
        life.poststart = plan.hooks.poststart().clone().unwrap_or_default();
        life.pod = Some(pod.clone());
        life.host = Some(host);
        self.advance(&mut life, Event::Prepared)?;
        let process = stand_in.process;
        tokio::spawn(self.clone().watch_over(pod, stand_in));
        Ok(process)
    }

    /// Takes everything back of a container whose creator has gone away before it was created.
    pub async fn abandon(&self) {
        // Its creation holds the lock, and lets it go when it ends where it stands.
        let mut life = self.life.lock().await;
        if life.pod.is_some() {
            drop(life);
            // Just so. If it does not end, nothing else will either.
            let _ = self.kill(9, true).await;
            self.hurry.send_replace(true);
            self.is_over().await;
        } else if self.sandbox.depart(self.home.id()).await == Departure::OthersStay {
            self.outlive(&mut life);
        }
    }

    /// Writes down that the pod goes on without this container.
    fn outlive(&self, life: &mut Life) {
        life.state.outlived = true;
        if let Err(error) = self.home.write(&life.state) {
            tracing::error!(error = %error, "end of the container was not written");
        }
    }

    /// Makes the container's cgroup its own. The first one's is the pod's and gets its limits: whatever
    /// this process starts from now on is in it.
    fn claim_cgroup(
        &self,
        state: &mut State,
        host: &OnHost,
        first: Option<&Limits>,
    ) -> Result<(), ContainerError> {
        host.cgroup.check_free()?;
        // On disk before it exists: whoever cleans up removes it.
        state.cgroup = Some(host.cgroup.clone());
        self.home.write(state)?;
        if let Some(limits) = first {
            let phase = Phase::begin("cgroup entered");
            host.take(std::process::id())?;
            host.cgroup.limit(&limits.while_it_boots())?;
            phase.end();
        }
        Ok(())
    }

    /// Runs the hooks that look at the container before it is created.
    async fn run_early_hooks(
        &self,
        hooks: &Hooks,
        stand_in: &StandIn,
        mut state: State,
    ) -> Result<(), ContainerError> {
        state.stand_in = Some(stand_in.process);
        let view = self.home.view(state);
        let kinds = [("prestart", hooks.prestart()), ("createRuntime", hooks.create_runtime())];
        for (kind, list) in kinds {
            let (list, view) = (list.clone().unwrap_or_default(), view.clone());
            let ran = move || hooks::run_or_fail(kind, &list, &view);
            let ran = tokio::task::spawn_blocking(ran).await.map_err(std::io::Error::from);
            ran.flatten().map_err(ContainerError::Hook)?;
        }
        Ok(())
    }

    /// Gives the pod the interfaces that it finds in the container's network: one that was there
    /// before, or the new one that its stand-in is in.
    async fn attach_network(
        &self,
        state: &mut State,
        bundle: &Bundle,
        pod: &Arc<Pod>,
        stand_in: &StandIn,
    ) -> Result<(), ContainerError> {
        let network = match bundle.network() {
            Network::Join(path) => {
                // On disk before anything is done there: whoever cleans up looks there.
                state.network = Some(path.clone());
                self.home.write(state)?;
                path
            }
            // A caller that stands for its container itself is in none of its own, unless hooks look.
            Network::New if stand_in.detached || bundle.has_early_hooks() => {
                format!("/proc/{}/ns/net", stand_in.process.pid).into()
            }
            Network::New => return Ok(()),
        };
        Ok(pod.attach_network(network, bundle.resolv_conf()).await?)
    }

    async fn create_in_guest(
        &self,
        pod: &Pod,
        stand_in: &StandIn,
        (plan, notify): (&Plan, bool),
    ) -> Result<(u32, Vec<UnixStream>), ContainerError> {
        let disks = pod.attach_disks(&plan.disks).await?;
        let notify = if notify { notify::open(pod, &self.home).await? } else { Vec::new() };
        let ends = proxy::open(pod, stand_in).await?;
        let request = CreateRequest {
            container_id: self.home.id().to_string(),
            spec_json: plan.spec_json.clone(),
            streams: Some(ends.streams),
            descriptors: ends.descriptors,
            disks,
            bundle: plan.bundle.display().to_string(),
            notify,
        };
        let hooks = plan.hooks.create_container().iter().flatten();
        tokio::select! {
            created = pod.agent.create(request, hooks.map(bulkhead_hooks::patience).sum()) => {
                Ok((created?, ends.sockets))
            }
            words = pod.broken() => Err(PodError::Machine(MachineError::Ended(words)).into()),
        }
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
        let pod = self.pod().await?;
        let target = Target::init(self.home.id());
        Ok(pod.agent.kill(target, signal, all).await?)
    }

    /// Freezes all processes.
    ///
    /// # Errors
    /// When it does not run, or a process does not come to a stand.
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

    /// Waits for the end, whichever it is, tells everybody, and takes the pod down.
    async fn watch_over(self: Arc<Self>, pod: Arc<Pod>, stand_in: StandIn) {
        let target = Target::init(self.home.id());
        let (exit, reason) = proxy::until_end(&pod, target, &stand_in).await;
        if exit.oom_killed {
            // Before anybody sees the end, so that it is known why.
            let state = self.state().await;
            // The pod's processes are in another container's cgroup, or were.
            let own = state.cgroup.filter(|_| state.joined);
            let report = move || oom::report(own.as_ref());
            let reported = tokio::task::spawn_blocking(report).await;
            if let Err(error) = reported.map_err(std::io::Error::from).flatten() {
                tracing::warn!(error = %error, "host was not told that memory ran out");
            }
        }
        {
            let mut life = self.life.lock().await;
            life.state.exit = Some(exit);
            life.pod = None;
            if let Err(error) = self.advance(&mut life, Event::Exited) {
                tracing::error!(error = %error, "end of the container was not written");
            }
        }
        self.exit.send_replace(Some(exit));
        let phase = Phase::begin("drain");
        self.take_leave(&pod, &stand_in, exit, reason).await;
        phase.end();
        match self.sandbox.depart(self.home.id()).await {
            Departure::Last => self.take_down(pod).await,
            Departure::OthersStay => {
                drop(pod);
                self.outlive(&mut *self.life.lock().await);
            }
        }
        self.over.send_replace(true);
    }

    /// Ends the pod.
    async fn take_down(&self, mut pod: Arc<Pod>) {
        // Verbs hold the pod for the length of a call; each call is bounded.
        let pod = loop {
            match Arc::try_unwrap(pod) {
                Ok(pod) => break pod,
                Err(shared) => pod = shared,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        // The machine takes its time to end, and so does the kernel.
        let id = self.home.id().clone();
        let leave = self.ephemeral.then(|| tokio::task::spawn_blocking(move || cgroup::leave(&id)));
        pod.end().await;
        if let Some(leave) = leave {
            // What fails here is said by whoever removes the cgroup.
            let _ = leave.await;
        }
    }

    /// Tells a stand-in that its process has ended, and waits until it has read the rest of the
    /// streams, nobody waits for that any more, or there is no rest.
    pub(crate) async fn take_leave(
        &self,
        pod: &Pod,
        stand_in: &StandIn,
        exit: Exit,
        reason: Option<String>,
    ) {
        if stand_in.tell_exit(exit.status, reason).await.is_err() {
            return;
        }
        let mut hurry = self.hurry.subscribe();
        tokio::select! {
            // It closes its connection when it has read all; it may still be sent signals.
            () = async { while stand_in.said().await.is_some() {} } => {}
            _ = hurry.wait_for(|hurry| *hurry) => {}
            _ = pod.broken() => {}
        }
    }

    /// Makes the stand-in of a further process one of the pod's processes.
    pub(crate) async fn adopt(&self, stand_in: &StandIn) -> Result<(), ContainerError> {
        self.life.lock().await.host.as_ref().map_or(Ok(()), |host| host.adopt(stand_in))
    }

    /// The pod, while the container has not ended.
    pub(crate) async fn pod(&self) -> Result<Arc<Pod>, ContainerError> {
        Ok(running(&*self.life.lock().await)?.0)
    }

    fn advance(&self, life: &mut MutexGuard<'_, Life>, event: Event) -> Result<(), ContainerError> {
        life.state.status = life.state.status.on(event)?;
        self.status.send_replace(life.state.status);
        Ok(self.home.write(&life.state)?)
    }
}

/// Where a container's pod comes from.
enum Origin {
    /// It is started, with `/dev/kvm`.
    New(File),
    /// It runs.
    Joined(Arc<Pod>),
}

impl Origin {
    /// Has the pod show the files of the container.
    async fn bring_up(self, home: &Home, plan: &Plan, dir: ShareDir) -> Result<Arc<Pod>, PodError> {
        match self {
            Self::New(kvm) => Ok(Arc::new(Pod::start(home, plan, kvm).await?)),
            Self::Joined(pod) => {
                pod.show(&plan.shared, dir)?;
                Ok(pod)
            }
        }
    }
}

/// What the container is to the host's kernel.
#[derive(Debug)]
struct OnHost {
    cgroup: Cgroup,
    score: Option<i32>,
}

impl OnHost {
    /// Puts a process where the container's are.
    fn take(&self, pid: u32) -> Result<(), ContainerError> {
        self.cgroup.add(pid)?;
        let Some(score) = self.score else { return Ok(()) };
        let set = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
        set.map_err(|error| ContainerError::OomScore(score, error))
    }

    /// Makes a stand-in one of the pod's processes, if it is not a caller's own.
    fn adopt(&self, stand_in: &StandIn) -> Result<(), ContainerError> {
        if stand_in.detached { self.take(stand_in.process.pid) } else { Ok(()) }
    }
}

/// The pod and the stand-in of a container that has not ended.
fn running(life: &Life) -> Result<(Arc<Pod>, Process), ContainerError> {
    let pod = life.pod.clone().ok_or(ContainerError::NotRunning)?;
    Ok((pod, life.state.stand_in.ok_or(ContainerError::NotRunning)?))
}
