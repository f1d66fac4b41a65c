//! Creates a container: reads its bundle, starts or joins a pod, runs its hooks, and lets the agent
//! create it.
//!
//! Work that may block in the host's file systems runs in separate threads: the supervisor serves
//! all its containers in one thread, and a network file system that hangs must not block it.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bulkhead_protocol::agent::CreateRequest;
use oci_spec::runtime::Hooks;
use tokio::task::spawn_blocking;

use super::{Container, ContainerError, Life, OnHost};
use crate::bundle::{self, Bundle, ContainerPlan, HostSize, PodPlan, Surroundings};
use crate::cgroup::{Cgroup, Limits};
use crate::machine::assets::Assets;
use crate::machine::kvm;
use crate::machine::monitor::MachineError;
use crate::machine::share::{Files, ShareDir};
use crate::network::namespace::Network;
use crate::policy::GuestPolicy;
use crate::sockets::{HostSockets, Node};
use crate::state::State;
use crate::state::process::Process;
use crate::streams::attach::{Attachments, StandIn};
use crate::supervisor::lifecycle::Event;
use crate::supervisor::neighbours::Joined;
use crate::supervisor::pod::{Pod, PodError};
use crate::supervisor::sandbox::Admission;
use crate::supervisor::{hooks, notify, proxy};
use crate::trace::Phase;

impl Container {
    /// Reads the bundle, starts the pod or joins one, creates the container and hands its streams
    /// to its stand-in.
    ///
    /// # Errors
    /// When any of it fails, or the creation was cancelled. [`Container::abandon`] then removes
    /// what is left.
    pub async fn create(
        self: &Arc<Self>,
        attachments: &Attachments,
    ) -> Result<Process, ContainerError> {
        let mut cancelled = self.cancelled.subscribe();
        tokio::select! {
            created = self.come_into_being(attachments) => created,
            // The container owns the sender, so waiting does not fail.
            _ = cancelled.wait_for(|cancelled| *cancelled) => Err(ContainerError::Cancelled),
        }
    }

    async fn come_into_being(
        self: &Arc<Self>,
        attachments: &Attachments,
    ) -> Result<Process, ContainerError> {
        let mut life = self.life.lock().await;
        life.state.status.on(Event::Prepared)?;
        let (bundle, joined) = self.read_bundle(&life.state).await?;
        let cgroup = Cgroup::of(self.home.id(), bundle.cgroups_path(), self.systemd_cgroup)?;
        let resources = bundle.resources();
        let admission = self.sandbox.enter(self.home.id(), (&cgroup, &resources), &joined).await?;
        let plan = self.plan(&bundle, &admission).await?;
        // Recorded before a hook runs: the poststop hooks run even if the creation fails.
        life.state.poststop = plan.hooks.poststop().clone().unwrap_or_default();
        let host = OnHost { cgroup, score: plan.oom_score_adj };
        let limits = Limits::of(&resources);
        let first = admission.pod.is_none();
        let dir = admission.dir;
        let source = match admission.pod {
            Some(pod) => Source::Running(pod),
            // Opens `/dev/kvm` before entering the cgroup, where the caller may have forbidden most
            // devices.
            None => Source::new(&self.sandbox.policy().guest)?,
        };
        self.claim_cgroup(&mut life.state, &host, first.then_some(&limits)).await?;
        let pod_plan = PodPlan::of(&bundle, HostSize::measure(), self.sandbox.policy());
        let attached = self.attach(attachments, &host, (&bundle, &plan.hooks), &life.state);
        let up = self.bring_up(source, &pod_plan, (&plan, dir));
        let (stand_in, pod) = tokio::try_join!(attached, up)?;
        if first {
            self.attach_network(&mut life.state, (&bundle, &pod_plan), &pod, &stand_in).await?;
        }
        let phase = Phase::begin("container create");
        let (init, sockets) = self.create_in_guest(&mut life, &pod, &stand_in, &plan).await?;
        if let Some(held_back) = limits.held_back().filter(|_| first) {
            host.cgroup.limit_async(held_back).await?;
        }
        stand_in.hand_over(&sockets).await.map_err(ContainerError::StandIn)?;
        phase.end();
        self.sandbox.settle(self.home.id(), init);
        self.has_begun(&mut life, (pod, stand_in, host), plan)
    }

