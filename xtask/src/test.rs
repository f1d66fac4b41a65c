//! `cargo xtask test`: runs unit and device tests on this machine, and in the test host the suites
//! of `tests/` and all other tests that need it. It prints a table of durations, and then one line
//! that counts all tests. With `--suite` it runs one suite or package.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use guest_image::progress::say;

use crate::cargo::Artifact;
use crate::clock::{Clock, both};
use crate::fuzz;
use crate::libtest::Tally;
use crate::report::{Outcome, table};
use crate::suites::{self, Wanted, Which};
use crate::{debian_image, host, image, packages, week_image};

/// Tests of other packages that are ignored with this reason run in the test host.
const NEEDS_HOST: &str = "needs the test host";
/// How many jobs run at once: an emulated host keeps one processor busy.
const AT_ONCE: usize = 2;
/// Options of every run in the test host; the timeout is only for hangs.
const HOST: [&str; 4] = ["--memory", "8192", "--timeout", "3000"];

/// How long each fuzz target runs.
const FUZZING: Duration = Duration::from_secs(20);

/// Runs what is wanted and prints the final line last, on standard output.
pub(crate) fn run(arguments: &[String], clock: &Clock) -> Result<ExitCode> {
    let wanted = Wanted::parse(arguments)?;
    clock.step("Debian packages", packages::ensure)?;
    let host = Host { wanted: &wanted, clock, program: Mutex::default() };
    let programs = if wanted.has_suites() {
        both(|| build(&wanted, clock), || host.program())?.0
    } else {
        build(&wanted, clock)?
    };
    let words = wanted.words();
    let which = wanted.which();
    let mut suites = programs.suites.iter().map(|test| Job::Inside { test, which, words });
    // The first suite takes the longest. The unit tests and fuzz targets run beside it, before the
    // other suites, because they find mistakes early.
    let jobs = suites.next().into_iter();
    let jobs = jobs.chain(programs.units.iter().map(|test| Job::Here { test, words }));
    let jobs = jobs.chain(programs.targets.iter().map(Job::Fuzz)).chain(suites);
    let outcomes = clock.step("tests", || run_all(jobs.collect(), &host))?;
    clock.report();
    conclude(outcomes)
}

/// The test programs that were built.
struct Programs {
    suites: Vec<Artifact>,
    units: Vec<Artifact>,
    targets: Vec<Artifact>,
}

fn build(wanted: &Wanted<'_>, clock: &Clock) -> Result<Programs> {
    let (mut suites, mut units) = clock.step("test programs", || wanted.build())?;
    suites.retain(has_tests);
    units.retain(has_tests);
    let targets = match wanted {
        Wanted::Everything => clock.step("fuzz targets", fuzz::build)?,
        Wanted::One { .. } => Vec::new(),
    };
    Ok(Programs { suites, units, targets })
}

/// A program without tests is not worth a start of the test host. A program that cannot list its
/// tests is kept and fails later.
fn has_tests(artifact: &Artifact) -> bool {
    let listing = Command::new(&artifact.executable).arg("--list").output();
    !listing.is_ok_and(|listing| listing.stdout == b"0 tests, 0 benchmarks\n")
}

/// The test host and everything that runs in it, built when it is first needed.
struct Host<'a> {
    wanted: &'a Wanted<'a>,
    clock: &'a Clock,
    program: Mutex<Option<PathBuf>>,
}

impl Host<'_> {
    fn program(&self) -> Result<PathBuf> {
        let mut program = self.program.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = &*program {
            return Ok(program.clone());
        }
        image::build(self.clock)?;
        if self.wanted.needs_debian() {
            self.clock.step("Debian image", debian_image::build)?;
        }
        for image in self.wanted.week_images() {
            self.clock.step("image of the week", || week_image::build(image))?;
        }
        let built = self.clock.step("test host", || host::prepare(&[]))?;
        Ok(program.insert(built).clone())
    }
}

/// One program to run, whose tests are then counted.
#[derive(Clone, Copy, Debug)]
enum Job<'a> {
    /// A test program on this machine, with further arguments.
    Here { test: &'a Artifact, words: &'a [String] },
    /// A test program in a test host of its own.
    Inside { test: &'a Artifact, which: Which, words: &'a [String] },
    /// A fuzz target.
    Fuzz(&'a Artifact),
}

