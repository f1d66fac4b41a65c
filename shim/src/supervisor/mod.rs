//! The supervisor: one process for each pod, started by the `create` or `run` of its first
//! container.
//!
//! A container's creator sends the request and the container's listening sockets in one message, on
//! a socket that stays open until the creator is done. If the creator exits before the container is
//! created, the supervisor removes everything of that container. The socket of the first creator is
//! standard input; creators of containers that join connect to
//! [`SocketPath::join`](crate::state::socket_path::SocketPath::join). The supervisor serves each
//! container until nothing of it runs any more, and exits with the last one. What remains of a
//! container is its directory with the exit status.

pub mod container;
pub mod exec;
pub mod hooks;
pub mod lifecycle;
pub mod neighbours;
mod notify;
pub mod oom;
pub mod pod;
mod proxy;
pub mod remains;
pub mod sandbox;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use containerd_shim_protos::shim_async::create_task;
use rustix::net::SocketType;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::bundle::{Additions, ProcessLimits};
use crate::cgroup;
use crate::containerd::task::Service;
use crate::logging::{self, LogTarget};
use crate::machine::channel::Channel;
use crate::policy::Policy;
use crate::state::id::ContainerId;
use crate::state::{Home, StateError};
use crate::streams::attach::Attachments;
use crate::supervisor::container::Container;
use crate::supervisor::lifecycle::Status;
use crate::supervisor::sandbox::Sandbox;
use crate::trace::Phase;

/// The file in a container's directory with the standard error of its pod's supervisor.
pub const LOG: &str = "supervisor.log";
/// How long calls in progress may take after the container is over.
const GOODBYE: Duration = Duration::from_millis(500);
/// The message to a creator that is still connected when its container has left a pod that
/// continues.
pub const GOES_ON: &str = "the pod goes on";
/// How long a connected creator may take to send its request.
const GREETING: Duration = Duration::from_secs(2);

/// The first and only message of a creator. Three listening sockets come with it: for the Task
/// service, for stand-ins, and for containers that join. The supervisor closes its end of the
/// connection when it is done with the container; if the pod continues for other containers, it
/// first sends [`GOES_ON`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServeRequest {
    /// The directory of all containers.
    pub root: PathBuf,
    /// The container's id, which the creator has claimed.
    pub id: ContainerId,
    /// Nobody will delete the container: the supervisor removes its directory when it ends.
    pub ephemeral: bool,
    /// The pod's cgroup is a unit of systemd.
    pub systemd_cgroup: bool,
    /// The limits of the creator, which the container's process inherits.
    pub limits: ProcessLimits,
    /// What the creator adds to the bundle.
    pub additions: Additions,
    /// Where warnings go.
    pub log: LogTarget,
    /// The policy of the creator. A pod follows that of its first.
    pub policy: Policy,
    /// When the creator began to start this process.
    pub spawned: Phase,
}

/// The listening sockets in a container's directory.
#[derive(Debug)]
struct Sockets {
    /// The Task service.
    task: OwnedFd,
    /// The socket to which stand-ins connect.
    attach: OwnedFd,
    /// The socket to which the creators of further containers connect.
    join: OwnedFd,
}

/// A container that is to be served.
#[derive(Debug)]
struct Newcomer {
    request: ServeRequest,
    sockets: Sockets,
    creator: Channel,
}

impl Newcomer {
    /// Receives a creator's request.
    async fn greet(creator: OwnedFd) -> anyhow::Result<Self> {
        let creator = Channel::new(creator)?;
        let message = creator.receive().await?.context("the creator is gone")?;
        let request = serde_json::from_slice(&message.bytes).context("request")?;
        let Ok([task, attach, join]) = <[OwnedFd; 3]>::try_from(message.descriptors) else {
            bail!("the sockets did not come with the request");
        };
        Ok(Self { request, sockets: Sockets { task, attach, join }, creator })
    }
}

/// Runs a supervisor to its end.
///
/// # Errors
/// When standard input is not a creator's socket, or the supervisor's sockets fail.
pub fn run() -> anyhow::Result<()> {
    let creator = io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    if !rustix::net::sockopt::socket_type(&creator).is_ok_and(|it| it == SocketType::SEQPACKET) {
        bail!(
            "standard input is not the creator's socket: only \"bulkhead create\" and \"bulkhead \
             run\" start a supervisor"
        );
    }
    logging::note_panics();
    // Fails if this process leads its process group: only when started by hand.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/").context("/")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let served = runtime.block_on(async {
        let first = Newcomer::greet(creator).await?;
        let bytes_max = u64::from(first.request.policy.log.supervisor_max_mib) << 20;
        logging::start_bounded(&first.request.log, bytes_max)?;
        serve(first).await
    });
    // Does not wait for threads that are still blocked in a file system of the host.
    runtime.shutdown_background();
    served
}

