//! The hidden verb behind `create`, `run --detach` and `exec --detach`: the process that stands for
//! one of the container.

use std::process::ExitCode;

use anyhow::Context;

use super::args::{Global, StandIn};
use super::client::SocketPath;
use crate::network::Network;
use crate::relay::{Relay, Signals};
use crate::state::Home;
use crate::terminal::Terminal;

pub(super) fn stand_in(global: &Global, stand_in: &StandIn) -> anyhow::Result<ExitCode> {
    let signals = Signals::hold()?;
    let home = Home::open(&global.root, &stand_in.id)?;
    let network = stand_in.join_network.clone().map(Network::Join);
    if let Some(network) = network.or(stand_in.new_network.then_some(Network::New)) {
        network.enter().context("network namespace")?;
    }
    let terminal = if stand_in.terminal { Some(Terminal::own()?) } else { None };
    if let Some(terminal) = &terminal {
        terminal.control()?;
    }
    let relay = Relay::attach(SocketPath::attach(&home)?.path(), &stand_in.exec, true, terminal)?;
    // Nobody reads what it could say: a supervisor that is gone is a container that was killed.
    Ok(relay.serve(&signals).map_or(ExitCode::from(137), |ended| ExitCode::from(ended.status)))
}
