//! `bulkhead create`: creates a container, which waits for `start`, and leaves its stand-in behind.

use std::io::ErrorKind;
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
    let console_socket = create.console_socket.as_deref();
    let looks = Looks { arguments: &creation.arguments, console_socket, preserved };
    let pid = spawn_stand_in(&creation.home, "", creation.network.clone(), &looks)?;
    client::runtime()?.block_on(async {
        let task = creation.create().await?;
        if let Some(path) = &create.pid_file {
            client::write_pid_file(path, pid)?;
        }
        more(&task).await
    })
}

/// What a stand-in has of the process that it stands for.
pub(super) struct Looks<'a> {
    /// The arguments, the program first.
    pub(super) arguments: &'a [String],
    /// Where the master of its terminal goes, if it has one.
    pub(super) console_socket: Option<&'a Path>,
    /// Its descriptors beside the standard streams.
    pub(super) preserved: &'a Preserved,
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
    looks: &Looks<'_>,
) -> anyhow::Result<u32> {
    let options = Options {
        root: home.root().to_owned(),
        id: home.id().clone(),
        exec: exec.to_owned(),
        terminal: looks.console_socket.is_some(),
        network,
        preserved: u32::try_from(looks.preserved.count())?,
    };
    let program = assets::stand_in()?;
    let send = |socket: &Path| {
        terminal::send_master(socket)
            .with_context(|| format!("console socket {}", socket.display()))
    };
    let slave = looks.console_socket.map(send).transpose()?;
    let spawn = |arguments: &[String]| {
        let mut command = options.command(&program, arguments)?;
        spawn::hand_down(&mut command, looks.preserved.descriptors());
        if let Some(slave) = &slave {
            command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave.try_clone()?);
        }
        command.spawn()
    };
    let spawned = match spawn(looks.arguments) {
        // The caller's stack may be too small for arguments that the guest has room for.
        Err(error) if error.kind() == ErrorKind::ArgumentListTooLong => {
            spawn(looks.arguments.get(..1).unwrap_or_default())
        }
        spawned => spawned,
    };
    Ok(spawned.context("cannot start the process that stands for the container")?.id())
}
