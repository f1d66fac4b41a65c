//! What the verbs share as clients of a container's supervisor.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use containerd_shim_protos::api::{KillRequest, StartRequest};
use containerd_shim_protos::shim_async::TaskClient;
use tokio::runtime::{Builder, Runtime};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context as CallContext};

use super::obituary;
use crate::state::Home;
use crate::state::socket_path::SocketPath;

/// How long a supervisor may take to end once everything is over.
pub(super) const GOODBYE: Duration = Duration::from_secs(60);

/// A runtime for a few calls.
pub(super) fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// Connects to a container's supervisor. To be called inside a runtime.
pub(super) fn connect(home: &Home) -> anyhow::Result<TaskClient> {
    let path = SocketPath::task(home)?;
    let stream = UnixStream::connect(path.path()).map_err(|_| anyhow!("container not running"))?;
    Ok(TaskClient::new(Client::new(Socket::try_from(stream)?)))
}

/// The context of calls whose time the supervisor limits.
pub(super) fn unbounded() -> CallContext {
    // With zero the crate sets no time limit.
    context::with_duration(Duration::ZERO)
}

/// The error message of a failed call: that of the container's supervisor, or how it ended.
pub(super) fn words(home: &Home) -> impl FnOnce(ttrpc::Error) -> anyhow::Error {
    |error| match home.read() {
        Ok(state) => obituary::words(home, state.keeper, error),
        // The container was deleted meanwhile.
        Err(gone) => anyhow!(gone),
    }
}

/// Starts the program of a created container, or the further process that was prepared under the
/// name `exec`, which is empty for the first.
pub(super) async fn start(client: &TaskClient, home: &Home, exec: &str) -> anyhow::Result<()> {
    let (id, exec_id) = (home.id().to_string(), exec.to_owned());
    let request = StartRequest { id, exec_id, ..Default::default() };
    client.start(unbounded(), &request).await.map_err(words(home))?;
    Ok(())
}

/// Signals a container.
pub(super) async fn kill(
    client: &TaskClient,
    home: &Home,
    signal: u32,
    all: bool,
) -> anyhow::Result<()> {
    let request = KillRequest { id: home.id().to_string(), signal, all, ..Default::default() };
    client.kill(unbounded(), &request).await.map_err(words(home))?;
    Ok(())
}

/// Writes a pid file for the caller, atomically, as runc does.
pub(super) fn write_pid_file(path: &Path, pid: u32) -> anyhow::Result<()> {
    let name = path.file_name().context("--pid-file names no file")?;
    let new = path.with_file_name(format!(".{}", name.to_string_lossy()));
    let context = || format!("pid file {}", path.display());
    let mut file = File::create(&new).with_context(context)?;
    file.write_all(pid.to_string().as_bytes()).with_context(context)?;
    std::fs::rename(&new, path).with_context(context)
}
