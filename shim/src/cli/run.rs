//! `bulkhead run`: create, start, wait and delete in one. This process itself stands for the
//! container; however it ends, the supervisor notices and takes everything down.

use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, anyhow};

use super::args::{Global, Run};
use super::client::{self, GOODBYE};
use super::creation::Creation;
use super::notify::Listener;
use super::{create, signals};
use crate::network::namespace::Network;
use crate::policy::Policy;
use crate::state::Home;
use crate::state::socket_path::SocketPath;
use crate::streams::preserved::Preserved;
use crate::streams::relay::{Belongings, Ended, Relay, Signals};
use crate::streams::terminal::Terminal;
use crate::trace::Phase;

pub(super) fn run(
    context: (&Global, &Policy),
    run: &Run,
    preserved: Preserved,
) -> anyhow::Result<ExitCode> {
    let whole = Phase::begin("whole run");
    let ephemeral = !run.detach && !run.keep;
    let creation = Creation::begin(context, &run.create, !run.detach, ephemeral)?;
    let ready = Listener::bind(&creation.home)?;
    if run.detach {
        create::detached(&run.create, &creation, &preserved, async |task| {
            client::start(task, &creation.home, "").await
        })?;
        creation.done();
        ready.map_or(Ok(()), Listener::wait_for_stand_in)?;
        return Ok(ExitCode::SUCCESS);
    }
    let code = foreground(run, creation, preserved, ready)?;
    whole.end();
    Ok(code)
}

/// Brings the container up and stands for it until it ends. Callers take the pid of the main thread
/// for the container's, so the main thread gives up access to the host's files; another thread does
/// what needs them.
fn foreground(
    run: &Run,
    creation: Creation,
    preserved: Preserved,
    ready: Option<Listener>,
) -> anyhow::Result<ExitCode> {
    // After the supervisor was started, which would inherit the signal mask.
    let signals = Signals::hold()?;
    let ((attached, is_attached), (over, is_over)) = (mpsc::channel(), mpsc::channel());
    thread::scope(|scope| {
        let signals = &signals;
        let (home, terminal) = (creation.home.clone(), creation.terminal);
        let network = creation.network.clone();
        let (up, is_up) = mpsc::channel();
        let rest = scope.spawn(move || -> anyhow::Result<()> {
            // If attaching has failed, the main thread reports why.
            if is_attached.recv().is_err() {
                return Ok(());
            }
            let brought_up = bring_up(run, &creation, signals);
            let runs = matches!(brought_up, Ok(None));
            if let Some(ready) = ready.filter(|_| runs) {
                // In a thread, so that signals and streams do not wait for it.
                thread::spawn(move || {
                    if let Err(error) = ready.wait(std::process::id()) {
                        tracing::warn!("{error:#}");
                    }
                });
            }
            // The main thread waits for this, and ends after this thread.
            let _ = up.send(brought_up);
            let ended = is_over.recv();
            if runs && ended.is_ok() { take_leave(run, creation) } else { Ok(()) }
        });
        let stood = stand(&home, (terminal, network), preserved).and_then(|relay| {
            attached.send(())?;
            match is_up.recv()?? {
                // Dropping the creation takes everything back.
                Some(signal) => Ok(ExitCode::from(128 + u8::try_from(signal).unwrap_or(0))),
                None => {
                    let phase = Phase::begin("container run");
                    let ended = relay.serve(signals);
                    phase.end();
                    over.send(())?;
                    Ok(status(&ended?))
                }
            }
        });
        drop((attached, over));
        let rest = rest.join().unwrap_or_else(|_| Err(anyhow!("a thread failed")));
        let code = stood?;
        rest?;
        Ok(code)
    })
}

/// Makes this thread stand for the container.
fn stand(
    home: &Home,
    (terminal, network): (bool, Option<Network>),
    preserved: Preserved,
) -> anyhow::Result<Relay> {
    if let Some(network) = network {
        network.enter().context("network namespace")?;
    }
    let terminal = if terminal { Some(Terminal::own()?) } else { None };
    let belongings = Belongings { terminal, preserved, home: None };
    let socket = SocketPath::attach(home)?;
    let relay = Relay::connect(socket.path(), false, belongings).context("attach.sock")?;
    relay.hide().context("empty root")?;
    relay.attach("").context("attach.sock")?;
    Ok(relay)
}

/// The exit status of this process.
fn status(ended: &Ended) -> ExitCode {
    if let Some(reason) = &ended.reason {
        tracing::warn!("the container was killed: {reason}");
    }
    ExitCode::from(ended.status)
}

/// Waits for the supervisor, and removes what it has left.
fn take_leave(run: &Run, mut creation: Creation) -> anyhow::Result<()> {
    let phase = Phase::begin("goodbye");
    let over = creation.wait(GOODBYE);
    if !over {
        tracing::warn!("the supervisor did not end");
    }
    phase.end();
    if !run.keep && (over || !creation.joined()) {
        // There is something left only if the supervisor was killed.
        creation.remove()?;
    }
    creation.done();
    Ok(())
}

/// Creates and starts the container; returns the signal that ended this early, if one did.
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
