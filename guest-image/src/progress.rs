//! Progress messages of long steps: what is being done, how far it is, how long it took.
//!
//! Steps run in parallel with each other and with cargo, so each line is complete and none is
//! rewritten. Messages go to standard error; standard output is for results.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// The minimum time between progress messages of a step.
const INTERVAL: Duration = Duration::from_secs(20);

/// A step in progress.
#[derive(Debug)]
pub struct Step {
    name: String,
    started: Instant,
    shown: Instant,
}

impl Step {
    /// Announces a step.
    pub fn start(name: impl Into<String>) -> Self {
        let name = name.into();
        say(&format!("{name} …"));
        let now = Instant::now();
        Self { name, started: now, shown: now }
    }

    /// Reports how far the step is; most reports are not shown.
    pub fn update(&mut self, how_far: &str) {
        if self.shown.elapsed() >= INTERVAL {
            self.shown = Instant::now();
            say(&format!("{}: {how_far} ({} s)", self.name, self.started.elapsed().as_secs()));
        }
    }

    /// Ends the step and returns how long it took.
    pub fn done(self, result: &str) -> Duration {
        let took = self.started.elapsed();
        say(&format!("{}: {result} ({:.1} s)", self.name, took.as_secs_f32()));
        took
    }
}

/// Writes one line to standard error.
pub fn say(line: &str) {
    // If standard error is closed, the failure cannot be reported.
    _ = writeln!(io::stderr(), "{line}");
}
