//! Log lines in the forms that callers of runc read: its text, its JSON
//! (`{"level":"error","msg":"…","time":"…"}`), or its short text on a terminal (`ERRO[0000] …`); one
//! line for each event.

mod bounded;
mod level;

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

use self::bounded::Bounded;
pub use self::level::LogLevel;
use crate::state::timestamp;

/// Where log lines go and what they look like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogTarget {
    /// A file; standard error without one.
    pub path: Option<PathBuf>,
    /// JSON, not text.
    pub json: bool,
    /// From which level on.
    pub level: LogLevel,
}

/// Writes this process's events to the target from now on.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(target: &LogTarget) -> anyhow::Result<()> {
    write_to(open(target)?, target)
}

/// The same for a process that serves a guest. The log has at most so many bytes, because a guest
/// can cause lines for as long as it runs.
///
/// # Errors
/// As [`start`].
pub fn start_bounded(target: &LogTarget, bytes_max: u64) -> anyhow::Result<()> {
    let bounded = Bounded::new(open(target)?, Form::of(target), bytes_max);
    write_to(BoxMakeWriter::new(bounded), target)
}

fn open(target: &LogTarget) -> anyhow::Result<BoxMakeWriter> {
    let Some(path) = &target.path else { return Ok(BoxMakeWriter::new(io::stderr)) };
    let file = File::options().append(true).create(true).open(path);
    let file = file.with_context(|| format!("log file {}", path.display()))?;
    Ok(BoxMakeWriter::new(Mutex::new(file)))
}

fn write_to(writer: BoxMakeWriter, target: &LogTarget) -> anyhow::Result<()> {
    let level = target.level.level();
    // libcgroups warns of each controller that it does not know, for each cgroup.
    let cgroups = if target.level == LogLevel::Debug { Level::DEBUG } else { Level::ERROR };
    let levels = Targets::new().with_default(level).with_target("libcgroups", cgroups);
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(writer)
        // The subscriber would panic if standard error cannot be written either.
        .log_internal_errors(false)
        .event_format(Lines { form: Form::of(target), since: Instant::now() })
        .finish()
        .with(levels);
    tracing::subscriber::set_global_default(subscriber).context("log is set already")
}

/// Whether there is a log.
#[must_use]
pub fn has_started() -> bool {
    tracing::dispatcher::has_been_set()
}

/// Makes a panic one line on standard error, and one in the log.
pub fn note_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(String::new, |place| format!(" at {place}"));
        let reason = panic.payload_as_str().unwrap_or("it does not say why");
        let words = format!("panicked{place}: {reason}");
        tracing::error!("{words}");
        // Last, because a caller that waits is shown the last line. If this fails, nothing is left
        // to do.
        let _ = writeln!(io::stderr(), "{words}");
    }));
}

/// Prints an error on standard error, for a command line from which no target can be read.
pub fn print_error(words: &str) {
    let form = Form::of(&LogTarget::default());
    let line = line(form, Level::ERROR, words, Duration::ZERO);
    // Nothing is left to do if that fails.
    let _ = writeln!(io::stderr(), "{line}");
}

/// What a line looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Json,
    Text,
    /// For a person at a terminal.
    Short,
}

impl Form {
    fn of(target: &LogTarget) -> Self {
        match &target.path {
            _ if target.json => Self::Json,
            None if io::stderr().is_terminal() => Self::Short,
            _ => Self::Text,
        }
    }
}

struct Lines {
    form: Form,
    since: Instant,
}

/// The message of one event, followed by its fields.
#[derive(Default)]
struct Words(String);

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut words = Words::default();
        event.record(&mut words);
        let level = *event.metadata().level();
        let line = line(self.form, level, words.0.trim(), self.since.elapsed());
        writeln!(writer, "{line}")
    }
}

/// Formats a line; `after` is the time since the process started.
fn line(form: Form, level: Level, words: &str, after: Duration) -> String {
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        _ => "debug",
    };
    match form {
        Form::Json => {
            let time = timestamp::now();
            serde_json::json!({"level": level, "msg": words, "time": time}).to_string()
        }
        Form::Text => format!("time={:?} level={level} msg={words:?}", timestamp::now()),
        Form::Short => {
            format!("{:.4}[{:04}] {words}", level.to_ascii_uppercase(), after.as_secs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_that_callers_of_runc_read() {
        let words = "container \"a\" does not exist";
        let json = line(Form::Json, Level::ERROR, words, Duration::ZERO);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&json["level"], &json["msg"]), (&"error".into(), &words.into()));
        assert!(json["time"].as_str().unwrap().ends_with('Z'), "{json}");
        let text = line(Form::Text, Level::WARN, words, Duration::ZERO);
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.starts_with("time=\"2"), "{time}");
        assert_eq!(rest, r#"level=warning msg="container \"a\" does not exist""#);
        let short = line(Form::Short, Level::ERROR, words, Duration::from_secs(7));
        assert_eq!(short, "ERRO[0007] container \"a\" does not exist");
    }
}
