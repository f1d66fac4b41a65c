//! Log lines of the jailed processes: JSON on standard error, which the supervisor gave them.

use std::error::Error;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{LevelFilter, Log, Metadata, Record};

struct Lines;

static LINES: Lines = Lines;

/// Writes everything from `info` up to standard error from now on.
pub(crate) fn start() {
    // A second call in one process changes nothing.
    if log::set_logger(&LINES).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Logs an error with its causes, and returns the line.
pub(crate) fn report(error: &dyn Error) -> String {
    let line = chain(error);
    log::error!("{line}");
    line
}

/// An error with its causes, for somebody who cannot see this process.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // virtio-queue logs what a driver does wrong, as often as the driver does it; the device
        // that sees the same error logs it under its own limit.
        metadata.level() <= log::max_level() && !metadata.target().starts_with("virtio_queue")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = serde_json::json!({
            "ts": now.as_secs_f64(),
            "level": record.level().as_str().to_ascii_lowercase(),
            "target": record.target(),
            "msg": record.args().to_string(),
        });
        // A full disk must not stop the machine.
        let _ = writeln!(std::io::stderr(), "{line}");
    }

    fn flush(&self) {}
}
