//! `bulkhead pause` and `bulkhead resume`: freeze and thaw all processes of a container.

use containerd_shim_protos::api::{PauseRequest, ResumeRequest};

use super::args::Global;
use super::client;
use crate::state::Home;
use crate::state::id::ContainerId;
use crate::supervisor::lifecycle::{Event, Status};

pub(super) fn pause(global: &Global, id: &ContainerId) -> anyhow::Result<()> {
    let home = may(global, id, Event::Frozen)?;
    client::runtime()?.block_on(async {
        let request = PauseRequest { id: id.to_string(), ..Default::default() };
        let client = client::connect(&home)?;
        client.pause(client::unbounded(), &request).await.map_err(client::words(&home))?;
        Ok(())
    })
}

pub(super) fn resume(global: &Global, id: &ContainerId) -> anyhow::Result<()> {
    let home = may(global, id, Event::Thawed)?;
    client::runtime()?.block_on(async {
        let request = ResumeRequest { id: id.to_string(), ..Default::default() };
        let client = client::connect(&home)?;
        client.resume(client::unbounded(), &request).await.map_err(client::words(&home))?;
        Ok(())
    })
}

/// Opens the container if `event` can happen to it. A container that has ended has no supervisor
/// left to refuse it.
fn may(global: &Global, id: &ContainerId, event: Event) -> anyhow::Result<Home> {
    let home = Home::open(&global.root, id)?;
    let status: Status = home.read()?.observed();
    status.on(event)?;
    Ok(home)
}
