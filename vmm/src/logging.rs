//! Log lines of the jailed processes: JSON on standard error, a file that the supervisor gave them.
//!
//! The file is bounded ([`log_allowance`](crate::log_allowance)), and what a guest can cause is
//! rate-limited where it is logged (`devices::rate_limit`).

use std::error::Error;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::log_allowance::{Allowance, BYTES_MAX};

/// Where a message is cut, in characters.
const MESSAGE_MAX: usize = 1000;

struct Lines {
    allowance: Allowance,
}

static LINES: Lines = Lines { allowance: Allowance::new(BYTES_MAX) };

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

/// An error with its causes, in one line, for another process.
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
        if self.enabled(record.metadata()) {
            self.write(&mut std::io::stderr(), record);
        }
    }

    fn flush(&self) {}
}

impl Lines {
    /// Writes a line if there is room for its kind, and a notice when that room is used up. A full
    /// disk does not stop the machine.
    fn write(&self, file: &mut impl Write, record: &Record<'_>) {
        let level = record.level();
        let error = level == Level::Error;
        if !self.allowance.has_room(error) {
            return;
        }
        let line = line(level, record.target(), &record.args().to_string());
        let Some(notices) = self.allowance.take(error, line.len() as u64) else { return };
        let _ = file.write_all(line.as_bytes());
        for words in notices {
            let _ = file.write_all(self::line(Level::Warn, module_path!(), words).as_bytes());
        }
    }
}

fn line(level: Level, target: &str, message: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let cut = message.char_indices().nth(MESSAGE_MAX).map_or(message.len(), |(at, _)| at);
    let line = serde_json::json!({
        "ts": now.as_secs_f64(),
        "level": level.as_str().to_ascii_lowercase(),
        "target": target,
        "msg": message.get(..cut),
    });
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(lines: &Lines, file: &mut Vec<u8>, level: Level, message: &str) {
        let mut builder = Record::builder();
        let record = builder.level(level).target("test");
        lines.write(file, &record.args(format_args!("{message}")).build());
    }

    #[test]
    fn a_guest_that_tries_for_a_year_does_not_fill_the_disk() {
        let lines = Lines { allowance: Allowance::new(BYTES_MAX) };
        let mut file = Vec::new();
        // Eight lines in ten seconds, from one place.
        for _ in 0..365 * 24 * 360 {
            write(&lines, &mut file, Level::Warn, "net: a frame of 70000 bytes was dropped");
            if file.len() as u64 > 2 * BYTES_MAX {
                break;
            }
        }
        let by_the_guest = file.len() as u64;
        assert!((BYTES_MAX / 2..BYTES_MAX / 2 + 1000).contains(&by_the_guest), "{by_the_guest}");
        let text = String::from_utf8(file.clone()).unwrap();
        assert_eq!(text.matches("half full").count(), 1);
        // The reason of the end is still logged.
        write(&lines, &mut file, Level::Error, "the reason");
        assert!(String::from_utf8_lossy(&file).contains("the reason"));
        for _ in 0..100_000 {
            write(&lines, &mut file, Level::Error, "an error");
        }
        assert!(file.len() as u64 <= BYTES_MAX + 1000, "{}", file.len());
        let text = String::from_utf8(file).unwrap();
        assert!(text.trim_end().lines().last().unwrap().contains("nothing more is logged"));
    }

    #[test]
    fn a_line_is_json_and_has_an_end() {
        let lines = Lines { allowance: Allowance::new(BYTES_MAX) };
        let mut file = Vec::new();
        write(&lines, &mut file, Level::Info, &"\u{1b}é\n".repeat(5000));
        assert_eq!(file.iter().filter(|byte| **byte == b'\n').count(), 1);
        let read: serde_json::Value = serde_json::from_slice(&file).unwrap();
        assert_eq!(read["msg"].as_str().unwrap().chars().count(), MESSAGE_MAX);
        assert_eq!(read["level"], "info");
    }
}
