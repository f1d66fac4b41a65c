//! Progress of long steps, for a person: what is being done, how far it is, how long it took.
//!
//! Steps run beside each other and beside cargo, so each line stands for itself and none is rewritten.
//! Everything goes to standard error: standard output belongs to results.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// How often a step tells how far it is.
const INTERVAL: Duration = Duration::from_secs(20);

/// One step under way.
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

    /// Tells how far the step is; shown only now and then.
    pub fn update(&mut self, how_far: &str) {
        if self.shown.elapsed() >= INTERVAL {
            self.shown = Instant::now();
            say(&format!("{}: {how_far} ({} s)", self.name, self.started.elapsed().as_secs()));
        }
    }

    /// Closes the step and returns how long it took.
    pub fn done(self, result: &str) -> Duration {
        let took = self.started.elapsed();
        say(&format!("{}: {result} ({:.1} s)", self.name, took.as_secs_f32()));
        took
    }
}

/// Writes one line for a person to standard error.
pub fn say(line: &str) {
    // Nobody is left to tell when standard error is closed.
    _ = writeln!(io::stderr(), "{line}");
}
