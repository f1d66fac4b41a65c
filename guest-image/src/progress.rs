//! Progress of long steps, for a person: what is being done, how far it is, how long it took.
//!
//! On a terminal the line is rewritten; elsewhere (a CI log) it is repeated every half minute.
//! Everything goes to standard error: standard output belongs to results.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

const TERMINAL_INTERVAL: Duration = Duration::from_millis(200);
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// One step under way.
#[derive(Debug)]
pub struct Step {
    name: String,
    started: Instant,
    shown: Instant,
    terminal: bool,
}

impl Step {
    /// Announces a step.
    pub fn start(name: impl Into<String>) -> Self {
        let name = name.into();
        let terminal = io::stderr().is_terminal();
        say(&format!("{name} …"));
        let now = Instant::now();
        Self { name, started: now, shown: now, terminal }
    }

    /// Tells how far the step is; shown only now and then.
    pub fn update(&mut self, how_far: &str) {
        let interval = if self.terminal { TERMINAL_INTERVAL } else { LOG_INTERVAL };
        if self.shown.elapsed() < interval {
            return;
        }
        self.shown = Instant::now();
        let seconds = self.started.elapsed().as_secs();
        let line = format!("{}: {how_far} ({seconds} s)", self.name);
        if self.terminal {
            // A failed write to the terminal loses a progress line and nothing else.
            _ = write!(io::stderr(), "\r\x1b[K{line:.100}");
        } else {
            say(&line);
        }
    }

    /// Closes the step and returns how long it took.
    pub fn done(self, result: &str) -> Duration {
        let took = self.started.elapsed();
        if self.terminal {
            _ = write!(io::stderr(), "\r\x1b[K");
        }
        say(&format!("{}: {result} ({:.1} s)", self.name, took.as_secs_f32()));
        took
    }
}

/// Writes one line for a person to standard error.
pub fn say(line: &str) {
    // Nobody is left to tell when standard error is closed.
    _ = writeln!(io::stderr(), "{line}");
}
