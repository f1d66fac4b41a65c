//! Parses the human-readable output of a libtest binary: one line per test and one result line.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest_image::progress::say;

/// The results of one or several test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    /// The tests that failed, each as `suite: test`.
    pub(crate) failed: Vec<String>,
    /// The tests that were not run, each with its reason.
    pub(crate) skipped: Vec<(String, String)>,
    /// The tests that ran, each with the time since the previous result. If tests run one after the
    /// other, this is the test's duration, which libtest reports only on nightly.
    pub(crate) times: Vec<(String, Duration)>,
    /// Whether a result line was seen: a binary that crashes prints none.
    pub(crate) finished: bool,
}

impl Tally {
    /// Reads the output of one binary, and shows each line as it comes, with the name of its suite,
    /// because another suite may run at the same time.
    pub(crate) fn read(suite: &str, output: impl Read) -> Result<Self> {
        let mut tally = Self::default();
        let mut last = Instant::now();
        for line in BufReader::new(output).split(b'\n') {
            let line = line.with_context(|| format!("read the output of {suite}"))?;
            let line = String::from_utf8_lossy(&line);
            say(&format!("{suite}: {line}"));
            tally.line(suite, line.trim_end(), &mut last);
        }
        Ok(tally)
    }

    /// `last` is the time of the previous result, or of the start of the first test.
    fn line(&mut self, suite: &str, line: &str, last: &mut Instant) {
        if line.starts_with("running ") {
            *last = Instant::now();
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.conclude(suite, result);
            return;
        }
        let Some((name, verdict)) =
            line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        else {
            return;
        };
        let name = name.strip_suffix(" - should panic").unwrap_or(name);
        if verdict.ends_with("FAILED") {
            self.failed.push(format!("{suite}: {name}"));
        } else if let Some((_, reason)) = verdict.split_once("ignored") {
            let reason = reason.trim_start_matches(", ").to_owned();
            self.skipped.push((format!("{suite}: {name}"), reason));
            return;
        }
        self.times.push((name.to_owned(), last.elapsed()));
        *last = Instant::now();
    }

    /// Takes the counts from the result line: the lines of single tests may be garbled by processes
    /// that the tests started.
    fn conclude(&mut self, suite: &str, result: &str) {
        let count = |what: &str| {
            let words = result.split([' ', ';']).collect::<Vec<_>>();
            let place = words.iter().position(|word| *word == what)?;
            words.get(place.checked_sub(1)?)?.parse().ok()
        };
        let (passed, failed) = (count("passed"), count("failed"));
        self.finished = passed.is_some() && failed.is_some();
        self.passed += passed.unwrap_or(0);
        while self.failed.len() < failed.unwrap_or(0) {
            self.failed.push(format!("{suite}: a test whose name was not seen"));
        }
    }

    /// Adds the counts of another binary.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }

    /// The last line of a run.
    pub(crate) fn summary(&self) -> String {
        let (failed, skipped) = (self.failed.len(), self.skipped.len());
        format!("{} passed, {failed} failed, {skipped} skipped", self.passed)
    }

    /// Whether nothing failed. A run without any test counts as a failure.
    pub(crate) fn succeeded(&self) -> bool {
        self.failed.is_empty() && self.passed > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(text: &str) -> Tally {
        let mut tally = Tally::default();
        let mut last = Instant::now();
        text.lines().for_each(|line| tally.line("oci", line, &mut last));
        tally
    }

    const OUTPUT: &str = "
running 5 tests
test exit::zero_is_zero ... ok
test exit::panics - should panic ... ok
test streams::stdin_reaches_eof ... FAILED
test network::bridge ... ignored, needs the network issue
test plain ... ignored

failures:
test result: FAILED. 2 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn every_verdict_is_counted_under_its_name() {
        let tally = tally(OUTPUT);
        assert_eq!(tally.passed, 2);
        assert_eq!(tally.failed, ["oci: streams::stdin_reaches_eof"]);
        let reason = ("oci: network::bridge".to_owned(), "needs the network issue".to_owned());
        assert_eq!(tally.skipped[0], reason);
        assert_eq!(tally.summary(), "2 passed, 1 failed, 2 skipped");
        assert!(tally.finished && !tally.succeeded());
        // Ignored tests have no times.
        let timed: Vec<&str> = tally.times.iter().map(|(name, _)| name.as_str()).collect();
        let ran = ["exit::zero_is_zero", "exit::panics", "streams::stdin_reaches_eof"];
        assert_eq!(timed, ran);
    }

    #[test]
    fn a_test_took_the_time_since_the_verdict_before() {
        let (mut tally, mut last) = (Tally::default(), Instant::now());
        let mut line = |line: &str| tally.line("oci", line, &mut last);
        let pause = Duration::from_millis(20);
        std::thread::sleep(pause);
        line("running 2 tests");
        line("test a ... ok");
        std::thread::sleep(pause);
        line("a word of its own");
        line("test b ... ok");
        assert!(tally.times[0].1 < pause && tally.times[1].1 >= pause, "{:?}", tally.times);
    }

    #[test]
    fn output_without_a_result_line_is_not_finished() {
        let tally = tally("test a ... ok\nSegmentation fault\n");
        assert!(!tally.finished);
    }

    #[test]
    fn verdict_in_a_line_that_somebody_wrote_into_still_counts() {
        let text = "test a ... noise\nok\ntest b ... noise\nFAILED\n\
                    test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let tally = tally(text);
        assert_eq!((tally.passed, tally.failed.len()), (1, 1));
    }

    #[test]
    fn nothing_run_is_no_success() {
        assert!(!Tally::default().succeeded());
    }
}
