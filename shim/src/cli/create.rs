//! `bulkhead create`: the container waits for `start`; a process stays behind that stands for it.

use std::path::Path;
use std::process::Command;

use anyhow::Context;

use super::args::{Create, Global};
use super::client::{self, Creation};
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
    let pid = spawn_stand_in(global, &creation.home, "", create.console_socket.as_deref())?;
    client::runtime()?.block_on(async {
        let task = creation.create().await?;
        if let Some(path) = &create.pid_file {
            client::write_pid_file(path, pid)?;
        }
        more(&task).await
    })
}

/// It has this process's standard streams, and becomes a child of whoever adopts orphans here.
/// `exec` names the process that it stands for; empty for the init process. With a console socket its
/// streams are a new terminal, whose master goes there.
pub(super) fn spawn_stand_in(
    global: &Global,
    home: &Home,
    exec: &str,
    console_socket: Option<&Path>,
) -> anyhow::Result<u32> {
    let mut command = Command::new(std::env::current_exe().context("/proc/self/exe")?);
    command.arg("--root").arg(&global.root).arg("stand-in").args(["--exec", exec]);
    if let Some(socket) = console_socket {
        let slave = terminal::send_master(socket)
            .with_context(|| format!("console socket {}", socket.display()))?;
        command.arg("--terminal").stdin(slave.try_clone()?).stdout(slave.try_clone()?);
        command.stderr(slave);
    }
    let child = command
        .arg(home.id().as_str())
        .spawn()
        .context("process that stands for the container's")?;
    Ok(child.id())
}
