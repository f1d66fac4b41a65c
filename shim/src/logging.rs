//! Log lines in the forms that callers of runc read: its text, or its JSON
//! (`{"level":"error","msg":"…","time":"…"}`), one line for each event.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

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

use crate::state::timestamp;

/// Where log lines go and what they look like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogTarget {
    /// A file; standard error without one.
    pub path: Option<PathBuf>,
    /// JSON, not text.
    pub json: bool,
    /// Everything, not only warnings and errors.
    pub debug: bool,
}

/// Writes this process's events to the target from now on.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(target: &LogTarget) -> anyhow::Result<()> {
    let writer = match &target.path {
        None => BoxMakeWriter::new(io::stderr),
        Some(path) => {
            let file = File::options().append(true).create(true).open(path);
            let file = file.with_context(|| format!("log file {}", path.display()))?;
            BoxMakeWriter::new(Mutex::new(file))
        }
    };
    let level = if target.debug { Level::DEBUG } else { Level::WARN };
    // It warns of each controller that it does not know, at each cgroup.
    let cgroups = if target.debug { Level::DEBUG } else { Level::ERROR };
    let levels = Targets::new().with_default(level).with_target("libcgroups", cgroups);
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(writer)
        .event_format(Lines { json: target.json })
        .finish()
        .with(levels);
    tracing::subscriber::set_global_default(subscriber).context("log is set already")
}

struct Lines {
    json: bool,
}

/// The words of one event, its fields behind them.
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
        let line = line(self.json, *event.metadata().level(), words.0.trim(), &timestamp::now());
        writeln!(writer, "{line}")
    }
}

fn line(json: bool, level: Level, words: &str, time: &str) -> String {
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        _ => "debug",
    };
    if json {
        serde_json::json!({"level": level, "msg": words, "time": time}).to_string()
    } else {
        format!("time={time:?} level={level} msg={words:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_that_callers_of_runc_read() {
        let words = "container \"a\" does not exist";
        assert_eq!(
            line(true, Level::ERROR, words, "T"),
            r#"{"level":"error","msg":"container \"a\" does not exist","time":"T"}"#
        );
        assert_eq!(
            line(false, Level::WARN, words, "T"),
            r#"time="T" level=warning msg="container \"a\" does not exist""#
        );
    }
}
