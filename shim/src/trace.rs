//! Where the time goes: one JSON line for each phase, appended to the file that `BULKHEAD_TRACE`
//! names. Without it nothing is measured or written.
//!
//! `{"phase":"guest boot","us":81234,"from_us":5120934}`: how long it took and when it began, by the
//! monotonic clock that all processes of the host share. Phases overlap.

use std::borrow::Cow;
use std::fs::OpenOptions;
use std::io::Write;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The environment variable that names the file.
pub const VARIABLE: &str = "BULKHEAD_TRACE";

/// A phase that is going on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    name: Cow<'static, str>,
    from_us: i64,
}

impl Phase {
    /// Begins now.
    #[must_use]
    pub fn begin(name: &'static str) -> Self {
        Self { name: Cow::Borrowed(name), from_us: now_us() }
    }

    /// Ends now. A file that cannot be written must not stop a container.
    pub fn end(&self) {
        let Some(path) = std::env::var_os(VARIABLE) else { return };
        let us = now_us() - self.from_us;
        let line = format!(
            "{}\n",
            serde_json::json!({"phase": self.name, "us": us, "from_us": self.from_us})
        );
        if let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path) {
            // One write: lines of several processes do not mix.
            let _ = file.write_all(line.as_bytes());
        }
    }
}

fn now_us() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}