    /// Starts the pod if there is none, and shares the container's files.
    async fn bring_up(
        &self,
        source: Source,
        pod_plan: &PodPlan,
        (plan, dir): (&ContainerPlan, ShareDir),
    ) -> Result<Arc<Pod>, ContainerError> {
        let shared = plan.shared.clone();
        let files = in_a_thread(move || Ok(Files::prepare(&shared).map_err(PodError::from)?));
        let pod = async {
            match source {
                Source::Running(pod) => Ok(pod),
                Source::New(origin) => {
                    let pod = Arc::new(Pod::start(&self.home, pod_plan, origin).await?);
                    self.sandbox.is_up(&pod)?;
                    self.sandbox.complete(&pod).await?;
                    pod.serve_sockets();
                    pod.provide_memory().await?;
                    Ok(pod)
                }
            }
        };
        let (pod, files) = tokio::try_join!(pod, files)?;
        pod.show(files, dir).await?;
        Ok(pod)
    }

    /// Records that the container is created, and watches it from now on.
    fn has_begun(
        self: &Arc<Self>,
        life: &mut Life,
        (pod, stand_in, host): (Arc<Pod>, StandIn, OnHost),
        plan: ContainerPlan,
    ) -> Result<Process, ContainerError> {
        let process = stand_in.process;
        life.state.stand_in = Some(process);
        life.state.helpers = pod.processes();
        life.state.rootfs = plan.rootfs;
        life.state.annotations = plan.annotations;
        life.poststart = plan.hooks.poststart().clone().unwrap_or_default();
        life.pod = Some(pod.clone());
        life.host = Some(host);
        self.advance(life, Event::Prepared)?;
        tokio::spawn(self.clone().watch_over(pod, stand_in));
        Ok(process)
    }

    async fn read_bundle(&self, state: &State) -> Result<(Bundle, Joined), ContainerError> {
        let (dir, root) = (state.bundle.clone(), self.home.root().to_owned());
        let sockets = self.sandbox.policy().sockets;
        in_a_thread(move || {
            let bundle = bundle::read(&dir)?;
            let joined = bundle.check(&root)?;
            bundle.check_sockets(sockets)?;
            Ok((bundle, joined))
        })
        .await
    }

    async fn plan(
        &self,
        bundle: &Bundle,
        admission: &Admission,
    ) -> Result<ContainerPlan, ContainerError> {
        let surroundings = Surroundings {
            directory: admission.dir.directory(),
            namespaces: admission.namespaces.clone(),
            brings_up_the_pod: admission.pod.is_none(),
            limits: self.limits.clone(),
            additions: self.additions.clone(),
        };
        let (bundle, id) = (bundle.clone(), self.home.id().clone());
        let plan = in_a_thread(move || Ok(bundle.plan(&id, &surroundings)?)).await?;
        for field in &plan.dropped {
            tracing::warn!(field, "means nothing inside the machine and is left out");
        }
        Ok(plan)
    }

    /// Claims the container's cgroup. The cgroup of the first container is the pod's: the
    /// supervisor enters it and sets its limits, and all processes that it starts from now on are
    /// in it.
    async fn claim_cgroup(
        &self,
        state: &mut State,
        host: &OnHost,
        first: Option<&Limits>,
    ) -> Result<(), ContainerError> {
        let cgroup = host.cgroup.clone();
        in_a_thread(move || Ok(cgroup.check_free()?)).await?;
        // Recorded before it exists, so that a later cleanup removes it.
        state.cgroup = Some(host.cgroup.clone());
        self.home.write(state)?;
        if let Some(limits) = first {
            let phase = Phase::begin("cgroup entered");
            host.take(std::process::id()).await?;
            host.cgroup.limit_async(limits.while_it_boots()).await?;
            phase.end();
        }
        Ok(())
    }

    /// Waits for the stand-in, and runs the hooks that get its pid.
    async fn attach(
        &self,
        attachments: &Attachments,
        host: &OnHost,
        (bundle, hooks): (&Bundle, &Hooks),
        state: &State,
    ) -> Result<StandIn, ContainerError> {
        let stand_in = attachments.take("").await.map_err(ContainerError::StandIn)?;
        host.adopt(&stand_in).await?;
        if bundle.has_early_hooks() {
            self.run_early_hooks(hooks, &stand_in, state.clone()).await?;
        }
        Ok(stand_in)
    }

