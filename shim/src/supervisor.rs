//! The supervisor: one process for each pod, started by `create` and `run`.
//!
//! It gets its listening sockets and its orders in one message on standard input, which stays open
//! until its creator is done: a creator that goes away before the container is created takes
//! everything with it. It serves until nothing of the pod runs any more and then ends; what is left
//! is the container's directory with the exit status.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bulkhead_vmm::seqpacket;
use containerd_shim_protos::shim_async::create_task;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::timeout;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::attach::Attachments;
use crate::cgroup;
use crate::channel::Channel;
use crate::container::Container;
use crate::hooks;
use crate::id::ContainerId;
use crate::lifecycle::Status;
use crate::logging::{self, LogTarget};
use crate::state::Home;
use crate::task::Service;
use crate::trace::Phase;

/// How long calls that are being answered may take when everything is over.
const GOODBYE: Duration = Duration::from_millis(500);

/// The first and only message of the creator; the Task socket and the attach socket ride along.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Orders {
    /// The directory of all containers.
    pub root: PathBuf,
    /// The container's name, claimed.
    pub id: ContainerId,
    /// Nobody will delete the container: its directory goes when it ends.
    pub ephemeral: bool,
    /// The pod's cgroup is a unit of systemd.
    pub systemd_cgroup: bool,
    /// Where warnings go.
    pub log: LogTarget,
    /// When the creator began to start this process.
    pub spawned: Phase,
}

/// Runs a supervisor to its end.
///
/// # Errors
/// When it was not started by this program, or its sockets fail.
pub fn run() -> anyhow::Result<()> {
    let creator = io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    let message = seqpacket::receive(&creator)
        .context("standard input is not the creator's socket: only \"bulkhead create\" and \"bulkhead run\" start a supervisor")?
        .context("the creator is gone")?;
    let orders: Orders = serde_json::from_slice(&message.bytes).context("orders")?;
    let Ok([task, attach]) = <[OwnedFd; 2]>::try_from(message.descriptors) else {
        bail!("the sockets did not come with the orders");
    };
    // Already a session leader only when started by hand.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/").context("/")?;
    logging::start(&orders.log)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(&orders, creator, task, attach))
}

async fn serve(
    orders: &Orders,
    creator: OwnedFd,
    task: OwnedFd,
    attach: OwnedFd,
) -> anyhow::Result<()> {
    let home = Home::open(&orders.root, &orders.id)?;
    let container = Container::take_over(home, orders.systemd_cgroup, orders.ephemeral)?;
    let leave = Arc::new(Notify::new());
    let service =
        Service::new(container.clone(), Attachments::new(Channel::new(attach)?), leave.clone());
    let mut server = Server::new()
        .add_listener(Listener::try_from(UnixListener::from(task))?)
        .register_service(create_task(Arc::new(service)));
    server.start().await.context("Task service")?;
    orders.spawned.end();
    let created = tokio::select! {
        () = container.is_over() => true,
        created = is_left(&container, Channel::new(creator)?, &leave) => created,
    };
    if created {
        container.is_over().await;
    }
    // Callers that wait are being answered.
    let _ = timeout(GOODBYE, server.shutdown()).await;
    let home = container.home();
    if !created || orders.ephemeral {
        let state = home.read()?;
        if let Some(cgroup) = &state.cgroup {
            let phase = Phase::begin("cgroup removed");
            // Unless the container has ended by itself, this process is still in it.
            cgroup::leave(home.id())?;
            cgroup.remove()?;
            phase.end();
        }
        hooks::poststop(home, state);
        home.remove()?;
    }
    Ok(())
}

/// Waits until the creator is gone, or says that it is done; whether there is a container then.
async fn is_left(container: &Container, creator: Channel, leave: &Notify) -> bool {
    tokio::select! {
        _ = creator.receive() => {}
        () = leave.notified() => {}
    }
    // The state on disk is asked: the container itself is locked while it is being created.
    container.home().read().is_ok_and(|state| state.status != Status::Creating)
}
