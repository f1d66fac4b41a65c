//! The hidden verb behind `create` and `run --detach`: the process that stands for the container.

use std::process::ExitCode;

use super::args::Global;
use super::client::SocketPath;
use crate::id::ContainerId;
use crate::relay::{Relay, Signals};
use crate::state::Home;

pub(super) fn stand_in(global: &Global, id: &ContainerId) -> anyhow::Result<ExitCode> {
    let signals = Signals::hold()?;
    let home = Home::open(&global.root, id)?;
    let relay = Relay::attach(SocketPath::attach(&home)?.path())?;
    // Nobody reads what it could say: a supervisor that is gone is a container that was killed.
    Ok(relay.serve(&signals).map_or(ExitCode::from(137), |ended| ExitCode::from(ended.status)))
}
