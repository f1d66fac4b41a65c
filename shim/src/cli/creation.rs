//! Brings a container up: claims its id and has a supervisor serve it from then on, one of its own
//! or that of the pod that it joins.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use bulkhead_vmm::seqpacket;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::shim_async::TaskClient;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::net::{Shutdown, shutdown};

use super::activation;
use super::args::{Create, Global};
use super::client::{connect, unbounded, words};
use super::obituary;
use crate::bundle::{self, ProcessLimits};
use crate::network::namespace::Network;
use crate::policy::Policy;
use crate::state::id::ContainerId;
use crate::state::process::Process;
use crate::state::socket_path::SocketPath;
use crate::state::{Home, StateError};
use crate::streams::attach;
use crate::supervisor::{self, ServeRequest, remains};
use crate::trace::Phase;

/// How long a process that was killed may take to go.
pub(super) const KILLED: Duration = Duration::from_secs(10);

/// A claimed id and its supervisor. Dropping it before [`Creation::done`] takes everything back.
pub(super) struct Creation {
    pub(super) home: Home,
    /// The arguments of the container's program.
    pub(super) arguments: Vec<String>,
    /// Whether it gets a terminal.
    pub(super) terminal: bool,
    /// The network namespace that its stand-in has to be in.
    pub(super) network: Option<Network>,
    /// The pod's supervisor, unless the container joins one that runs.
    supervisor: Option<Child>,
    /// The link to the supervisor. Each side keeps its end open until it is done with the
    /// container.
    link: Option<OwnedFd>,
}

impl Creation {
    /// Checks what can be checked at once, claims the id and starts the supervisor.
    /// In the foreground this process stands for the container.
    pub(super) fn begin(
        (global, policy): (&Global, &Policy),
        create: &Create,
        foreground: bool,
        ephemeral: bool,
    ) -> anyhow::Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("bulkhead must be run as root");
        }
        let bundle = bundle::read(&create.bundle)?;
        bundle::warn_of_unknown(&bundle.unknown_capabilities);
        let root = std::path::absolute(&global.root)?;
        let joined = bundle.check(&root)?;
        let terminal = bundle.terminal();
        check_console(terminal, foreground, create.console_socket.as_deref())?;
        let home = Home::claim(&root, &create.id, &bundle.dir)?;
        let supervision = Supervision { global, policy, home: &home, ephemeral };
        let ordered = activation::prepare(&home).and_then(|()| match joined.pod() {
            None => supervision.start_supervisor().map(|(child, link)| (Some(child), link)),
            Some(neighbour) => supervision.join(neighbour).map(|link| (None, link)),
        });
        let (supervisor, link) = match ordered {
            Ok(ordered) => ordered,
            Err(error) => {
                home.lock(KILLED)?.remove()?;
                return Err(error);
            }
        };
        // In the foreground only hooks look at the namespace.
        let network = (!foreground || bundle.has_early_hooks()).then(|| bundle.network());
        let arguments = bundle.arguments();
        Ok(Self { home, arguments, terminal, network, supervisor, link: Some(link) })
    }

    /// Has the container created.
    pub(super) async fn create(&self) -> anyhow::Result<TaskClient> {
        let client = connect(&self.home)?;
        let id = self.home.id().to_string();
        let request = CreateTaskRequest { id, ..Default::default() };
        client.create(unbounded(), &request).await.map_err(|error| self.words(error))?;
        Ok(client)
    }

    /// The error message of a failed call. The state may not name the supervisor yet, so its own
    /// child counts first.
    fn words(&self, error: ttrpc::Error) -> anyhow::Error {
        let child = self.supervisor.as_ref().and_then(|child| Process::find(child.id()).ok());
        match child {
            Some(supervisor) => obituary::words(&self.home, Some(supervisor), error),
            None => words(&self.home)(error),
        }
    }

    /// Whether it has joined a pod, whose supervisor serves others too.
    pub(super) fn joined(&self) -> bool {
        self.supervisor.is_none()
    }

    /// Leaves the container to its supervisor.
    pub(super) fn done(mut self) {
        self.link = None;
    }

    /// Removes what a supervisor that is done with the container, or was killed, has left.
    pub(super) fn remove(&self) -> anyhow::Result<()> {
        match self.home.lock(KILLED) {
            Ok(lock) if self.joined() => remains::end_without_pod(lock),
            Ok(lock) => remains::end(lock),
            // The supervisor or another process has removed it, or does so now.
            Err(StateError::NoSuchContainer { .. } | StateError::Locked(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the supervisor is done with the container; returns false if it had to be killed,
    /// or serves others too and is not done in time.
    pub(super) fn wait(&mut self, patience: Duration) -> bool {
        let farewell = self.link.as_ref().map_or(Farewell::Over, |link| hear(link, patience));
        match (farewell, &mut self.supervisor) {
            (Farewell::PodGoesOn, _) | (Farewell::Over, None) => true,
            (Farewell::None, None) => false,
            (farewell, Some(supervisor)) => {
                let left = if farewell == Farewell::Over { patience } else { Duration::ZERO };
                let process = Process::find(supervisor.id());
                let ended = process.is_ok_and(|process| process.wait(left));
                if !ended {
                    let _ = supervisor.kill();
                }
                let _ = supervisor.wait();
                ended
            }
        }
    }
}

/// What a supervisor says at the end of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Farewell {
    /// It has closed the link, and ends if it serves nobody else.
    Over,
    /// It stays for others.
    PodGoesOn,
    /// Nothing in time.
    None,
}

/// Waits for the end of a link: see [`ServeRequest`].
fn hear(link: &OwnedFd, patience: Duration) -> Farewell {
    let timeout = Timespec::try_from(patience).ok();
    match poll(&mut [PollFd::new(link, PollFlags::IN)], timeout.as_ref()) {
        Ok(ready) if ready > 0 => match seqpacket::receive(link) {
            Ok(Some(_)) => Farewell::PodGoesOn,
            Ok(None) | Err(_) => Farewell::Over,
        },
        _ => Farewell::None,
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            // The supervisor takes everything down when it reads the end of the link or, once the
            // container is created, when the container's stand-in is gone.
            let _ = shutdown(link, Shutdown::Write);
            let stand_in = self.home.read().ok().and_then(|state| state.stand_in);
            if let Some(process) = stand_in.filter(|process| process.pid != std::process::id()) {
                let _ = process.kill_and_wait(KILLED);
            }
            if !self.wait(KILLED) && self.supervisor.is_none() {
                tracing::warn!("the pod's supervisor is busy; what is left is removed by it");
            } else if let Err(error) = self.remove() {
                tracing::warn!(error = format!("{error:#}"), "not everything was removed");
            }
        }
    }
}

/// Checks that a terminal has another end: the terminal of this process in the foreground, a
/// console socket otherwise.
pub(super) fn check_console(
    terminal: bool,
    foreground: bool,
    socket: Option<&Path>,
) -> anyhow::Result<()> {
    match (terminal, socket) {
        (true, None) if !foreground => bail!(
            "cannot allocate tty if runc will detach without setting console socket; name one with \
             --console-socket"
        ),
        (_, Some(_)) if foreground || !terminal => {
            bail!("cannot use console socket if runc will not detach or allocate tty; leave it out")
        }
        _ => Ok(()),
    }
}

/// A container that is to be served.
struct Supervision<'a> {
    global: &'a Global,
    policy: &'a Policy,
    home: &'a Home,
    ephemeral: bool,
}

