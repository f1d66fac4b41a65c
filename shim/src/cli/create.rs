//! `bulkhead create`: creates a container, which waits for `start`, and leaves its stand-in behind.

use std::path::Path;

use anyhow::Context;

use super::args::{Create, Global};
use super::client;
use super::creation::Creation;
use crate::machine::{assets, spawn};
use crate::network::namespace::Network;
use crate::policy::Policy;
use crate::state::Home;
use crate::streams::preserved::Preserved;
use crate::streams::stand_in::Options;
use crate::streams::terminal;

pub(super) fn create(
    context: (&Global, &Policy),
    create: &Create,
    preserved: &Preserved,
) -> anyhow::Result<()> {
    let creation = Creation::begin(context, create, false, false)?;
    detached(create, &creation, preserved, async |_| Ok(()))?;
    creation.done();
    Ok(())
}

/// Creates the container with a stand-in that outlives this process, then does `more`.
pub(super) fn detached(
    create: &Create,
    creation: &Creation,
    preserved: &Preserved,
    more: impl AsyncFnOnce(&containerd_shim_protos::shim_async::TaskClient) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (network, console_socket) = (creation.network.clone(), create.console_socket.as_deref());
    let pid = spawn_stand_in(&creation.home, "", network, (console_socket, preserved))?;
    client::runtime()?.block_on(async {
        let task = creation.create().await?;
        if let Some(path) = &create.pid_file {
            client::write_pid_file(path, pid)?;
        }
        more(&task).await
    })
}

/// Starts a stand-in, which outlives this process, and returns its pid. It gets this process's
/// standard streams, or a new terminal whose master is sent to the console socket, and what was
/// passed beside them. When this process ends, the stand-in becomes a child of the process that
/// adopts orphans here.
///
/// `exec` and `network` are as in [`Options`].
pub(super) fn spawn_stand_in(
    home: &Home,
    exec: &str,
    network: Option<Network>,
    (console_socket, preserved): (Option<&Path>, &Preserved),
) -> anyhow::Result<u32> {
    let options = Options {
        root: home.root().to_owned(),
        id: home.id().clone(),
        exec: exec.to_owned(),
        terminal: console_socket.is_some(),
        network,
        preserved: u32::try_from(preserved.count())?,
    };
    let mut command = options.command(&assets::stand_in()?);
    spawn::hand_down(&mut command, preserved.descriptors());
    if let Some(socket) = console_socket {
        let slave = terminal::send_master(socket)
            .with_context(|| format!("console socket {}", socket.display()))?;
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    }
    let child =
        command.spawn().context("cannot start the process that stands for the container")?;
    Ok(child.id())
}
