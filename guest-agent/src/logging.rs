//! Log lines: one JSON object each, at most [`LINE_BYTES`] long, to standard error.
//!
//! The kernel gives PID 1 its console as standard error, and the console is slow, so only warnings,
//! errors and the few facts of a start are written. Containers can cause lines, so their rate is
//! limited ([`Rate`]); the line after a gap says how many were left out. There are deliberately no
//! spans, filters or formats: they would be a tenth of the binary.

use std::fmt;
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The longest line, its line feed included.
pub(crate) const LINE_BYTES: usize = 2048;
/// The longest value of one field; what is longer is cut.
const VALUE_BYTES: usize = 512;
/// The longest message of a line that has nothing else: each byte can become six when it is escaped.
const LONE_MESSAGE_BYTES: usize = 300;

/// The most lines that may come at once; one more may come after each [`INTERVAL`].
const BURST: u32 = 100;
const INTERVAL: Duration = Duration::from_millis(200);

/// Writes events up to a level through `sink`.
pub(crate) struct Lines<S> {
    level: Level,
    sink: S,
}

/// Installs the log of PID 1: events up to `INFO`, on the console.
pub(crate) fn install() {
    let (begun, rate) = (Instant::now(), Mutex::new(Rate::default()));
    install_with(Level::INFO, move |mut fields| {
        let admitted = rate.lock().unwrap_or_else(PoisonError::into_inner).admit(begun.elapsed());
        let Some(left_out) = admitted else { return };
        if left_out > 0 {
            fields.insert("lines_left_out".to_owned(), left_out.into());
        }
        write(fields);
    });
}

/// Writes a last line, regardless of the rate.
pub(crate) fn last(message: &str) {
    let mut fields = Map::new();
    fields.insert("level".to_owned(), "error".into());
    let end = message.floor_char_boundary(VALUE_BYTES);
    fields.insert("message".to_owned(), message.get(..end).unwrap_or_default().into());
    write(fields);
}

fn write(fields: Map<String, Value>) {
    // If the console cannot be written to, there is nowhere to report that.
    let _ = std::io::stderr().write_all(&line(fields));
}

/// Limits the rate of lines.
#[derive(Debug, Default)]
struct Rate {
    /// How many lines were written recently.
    recent: u32,
    /// The time up to which lines that are no longer recent were subtracted.
    until: Duration,
    left_out: u64,
}

impl Rate {
    /// Returns how many lines were left out before this one if it may be written at the time `now`,
    /// which counts from the start of the log; otherwise `None`.
    fn admit(&mut self, now: Duration) -> Option<u64> {
        let intervals = now.saturating_sub(self.until).as_millis() / INTERVAL.as_millis();
        let intervals = u32::try_from(intervals).unwrap_or(u32::MAX);
        self.until += INTERVAL.saturating_mul(intervals);
        self.recent = self.recent.saturating_sub(intervals);
        if self.recent >= BURST {
            self.left_out += 1;
            return None;
        }
        self.recent += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Installs a log that hands each event's fields, up to `level`, to `sink`.
pub(crate) fn install_with<S>(level: Level, sink: S)
where
    S: Fn(Map<String, Value>) + Send + Sync + 'static,
{
    // Fails only if a log is installed already, and then that one is right.
    let _ = tracing::subscriber::set_global_default(Lines { level, sink });
}

/// One event's fields as a line that is not longer than [`LINE_BYTES`].
fn line(mut fields: Map<String, Value>) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut ordered = Map::new();
    let seconds = format!("{}.{:03}", now.as_secs(), now.subsec_millis());
    ordered.insert("time".to_owned(), Value::String(seconds));
    ordered.append(&mut fields);
    let mut line = serde_json::to_vec(&ordered).unwrap_or_default();
    if line.len() >= LINE_BYTES {
        // Too many fields: the message alone says most.
        ordered.retain(|name, _| matches!(name.as_str(), "time" | "level" | "message"));
        if let Some(Value::String(message)) = ordered.get_mut("message") {
            message.truncate(message.floor_char_boundary(LONE_MESSAGE_BYTES));
        }
        line = serde_json::to_vec(&ordered).unwrap_or_default();
    }
    line.push(b'\n');
    line
}

impl<S> Subscriber for Lines<S>
where
    S: Fn(Map<String, Value>) + Send + Sync + 'static,
{
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(Map::new());
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        fields.0.insert("level".to_owned(), Value::String(level));
        event.record(&mut fields);
        (self.sink)(fields.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Collects an event's fields.
struct Fields(Map<String, Value>);

impl Fields {
    fn insert_text(&mut self, field: &Field, mut text: String) {
        text.truncate(text.floor_char_boundary(VALUE_BYTES));
        self.0.insert(field.name().to_owned(), Value::String(text));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert_text(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert_text(field, value.to_owned());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.insert_text(field, chain(value));
    }
}

/// An error and its causes in one line, outermost first.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some libraries repeat a cause in the text of what it caused.
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_bounded_however_many_fields_it_has() {
        for message in ["short", &"\u{1}".repeat(VALUE_BYTES)] {
            let mut fields = Map::new();
            fields.insert("message".to_owned(), message.into());
            for index in 0..100 {
                fields.insert(format!("field{index}"), Value::String("x".repeat(VALUE_BYTES)));
            }
            let line = line(fields);
            assert!(line.len() <= LINE_BYTES);
            let back: Value = serde_json::from_slice(&line).unwrap();
            let left = back["message"].as_str().unwrap();
            assert!(!left.is_empty() && message.starts_with(left), "{left:?}");
        }
    }

    #[test]
    fn there_are_only_so_many_lines_in_a_time() {
        let mut rate = Rate::default();
        let admitted = |rate: &mut Rate, at: u64| rate.admit(Duration::from_millis(at));
        let burst = (0..BURST).map(|_| admitted(&mut rate, 10));
        assert!(burst.collect::<Vec<_>>().iter().all(|line| *line == Some(0)));
        assert_eq!((admitted(&mut rate, 20), admitted(&mut rate, 150)), (None, None));
        // One more line, which says how many were left out.
        assert_eq!((admitted(&mut rate, 210), admitted(&mut rate, 220)), (Some(2), None));
        // However long it was quiet, there is one burst.
        let after = (0..1000).filter(|_| admitted(&mut rate, 1 << 30).is_some()).count();
        assert_eq!(after, 100);
    }

    #[test]
    fn an_ordinary_line_keeps_its_fields() {
        let mut fields = Map::new();
        fields.insert("pid".to_owned(), 7.into());
        let line = line(fields);
        let back: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(back["pid"], 7);
        assert!(line.ends_with(b"\n"));
    }
}