/// Serves the containers of one pod until there are none.
async fn serve(first: Newcomer) -> anyhow::Result<()> {
    let sandbox = Arc::new(Sandbox::new(first.request.policy.clone()));
    let (door, mut newcomers) = mpsc::unbounded_channel();
    let mut members = JoinSet::new();
    members.spawn(serve_one(first, sandbox.clone(), door.clone()));
    let mut failed = Ok(());
    loop {
        tokio::select! {
            // A container that has arrived is served, even if all others have ended.
            biased;
            Some(newcomer) = newcomers.recv() => {
                members.spawn(serve_one(newcomer, sandbox.clone(), door.clone()));
            }
            ended = members.join_next() => match ended {
                Some(ended) => {
                    if let Err(error) = ended.map_err(anyhow::Error::from).flatten() {
                        tracing::error!(error = format!("{error:#}"), "a container is not served");
                        failed = Err(error);
                    }
                }
                None => return failed,
            },
        }
    }
}

/// Serves one container until nothing of it runs any more.
async fn serve_one(
    newcomer: Newcomer,
    sandbox: Arc<Sandbox>,
    door: UnboundedSender<Newcomer>,
) -> anyhow::Result<()> {
    let Newcomer { request, sockets, creator } = newcomer;
    let home = Home::open(&request.root, &request.id)?;
    let container = Container::take_over(home, &request, sandbox)?;
    let leave = Arc::new(Notify::new());
    let attachments = Attachments::new(Channel::new(sockets.attach)?);
    let service = Service::new(container.clone(), attachments, leave.clone());
    let mut server = Server::new()
        .add_listener(Listener::try_from(UnixListener::from(sockets.task))?)
        .register_service(create_task(Arc::new(service)));
    server.start().await.context("Task service")?;
    request.spawned.end();
    let life = async {
        let created = tokio::select! {
            () = container.is_over() => true,
            created = is_left(&container, &creator, &leave) => created,
        };
        if created {
            container.is_over().await;
        } else {
            container.abandon().await;
        }
        created
    };
    tokio::pin!(life);
    let created = tokio::select! {
        created = &mut life => created,
        error = let_in(Channel::new(sockets.join)?, door) => {
            tracing::error!(error = %error, "cannot accept further containers into the pod");
            life.await
        }
    };
    // Lets calls in progress get their answers.
    let _ = timeout(GOODBYE, server.shutdown()).await;
    let outlived = container.state().await.outlived;
    if !created || request.ephemeral {
        let phase = Phase::begin("container removed");
        remove(container.home(), outlived).await;
        phase.end();
    }
    if outlived {
        // Most creators have disconnected long ago.
        let _ = creator.send(&GOES_ON, &[]).await;
    }
    Ok(())
}

/// Removes a container that nobody will delete, unless another process is already removing it.
async fn remove(home: &Home, outlived: bool) {
    let home = home.clone();
    let removed = spawn_blocking(move || {
        let lock = home.lock(Duration::ZERO)?;
        if !outlived {
            // Unless the container has ended by itself, this process is still in its cgroup.
            cgroup::leave(home.id())?;
        }
        remains::remove(lock)
    });
    match removed.await.map_err(anyhow::Error::from).flatten() {
        Err(error) if !is_anothers(&error) => {
            tracing::error!(error = format!("{error:#}"), "not everything was removed");
        }
        _ => {}
    }
}

/// Whether another process removes the container, or has removed it.
fn is_anothers(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<StateError>();
    matches!(error, Some(StateError::Locked(_) | StateError::NoSuchContainer { .. }))
}

/// Passes containers that join to [`serve`]; returns only when the socket fails.
async fn let_in(join: Channel, door: UnboundedSender<Newcomer>) -> io::Error {
    loop {
        let creator = match join.accept().await {
            Ok(creator) => creator,
            Err(error) => return error,
        };
        match timeout(GREETING, Newcomer::greet(creator)).await {
            // The channel is open for as long as this container is served.
            Ok(Ok(newcomer)) => drop(door.send(newcomer)),
            Ok(Err(error)) => tracing::debug!(error = %error, "nobody came in"),
            Err(_) => tracing::debug!("a connection that says nothing was closed"),
        }
    }
}

/// Waits until the creator disconnects or says that it is done, or the creation is cancelled.
/// Returns whether the container has been created.
async fn is_left(container: &Container, creator: &Channel, leave: &Notify) -> bool {
    tokio::select! {
        _ = creator.receive() => {}
        () = leave.notified() => {}
        () = container.is_cancelled() => {}
    }
    // Reads the state from disk, because the container is locked while it is being created.
    container.home().read().is_ok_and(|state| state.status != Status::Creating)
}