    /// Runs the prestart and createRuntime hooks.
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
            let ran = move || hooks::run_or_fail(kind, &list, &view).map_err(ContainerError::Hook);
            in_a_thread(ran).await?;
        }
        Ok(())
    }

    /// Mirrors the interfaces of the container's network namespace in the pod: an existing
    /// namespace, or the new one that its stand-in is in.
    async fn attach_network(
        &self,
        state: &mut State,
        (bundle, plan): (&Bundle, &PodPlan),
        pod: &Arc<Pod>,
        stand_in: &StandIn,
    ) -> Result<(), ContainerError> {
        let network = match &plan.network {
            Network::Join(path) => {
                // Recorded before anything changes there, so that a later cleanup restores it.
                state.network = Some(path.clone());
                self.home.write(state)?;
                path.clone()
            }
            // A caller that is its container's stand-in has a network namespace of its own only if
            // hooks look at it.
            Network::New if stand_in.detached || bundle.has_early_hooks() => {
                format!("/proc/{}/ns/net", stand_in.process.pid).into()
            }
            Network::New => return Ok(()),
        };
        Ok(pod.attach_network(network, plan.resolv_conf.clone()).await?)
    }

    async fn create_in_guest(
        &self,
        life: &mut Life,
        pod: &Arc<Pod>,
        stand_in: &StandIn,
        plan: &ContainerPlan,
    ) -> Result<(u32, Vec<UnixStream>), ContainerError> {
        let disks = pod.attach_disks(&plan.disks).await?;
        let notify = match self.additions.notify {
            true => notify::open(pod, &self.home).await?,
            false => Vec::new(),
        };
        pod.population.admit(self.home.id(), plan.users.clone());
        let host_sockets = find_host_sockets(plan).await?;
        let sockets = host_sockets.describe();
        let (connections, served) = host_sockets.serve(pod).await?;
        life.connections = served;
        let ends = proxy::open(pod, stand_in).await?;
        let request = CreateRequest {
            container_id: self.home.id().to_string(),
            spec_json: plan.spec_json.clone(),
            streams: Some(ends.streams),
            descriptors: ends.descriptors,
            disks,
            bundle: plan.bundle.display().to_string(),
            notify,
            sockets,
            connections,
        };
        let hooks = plan.hooks.create_container().iter().flatten();
        tokio::select! {
            created = pod.agent.create(request, hooks.map(bulkhead_hooks::patience).sum()) => {
                Ok((created?, ends.sockets))
            }
            words = pod.broken() => Err(PodError::Machine(MachineError::Ended(words)).into()),
        }
    }
}

impl OnHost {
    /// Moves a process to the container's cgroup and sets its OOM score.
    async fn take(&self, pid: u32) -> Result<(), ContainerError> {
        self.cgroup.add_async(vec![pid]).await?;
        let Some(score) = self.score else { return Ok(()) };
        let set = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
        set.map_err(|error| ContainerError::OomScore(score, error))
    }

    /// Moves a stand-in to the container's cgroup, unless it is the caller itself.
    pub(super) async fn adopt(&self, stand_in: &StandIn) -> Result<(), ContainerError> {
        if stand_in.detached { self.take(stand_in.process.pid).await } else { Ok(()) }
    }
}

/// Opens the sockets and FIFOs of the host that a container mounts.
async fn find_host_sockets(plan: &ContainerPlan) -> Result<HostSockets, ContainerError> {
    let (entries, users) = (plan.host_sockets.clone(), plan.users.clone());
    let find = move || entries.iter().map(Node::find).collect::<Result<_, _>>();
    let nodes = in_a_thread(move || Ok(find()?)).await?;
    Ok(HostSockets { nodes, users })
}

/// Where a container's pod comes from.
enum Source {
    /// A pod that runs.
    Running(Arc<Pod>),
    /// A new pod, which is started from these files.
    New((Assets, File)),
}

impl Source {
    /// Opens the files of the installation and `/dev/kvm`.
    fn new(guest: &GuestPolicy) -> Result<Self, PodError> {
        Ok(Self::New((Assets::find(guest)?, kvm::open()?)))
    }
}

/// Runs blocking work in a separate thread.
async fn in_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ContainerError> + Send + 'static,
) -> Result<T, ContainerError> {
    spawn_blocking(work).await.unwrap_or_else(|error| Err(ContainerError::Thread(error.into())))
}
