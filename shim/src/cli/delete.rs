//! `bulkhead delete`: removes a container that does not run; with `--force`, any container, even
//! one that is damaged.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use containerd_shim_protos::api::{ConnectRequest, DeleteRequest};
use tokio::time::{sleep, timeout};

use super::args::{Delete, Global};
use super::client::{self, GOODBYE};
use crate::containerd::task;
use crate::state::process::Process;
use crate::state::{Home, State, StateError};
use crate::supervisor::lifecycle::Status;
use crate::supervisor::neighbours::Neighbours;
use crate::supervisor::remains;

/// How long another process may take that is deleting the same container.
const TURN: Duration = Duration::from_secs(120);
/// How long a supervisor may take to end a container that is deleted by force, if it serves no other; then
/// it is killed with everything else.
const FORCE_PATIENCE: Duration = Duration::from_secs(15);
/// How long a supervisor that serves others too may answer nothing at all; then it is killed with all of
/// them.
const SILENCE: Duration = Duration::from_secs(60);
/// How long such a supervisor may take if it answers.
const LONGEST: Duration = Duration::from_secs(120);
/// How often a supervisor that takes its time is asked whether it lives, and how long it may take to say.
const PING: Duration = Duration::from_secs(5);

pub(super) fn delete(global: &Global, delete: &Delete) -> anyhow::Result<()> {
    let gone =
        |error: &StateError| delete.force && matches!(error, StateError::NoSuchContainer { .. });
    let home = match Home::open(&global.root, &delete.id) {
        Err(error) if gone(&error) => return Ok(()),
        home => home?,
    };
    let lock = match home.lock(TURN) {
        // Another process has just deleted it.
        Err(error) if gone(&error) => return Ok(()),
        lock => lock?,
    };
    let state = match home.read() {
        Err(error) if delete.force => {
            tracing::warn!(error = format!("{:#}", anyhow!(error)), "its state is not known");
            None
        }
        state => Some(state?),
    };
    let status = state.as_ref().map(State::observed);
    if let Some(status) = status
        && !matches!(status, Status::Created | Status::Stopped)
        && !delete.force
    {
        bail!(
            "cannot delete container {} that is not stopped: {status}; kill it first, or use --force",
            delete.id
        );
    }
    let runtime = client::runtime()?;
    let keeper = match &state {
        Some(state) => state.keeper,
        None => runtime.block_on(keeper(&home)),
    };
    let shared = keeper.is_some_and(|keeper| serves_others(&home, keeper));
    let patience = if delete.force { FORCE_PATIENCE } else { GOODBYE };
    let end = runtime.block_on(async {
        match shared {
            true => end_in_shared_pod(&home, delete.force).await,
            false => Ok(timeout(patience, end(&home, delete.force)).await.unwrap_or(End::Silence)),
        }
    })?;
    match end {
        // The pod goes on, or its supervisor ends by itself.
        End::Done if shared => remains::end_without_pod(lock),
        End::Done => {
            if let Some(keeper) = keeper {
                // A supervisor that does not end is killed below.
                let _ = keeper.wait(patience);
            }
            remains::end(lock)
        }
        End::Silence | End::Nobody => remains::end(lock),
    }
}

/// What became of a container whose supervisor was asked to end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It has ended.
    Done,
    /// There is no supervisor any more.
    Nobody,
    /// The supervisor does not answer.
    Silence,
}

/// Asks the supervisor of a container which process it is; `None` if it does not answer.
async fn keeper(home: &Home) -> Option<Process> {
    let client = client::connect(home).ok()?;
    let request = ConnectRequest { id: home.id().to_string(), ..Default::default() };
    let answer = timeout(PING, client.connect(client::unbounded(), &request)).await.ok()?;
    Process::find(answer.ok()?.shim_pid).ok()
}

/// Whether a supervisor has other containers too that have not ended.
fn serves_others(home: &Home, keeper: Process) -> bool {
    let neighbours = Neighbours::of(home.root()).unwrap_or_default();
    neighbours.of_keeper(keeper).any(|id| id != home.id())
}

/// Tells the supervisor to end the container and, if it is the last, its pod.
async fn end(home: &Home, force: bool) -> End {
    let Ok(client) = client::connect(home) else { return End::Nobody };
    let mut context = client::unbounded();
    if force {
        context.add(task::FORCE.to_owned(), "true".to_owned());
    }
    let request = DeleteRequest { id: home.id().to_string(), ..Default::default() };
    match client.delete(context, &request).await {
        Ok(_) => End::Done,
        Err(error) => {
            tracing::debug!(error = %error, "supervisor did not end the container");
            End::Nobody
        }
    }
}

/// The same for a supervisor that serves other containers, which would be killed with it: it gets
/// the time that it needs as long as it answers, up to [`LONGEST`].
async fn end_in_shared_pod(home: &Home, force: bool) -> anyhow::Result<End> {
    let (begun, mut heard) = (Instant::now(), Instant::now());
    let ended = end(home, force);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            end = &mut ended => return Ok(end),
            () = sleep(PING) => {
                if keeper(home).await.is_some() {
                    heard = Instant::now();
                }
            }
        }
        if heard.elapsed() > SILENCE {
            tracing::warn!("the pod's supervisor does not answer: the whole pod is ended");
            return Ok(End::Silence);
        }
        if begun.elapsed() > LONGEST {
            bail!(
                "container {} has not ended after {} s; try again, or delete the other containers \
                 of its pod, which end with their machine",
                home.id(),
                LONGEST.as_secs()
            );
        }
    }
}
