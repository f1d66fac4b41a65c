//! `bulkhead delete`: removes a container that does not run; with `--force`, any, in any state of
//! disrepair.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use containerd_shim_protos::api::DeleteRequest;

use super::args::{Delete, Global};
use super::client::{self, GOODBYE};
use crate::state::{Home, StateError};
use crate::supervisor::hooks;
use crate::supervisor::lifecycle::Status;

/// How long a supervisor may take to end a container that is deleted by force; then it is killed
/// with everything else.
const FORCE_PATIENCE: Duration = Duration::from_secs(15);
/// How long to wait before the state is read again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

pub(super) fn delete(global: &Global, delete: &Delete) -> anyhow::Result<()> {
    let home = match Home::open(&global.root, &delete.id) {
        Err(StateError::NoSuchContainer { .. }) if delete.force => return Ok(()),
        home => home?,
    };
    let mut state = match home.read() {
        // Whatever is written there, nothing of it can be used.
        Err(_) if delete.force => return Ok(home.remove()?),
        state => state?,
    };
    let mut status = state.observed();
    if !matches!(status, Status::Created | Status::Stopped) && !delete.force {
        bail!(
            "cannot delete container {} that is not stopped: {status}; kill it first, or use --force",
            delete.id
        );
    }
    let deadline = Instant::now() + if delete.force { FORCE_PATIENCE } else { GOODBYE };
    if status == Status::Creating && state.joined {
        if is_taken_back(&home, deadline) {
            return Ok(());
        }
        state = home.read()?;
        status = state.observed();
    }
    if status != Status::Creating
        && end(&home, status, deadline)?
        && !home.read().is_ok_and(|state| state.outlived)
    {
        let _ = state.keeper.wait(deadline.saturating_duration_since(Instant::now()));
    }
    client::clean_up(&home)?;
    hooks::poststop(&home, state);
    Ok(())
}

/// Whether the supervisor of a pod takes back a container that joins it and whose creator is gone. It
/// is not killed for that: it is others' too.
fn is_taken_back(home: &Home, deadline: Instant) -> bool {
    loop {
        match home.read() {
            Ok(state) if state.observed() != Status::Creating => return false,
            Err(StateError::NoSuchContainer { .. }) => return true,
            _ if Instant::now() > deadline => return false,
            _ => thread::sleep(LOOK_AGAIN),
        }
    }
}

/// Has the supervisor end the container and its pod; false if it hangs. One that hangs or is dead is
/// no error: what it leaves is cleaned up without it.
fn end(home: &Home, status: Status, deadline: Instant) -> anyhow::Result<bool> {
    client::runtime()?.block_on(async {
        let Ok(client) = client::connect(home) else { return Ok(true) };
        let ended = async {
            if status == Status::Running || status.is_paused() {
                client::kill(&client, home, 9, true).await?;
                let request = containerd_shim_protos::api::WaitRequest {
                    id: home.id().to_string(),
                    ..Default::default()
                };
                client.wait(client::unbounded(), &request).await.map_err(client::words(home))?;
            }
            let request = DeleteRequest { id: home.id().to_string(), ..Default::default() };
            client.delete(client::unbounded(), &request).await.map_err(client::words(home))
        };
        match tokio::time::timeout_at(deadline.into(), ended).await {
            Ok(Err(error)) => {
                tracing::debug!(error = %error, "supervisor did not end the container");
                Ok(true)
            }
            Ok(Ok(_)) => Ok(true),
            Err(_) => Ok(false),
        }
    })
}
