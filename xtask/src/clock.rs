//! Measures each step of a verb, and reports the long ones at the end.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use guest_image::progress::say;

/// Shorter steps are not worth a line.
const NOTEWORTHY: Duration = Duration::from_millis(100);

/// The steps so far; some may run in parallel.
#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
    steps: Mutex<Vec<(String, Duration)>>,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), steps: Mutex::default() }
    }

    /// Announces a step, runs it and records how long it took, even if it failed.
    pub(crate) fn step<T>(&self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        say(&format!("==> {name}"));
        let started = Instant::now();
        let result = work();
        let step = (name.to_owned(), started.elapsed());
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).push(step);
        result
    }

    /// Prints the table, longest first; prints nothing if no step since the last report took long.
    pub(crate) fn report(&self) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let mut steps = std::mem::take(&mut *steps);
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

/// Runs two functions in parallel, each to its end, even if the other fails.
pub(crate) fn both<A: Send, B>(
    first: impl FnOnce() -> Result<A> + Send,
    second: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    let (first, second) = thread::scope(|scope| {
        let first = scope.spawn(first);
        let second = second();
        (first.join(), second)
    });
    Ok((first.unwrap_or_else(|_| Err(anyhow!("a thread panicked")))?, second?))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn two_steps_run_beside_each_other() {
        let (to_first, from_second) = mpsc::channel();
        let (to_second, from_first) = mpsc::channel();
        let first = move || {
            to_second.send(1)?;
            Ok(from_second.recv_timeout(Duration::from_secs(60))?)
        };
        let second = move || {
            to_first.send(2)?;
            Ok(from_first.recv_timeout(Duration::from_secs(60))?)
        };
        assert_eq!(both(first, second).unwrap(), (2, 1));
    }

    #[test]
    fn failure_of_either_is_the_failure_of_both() {
        let fails = || Err::<(), _>(anyhow!("no"));
        assert!(both(fails, || Ok(())).is_err());
        assert!(both(|| Ok(()), fails).is_err());
    }
}
