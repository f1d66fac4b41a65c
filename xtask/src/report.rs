//! The table of results: how long each suite took, and its slowest tests.

use std::cmp::Reverse;
use std::time::Duration;

use crate::libtest::Tally;

/// The most tests of a suite that are listed.
const SLOWEST: usize = 5;
/// Faster tests are not worth a line.
const NOTEWORTHY: Duration = Duration::from_secs(2);

/// A test program that has run.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) took: Duration,
    pub(crate) tally: Tally,
    /// Whether its tests ran one after the other, so that the times between results are their
    /// durations.
    pub(crate) serial: bool,
}

/// The lines of the table, the longest suite first, below each the slowest of its tests.
pub(crate) fn table(outcomes: &[Outcome]) -> Vec<String> {
    let mut sorted: Vec<&Outcome> = outcomes.iter().collect();
    sorted.sort_by_key(|outcome| Reverse(outcome.took));
    let mut lines = vec![format!("{:>9}  {:>5}  suite", "seconds", "tests")];
    for outcome in sorted {
        let tests = outcome.tally.passed + outcome.tally.failed.len();
        let seconds = outcome.took.as_secs_f32();
        lines.push(format!("{seconds:9.1}  {tests:5}  {}", outcome.name));
        if outcome.serial {
            lines.extend(slowest(&outcome.tally.times));
        }
    }
    lines
}

fn slowest(times: &[(String, Duration)]) -> impl Iterator<Item = String> {
    let mut sorted: Vec<_> = times.iter().filter(|(_, took)| *took >= NOTEWORTHY).collect();
    sorted.sort_by_key(|(_, took)| Reverse(*took));
    let line =
        |(test, took): &(String, Duration)| format!("{:18}{:7.1}  {test}", "", took.as_secs_f32());
    sorted.into_iter().take(SLOWEST).map(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, seconds: u64, serial: bool) -> Outcome {
        let times = (0..20).map(|turn| (format!("test{turn}"), Duration::from_secs(turn)));
        let tally = Tally { passed: 20, times: times.collect(), ..Tally::default() };
        Outcome { name: name.to_owned(), took: Duration::from_secs(seconds), tally, serial }
    }

    #[test]
    fn suites_and_their_tests_are_sorted_by_time() {
        let lines = table(&[outcome("short", 1, false), outcome("long", 190, true)]);
        assert_eq!(lines[1], "    190.0     20  long");
        assert_eq!(lines[2].trim(), "19.0  test19");
        assert_eq!(lines[2 + SLOWEST], "      1.0     20  short");
    }

    #[test]
    fn tests_that_ran_beside_each_other_have_no_times() {
        assert_eq!(table(&[outcome("unit", 190, false)]).len(), 2);
    }
}
