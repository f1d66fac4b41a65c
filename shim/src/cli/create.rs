//! `bulkhead create`: the container waits for `start`; a process stays behind that stands for it.

use std::path::Path;

use anyhow::Context;

use super::args::{Create, Global};
use super::client::{self, Creation};
use crate::stand_in::Orders;
use crate::{assets, terminal};

pub(super) fn create(global: &Global, create: &Create) -> anyhow::Result<()> {
    let creation = Creation::begin(global, create, false, false)?;
    detached(create, &creation, async |_| Ok(()))?;
    creation.done();
    Ok(())
}

/// Creates the container with a stand-in that outlives this process, then does `more`.
pub(super) fn detached(
    create: &Create,
    creation: &Creation,
    more: impl AsyncFnOnce(&containerd_shim_protos::shim_async::TaskClient) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let orders = Orders {
        root: creation.home.root().to_owned(),
        id: creation.home.id().clone(),
        exec: String::new(),
        terminal: create.console_socket.is_some(),
        network: creation.network.clone(),
    };
    let pid = spawn_stand_in(&orders, create.console_socket.as_deref())?;
    client::runtime()?.block_on(async {
        let task = creation.create().await?;
        if let Some(path) = &create.pid_file {
            client::write_pid_file(path, pid)?;
        }
        more(&task).await
    })
}

/// It has this process's standard streams, or a new terminal whose master goes to the console socket,
/// and becomes a child of whoever adopts orphans here.
pub(super) fn spawn_stand_in(
    orders: &Orders,
    console_socket: Option<&Path>,
) -> anyhow::Result<u32> {
    let mut command = orders.command(&assets::stand_in()?);
    if let Some(socket) = console_socket {
        let slave = terminal::send_master(socket)
            .with_context(|| format!("console socket {}", socket.display()))?;
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    }
    let child = command.spawn().context("process that stands for the container's")?;
    Ok(child.id())
}
