//! What systemd asks of a program that it starts, in the program's environment: to take over
//! descriptors (sd_listen_fds(3)), and to report that it is ready (sd_notify(3)). Both reach a
//! container as under runc.

use std::env;

use anyhow::Context;
use rustix::fs::{Mode, mkdirat};

use super::notify;
use crate::bundle::Additions;
use crate::state::Home;
use crate::state::socket_path::NOTIFY_DIR;

/// How many descriptors systemd passes to this process, from number 3 on.
pub(super) fn descriptors() -> u32 {
    let number = |name| env::var(name).ok()?.parse().ok();
    let own = number("LISTEN_PID") == Some(std::process::id());
    number("LISTEN_FDS").filter(|_| own).unwrap_or(0)
}

/// What the container gets for that: variables, and the socket for sd_notify(3).
pub(super) fn additions() -> Additions {
    let environment = match descriptors() {
        0 => Vec::new(),
        count => vec![format!("LISTEN_FDS={count}"), "LISTEN_PID=1".to_owned()],
    };
    Additions { environment, notify: notify::is_wanted() }
}

/// Makes the directory for sd_notify(3) in a new container's, if it is wanted.
pub(super) fn prepare(home: &Home) -> anyhow::Result<()> {
    if notify::is_wanted() {
        mkdirat(home, NOTIFY_DIR, Mode::RWXU).context(NOTIFY_DIR)?;
    }
    Ok(())
}