impl Supervision<'_> {
    /// Starts a supervisor for it; returns the supervisor and the link to it.
    fn start_supervisor(&self) -> anyhow::Result<(Child, OwnedFd)> {
        let spawned = Phase::begin("supervisor up");
        let (link, theirs) = seqpacket::pair()?;
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::APPEND;
        let log = self.home.file(supervisor::LOG, flags).context(supervisor::LOG)?;
        let supervisor = Command::new(std::env::current_exe().context("/proc/self/exe")?)
            .arg(remains::SUPERVISE)
            .arg(self.home.dir())
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("supervisor")?;
        self.send(&link, spawned)?;
        Ok((supervisor, link))
    }

    /// Makes the supervisor of another container serve it too; returns the link.
    fn join(&self, neighbour: &ContainerId) -> anyhow::Result<OwnedFd> {
        let spawned = Phase::begin("pod joined");
        let pod = Home::open(self.home.root(), neighbour)?;
        let link = attach::connect_to(SocketPath::join(&pod)?.path())
            .with_context(|| format!("container {neighbour}, which is joined, has ended"))?;
        self.send(&link, spawned)?;
        Ok(link)
    }

    fn send(&self, link: &OwnedFd, spawned: Phase) -> anyhow::Result<()> {
        let home = self.home;
        let task = UnixListener::bind(SocketPath::task(home)?.path()).context("task.sock")?;
        let attach = attach::listen_at(SocketPath::attach(home)?.path()).context("attach.sock")?;
        let join = attach::listen_at(SocketPath::join(home)?.path()).context("join.sock")?;
        let request = ServeRequest {
            root: home.root().to_owned(),
            id: home.id().clone(),
            ephemeral: self.ephemeral,
            systemd_cgroup: self.global.systemd_cgroup,
            limits: ProcessLimits::own(),
            additions: activation::additions(),
            log: self.global.log_target(self.policy.log.level),
            policy: self.policy.clone(),
            spawned,
        };
        let sockets = [task.as_fd(), attach.as_fd(), join.as_fd()];
        Ok(seqpacket::send(link, &serde_json::to_vec(&request)?, &sockets)?)
    }
}
