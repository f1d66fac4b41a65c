//! `bulkhead delete`: removes a container that does not run; with `--force`, any, in any state of
//! disrepair.

use std::time::{Duration, Instant};

use anyhow::bail;
use containerd_shim_protos::api::DeleteRequest;

use super::args::{Delete, Global};
use super::client::{self, GOODBYE};
use crate::hooks;
use crate::lifecycle::Status;
use crate::state::{Home, StateError};

/// How long a supervisor may take to end a container that is deleted by force; then it is killed
/// with everything else.
const FORCE_PATIENCE: Duration = Duration::from_secs(15);

pub(super) fn delete(global: &Global, delete: &Delete) -> anyhow::Result<()> {
    let home = match Home::open(&global.root, &delete.id) {
        Err(StateError::NoSuchContainer { .. }) if delete.force => return Ok(()),
        home => home?,
    };
    let state = match home.read() {
        // Whatever is written there, nothing of it can be used.
        Err(_) if delete.force => return Ok(home.remove()?),
        state => state?,
    };
    let status = state.observed();
    if matches!(status, Status::Creating | Status::Running | Status::Paused) && !delete.force {
        bail!(
            "cannot delete container {} that is not stopped: {status}; kill it first, or use --force",
            delete.id
        );
    }
    let deadline = Instant::now() + if delete.force { FORCE_PATIENCE } else { GOODBYE };
    if status != Status::Creating && end(&home, status, deadline)? {
        let _ = state.keeper.wait(deadline.saturating_duration_since(Instant::now()));
    }
    client::clean_up(&home)?;
    hooks::poststop(&home, state);
    Ok(())
}

/// Has the supervisor end the container and its pod; false if it hangs. One that hangs or is dead is
/// no error: what it leaves is cleaned up without it.
fn end(home: &Home, status: Status, deadline: Instant) -> anyhow::Result<bool> {
    client::runtime()?.block_on(async {
        let Ok(client) = client::connect(home) else { return Ok(true) };
        let ended = async {
            if matches!(status, Status::Running | Status::Paused) {
                client::kill(&client, home, 9, true).await?;
                let request = containerd_shim_protos::api::WaitRequest {
                    id: home.id().to_string(),
                    ..Default::default()
                };
                client.wait(client::unbounded(), &request).await.map_err(client::words)?;
            }
            let request = DeleteRequest { id: home.id().to_string(), ..Default::default() };
            client.delete(client::unbounded(), &request).await.map_err(client::words)
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
