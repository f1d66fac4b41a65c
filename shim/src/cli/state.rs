//! `bulkhead state`: what is known of a container, as the JSON that runc prints.

use std::io::Write;

use super::args::Global;
use crate::state::Home;
use crate::state::id::ContainerId;

pub(super) fn state(global: &Global, id: &ContainerId) -> anyhow::Result<()> {
    let home = Home::open(&global.root, id)?;
    let view = home.view(home.read()?);
    let json = serde_json::to_string_pretty(&view)?;
    // runc ends without a line feed.
    Ok(std::io::stdout().write_all(json.as_bytes())?)
}
