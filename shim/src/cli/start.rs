//! `bulkhead start`: lets the program of a created container run.

use anyhow::bail;

use super::args::Global;
use super::client;
use crate::state::Home;
use crate::state::id::ContainerId;
use crate::supervisor::lifecycle::Status;

pub(super) fn start(global: &Global, id: &ContainerId) -> anyhow::Result<()> {
    let home = Home::open(&global.root, id)?;
    if home.read()?.observed() == Status::Stopped {
        bail!("cannot start a container that has stopped");
    }
    client::runtime()?.block_on(async { client::start(&client::connect(&home)?, &home, "").await })
}
