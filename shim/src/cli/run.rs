//! `bulkhead run`: create, start, wait and delete in one. This process itself stands for the
//! container; however it ends, the supervisor notices and takes everything down.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;

use super::args::{Global, Run};
use super::client::{self, GOODBYE};
use super::creation::Creation;
use super::{create, signals};
use crate::state::socket_path::SocketPath;
use crate::streams::preserved::Preserved;
use crate::streams::relay::{Belongings, Relay, Signals};
use crate::streams::terminal::Terminal;
use crate::trace::Phase;

pub(super) fn run(global: &Global, run: &Run, preserved: Preserved) -> anyhow::Result<ExitCode> {
    let whole = Phase::begin("whole run");
    let ephemeral = !run.detach && !run.keep;
    let creation = Creation::begin(global, &run.create, !run.detach, ephemeral)?;
    if run.detach {
        create::detached(&run.create, &creation, &preserved, async |task| {
            client::start(task, &creation.home, "").await
        })?;
        creation.done();
        return Ok(ExitCode::SUCCESS);
    }
    let code = foreground(run, creation, preserved)?;
    whole.end();
    Ok(code)
}

fn foreground(run: &Run, mut creation: Creation, preserved: Preserved) -> anyhow::Result<ExitCode> {
    // After the supervisor was started, which would inherit it.
    let signals = Signals::hold()?;
    if let Some(network) = &creation.network {
        network.enter().context("network namespace")?;
    }
    let terminal = if creation.terminal { Some(Terminal::own()?) } else { None };
    let socket = SocketPath::attach(&creation.home)?;
    let belongings = Belongings { terminal, preserved };
    let relay = Relay::attach(socket.path(), "", false, belongings).context("attach.sock")?;
    if let Some(signal) = bring_up(run, &creation, &signals)? {
        // Dropping the creation takes everything back.
        drop(relay);
        return Ok(ExitCode::from(128 + u8::try_from(signal).unwrap_or(0)));
    }
    let phase = Phase::begin("container run");
    let ended = relay.serve(&signals);
    phase.end();
    let phase = Phase::begin("goodbye");
    let over = creation.wait(GOODBYE);
    if !over {
        tracing::warn!("the supervisor did not end");
    }
    phase.end();
    if !run.keep && (over || !creation.joined()) {
        // Only what a supervisor that was killed has left.
        creation.remove()?;
    }
    creation.done();
    let ended = ended?;
    if let Some(reason) = ended.reason {
        let _ = writeln!(std::io::stderr(), "bulkhead: the container was killed: {reason}");
    }
    Ok(ExitCode::from(ended.status))
}

/// Creates and starts the container; gives the signal that ended this early, if one did.
fn bring_up(run: &Run, creation: &Creation, signals: &Signals) -> anyhow::Result<Option<u32>> {
    let up = async {
        let task = creation.create().await?;
        if let Some(path) = &run.create.pid_file {
            client::write_pid_file(path, std::process::id())?;
        }
        client::start(&task, &creation.home, "").await
    };
    client::runtime()?.block_on(async {
        tokio::select! {
            result = up => result.map(|()| None),
            signal = signals::fatal(signals) => signal.map(Some),
        }
    })
}