/// Runs all jobs, [`AT_ONCE`] at a time.
fn run_all(jobs: VecDeque<Job<'_>>, host: &Host<'_>) -> Result<Vec<Outcome>> {
    let jobs = Mutex::new(jobs);
    let jobs = || jobs.lock().unwrap_or_else(PoisonError::into_inner);
    let lane = || {
        let mut outcomes = Vec::new();
        loop {
            let Some(job) = jobs().pop_front() else { return Ok(outcomes) };
            let (outcome, follows) = job.run(host)?;
            outcomes.push(outcome);
            jobs().extend(follows);
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(lane)).collect();
        let mut outcomes = Vec::new();
        for lane in lanes {
            let result: Result<Vec<_>> =
                lane.join().unwrap_or_else(|_| Err(anyhow!("a thread of the tests panicked")));
            outcomes.extend(result?);
        }
        Ok(outcomes)
    })
}

impl<'a> Job<'a> {
    /// Runs the job; returns its outcome, and the job that must follow: tests that need the test
    /// host.
    fn run(self, host: &Host<'_>) -> Result<(Outcome, Option<Self>)> {
        let name = self.name();
        say(&format!("==> {name}"));
        let started = Instant::now();
        let mut tally = match self {
            Self::Here { test, words } => here(test, words),
            Self::Inside { test, which, words } => inside(&host.program()?, test, which, words),
            Self::Fuzz(target) => fuzzed(target),
        }?;
        let took = started.elapsed();
        let follows = match self {
            Self::Here { test, words } => {
                let skipped = tally.skipped.len();
                tally.skipped.retain(|(_, reason)| reason != NEEDS_HOST);
                let moved = tally.skipped.len() < skipped;
                moved.then_some(Self::Inside { test, which: Which::Ignored, words })
            }
            Self::Inside { .. } | Self::Fuzz(_) => None,
        };
        let serial = matches!(self, Self::Inside { .. });
        Ok((Outcome { name, took, tally, serial }, follows))
    }

    fn name(self) -> String {
        match self {
            Self::Here { test, .. } | Self::Fuzz(test) => name(test),
            Self::Inside { test, .. } => format!("{} in the test host", name(test)),
        }
    }
}

fn name(artifact: &Artifact) -> String {
    if artifact.target.replace('_', "-") == artifact.package {
        artifact.package.clone()
    } else {
        format!("{} {}", artifact.package, artifact.target)
    }
}

fn here(test: &Artifact, words: &[String]) -> Result<Tally> {
    let mut command = Command::new(&test.executable);
    tally(test, command.args(words).current_dir(&test.directory))
}

fn inside(host: &Path, test: &Artifact, which: Which, words: &[String]) -> Result<Tally> {
    let mut command = Command::new(host);
    command.args(HOST).args(suites::of(test).map_or(&[][..], |suite| suite.host));
    command.arg("--").arg(&test.executable).arg("--test-threads=1").args(words);
    command.args(which.option());
    tally(test, command.current_dir(&test.directory))
}

/// A fuzz target that finds nothing counts as one passed test.
fn fuzzed(target: &Artifact) -> Result<Tally> {
    let mut tally = Tally { finished: true, ..Tally::default() };
    match fuzz::fuzz(target, FUZZING)? {
        None => tally.passed = 1,
        Some(finding) => tally.failed.push(format!("{}: {finding}", name(target))),
    }
    Ok(tally)
}

/// Runs a test program; one that ends without its result line counts as one failure.
fn tally(test: &Artifact, command: &mut Command) -> Result<Tally> {
    let name = name(test);
    let mut child = command
        .env("CARGO_MANIFEST_DIR", &test.directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {name}"))?;
    let output = child.stdout.take().context("no output")?;
    let mut tally = Tally::read(&name, output)?;
    let status = child.wait().with_context(|| format!("wait for {name}"))?;
    if !tally.finished || (!status.success() && tally.failed.is_empty()) {
        tally.failed.push(format!("{name}: ended without a result ({status})"));
    }
    Ok(tally)
}

/// Prints how long everything took, which tests were ignored and which failed; the last line has
/// the counts.
fn conclude(outcomes: Vec<Outcome>) -> Result<ExitCode> {
    table(&outcomes).iter().for_each(|line| say(line));
    let mut total = Tally::default();
    outcomes.into_iter().for_each(|outcome| total.add(outcome.tally));
    for (test, reason) in &total.skipped {
        let reason = if reason.is_empty() { "no reason given" } else { reason };
        say(&format!("skipped: {test}: {reason}"));
    }
    for test in &total.failed {
        say(&format!("failed: {test}"));
    }
    writeln!(io::stdout(), "{}", total.summary()).context("write the last line")?;
    Ok(if total.succeeded() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
