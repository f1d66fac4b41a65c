//! `bulkhead create`: the container waits for `start`; a process stays behind that stands for it.

use std::path::Path;
use std::process::Command;

use anyhow::Context;

use super::args::{Create, Global};
use super::client::{self, Creation};
use crate::network::Network;
use crate::state::Home;
use crate::terminal;

pub(super) fn create(global: &Global, create: &Create) -> anyhow::Result<()> {
    let creation = Creation::begin(global, create, false, false)?;
    detached(global, create, &creation, async |_| Ok(()))?;
    creation.done();
    Ok(())
}

/// Creates the container with a stand-in that outlives this process, then does `more`.
pub(super) fn detached(
    global: &Global,
    create: &Create,
    creation: &Creation,
    more: impl AsyncFnOnce(&containerd_shim_protos::shim_async::TaskClient) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let place = StandInPlace {
        exec: "",
        console_socket: create.console_socket.as_deref(),
        network: creation.network.as_ref(),
    };
    let pid = spawn_stand_in(global, &creation.home, place)?;
    client::runtime()?.block_on(async {
        let task = creation.create().await?;
        if let Some(path) = &create.pid_file {
            client::write_pid_file(path, pid)?;
        }
        more(&task).await
    })
}

/// What a stand-in is started for.
pub(super) struct StandInPlace<'a> {
    /// The name of a process that is executed in the container; empty for its init process.
    pub(super) exec: &'a str,
    /// Its streams are a new terminal, whose master goes there.
    pub(super) console_socket: Option<&'a Path>,
    /// The network namespace that it moves to.
    pub(super) network: Option<&'a Network>,
}

/// It has this process's standard streams, and becomes a child of whoever adopts orphans here.
pub(super) fn spawn_stand_in(
    global: &Global,
    home: &Home,
    place: StandInPlace<'_>,
) -> anyhow::Result<u32> {
    let mut command = Command::new(std::env::current_exe().context("/proc/self/exe")?);
    command.arg("--root").arg(&global.root).arg("stand-in").args(["--exec", place.exec]);
    if let Some(socket) = place.console_socket {
        let slave = terminal::send_master(socket)
            .with_context(|| format!("console socket {}", socket.display()))?;
        command.arg("--terminal").stdin(slave.try_clone()?).stdout(slave.try_clone()?);
        command.stderr(slave);
    }
    match place.network {
        Some(Network::New) => {
            command.arg("--new-network");
        }
        Some(Network::Join(path)) => {
            command.arg("--join-network").arg(path);
        }
        None => {}
    }
    let child = command
        .arg(home.id().as_str())
        .spawn()
        .context("process that stands for the container's")?;
    Ok(child.id())
}
