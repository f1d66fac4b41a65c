//! Where the time went: every long step of a verb with what it took, told at the end.

use std::time::{Duration, Instant};

use anyhow::Result;
use guest_image::progress::say;

/// Shorter steps are not worth a line.
const NOTEWORTHY: Duration = Duration::from_millis(100);

/// The steps so far.
#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
    steps: Vec<(String, Duration)>,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), steps: Vec::new() }
    }

    /// Announces a step, runs it and remembers how long it took, failed or not.
    pub(crate) fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        say(&format!("==> {name}"));
        let started = Instant::now();
        let result = work();
        self.steps.push((name.to_owned(), started.elapsed()));
        result
    }

    /// The table, longest first; nothing if no step took long since the last report.
    pub(crate) fn report(&mut self) {
        let mut steps = std::mem::take(&mut self.steps);
        steps.retain(|(_, took)| *took >= NOTEWORTHY);
        if steps.is_empty() {
            return;
        }
        steps.sort_by_key(|(_, took)| std::cmp::Reverse(*took));
        say("where the time went:");
        for (name, took) in &steps {
            say(&format!("{:8.1} s  {name}", took.as_secs_f32()));
        }
        say(&format!("{:8.1} s  in all", self.started.elapsed().as_secs_f32()));
    }
}
