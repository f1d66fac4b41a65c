//! `cargo xtask test`: unit and device tests on this machine, the suites of `tests/` and every test that
//! says so in the test host, and one line that counts them all.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use guest_image::progress::say;

use crate::cargo::{self, Artifact};
use crate::clock::Clock;
use crate::debian_image;
use crate::fuzz;
use crate::host;
use crate::image;
use crate::libtest::Tally;

/// The package whose suites need KVM and root.
const SUITES: &str = "bulkhead-tests";
/// The reason to ignore that sends a test of another package to the test host.
const NEEDS_HOST: &str = "needs the test host";
/// Test hosts that run at once.
const AT_ONCE: usize = 2;
/// Options of every run in the test host; the time is a bound on hangs.
const HOST: [&str; 4] = ["--memory", "8192", "--timeout", "2400"];

/// How long each fuzz target looks for what nobody has thought of.
const FUZZING: Duration = Duration::from_secs(20);

/// Suites of another host than the plain one, and the options that make it.
const OTHER_HOSTS: [(&str, &[&str]); 3] = [
    ("systemd", &["--systemd"]),
    ("cgroup_v1", &["--cgroup-v1"]),
    ("processors", &["--cpus", "2"]),
];

/// Runs everything and prints the final line last, on standard output.
pub(crate) fn run(clock: &mut Clock) -> Result<ExitCode> {
    image::build(clock)?;
    clock.step("Debian image", debian_image::build)?;
    let host = clock.step("test host", || {
        let host = host::program()?;
        cargo::succeed(Command::new(&host).arg("--build-only"))?;
        Ok(host)
    })?;
    let mut artifacts =
        clock.step("test programs", || cargo::build(&["test", "--workspace", "--no-run"]))?;
    artifacts.retain(|artifact| artifact.is_test && has_tests(artifact));
    let mut total = Tally::default();
    let (suites, units): (Vec<Artifact>, Vec<Artifact>) =
        artifacts.into_iter().partition(|artifact| artifact.package == SUITES);
    let mut guests: Vec<Guest<'_>> =
        suites.iter().map(|test| Guest { test, ignored: false }).collect();
    for unit in &units {
        let mut tally = clock.step(&name(unit), || here(unit))?;
        let before = tally.skipped.len();
        tally.skipped.retain(|(_, reason)| reason != NEEDS_HOST);
        if tally.skipped.len() < before {
            guests.push(Guest { test: unit, ignored: true });
        }
        total.add(tally);
    }
    for target in clock.step("fuzz targets", fuzz::build)? {
        total.add(clock.step(&name(&target), || fuzzed(&target))?);
    }
    for (name, took, tally) in all_inside(&host, guests)? {
        clock.took(&name, took);
        total.add(tally);
    }
    clock.report();
    conclude(&total)
}

/// Names what was not run and what failed; the counts are the last line.
fn conclude(total: &Tally) -> Result<ExitCode> {
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

/// A program without tests is not worth a start of the test host; one that cannot list them fails later.
fn has_tests(artifact: &Artifact) -> bool {
    let listing = Command::new(&artifact.executable).arg("--list").output();
    !listing.is_ok_and(|listing| listing.stdout == b"0 tests, 0 benchmarks\n")
}

fn name(artifact: &Artifact) -> String {
    if artifact.target.replace('_', "-") == artifact.package {
        artifact.package.clone()
    } else {
        format!("{} {}", artifact.package, artifact.target)
    }
}

fn here(test: &Artifact) -> Result<Tally> {
    let mut command = Command::new(&test.executable);
    tally(test, command.current_dir(&test.directory))
}

/// A fuzz target that finds nothing is a test that passed.
fn fuzzed(target: &Artifact) -> Result<Tally> {
    let mut tally = Tally { finished: true, ..Tally::default() };
    match fuzz::fuzz(target, FUZZING)? {
        None => tally.passed = 1,
        Some(finding) => tally.failed.push(format!("{}: {finding}", name(target))),
    }
    Ok(tally)
}

/// A test program that runs in a test host of its own.
#[derive(Clone, Copy, Debug)]
struct Guest<'a> {
    test: &'a Artifact,
    /// Only those of its tests that say so.
    ignored: bool,
}

/// Runs them all, [`AT_ONCE`] at a time: an emulated host keeps one processor busy.
fn all_inside(host: &Path, guests: Vec<Guest<'_>>) -> Result<Vec<(String, Duration, Tally)>> {
    let waiting = Mutex::new(guests.into_iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let mut done = Vec::new();
        while let Some(guest) = next() {
            let started = Instant::now();
            let tally = inside(host, guest)?;
            done.push((format!("{} in the test host", name(guest.test)), started.elapsed(), tally));
        }
        Ok(done)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let mut done = Vec::new();
        for worker in workers {
            let result: Result<Vec<_>> =
                worker.join().unwrap_or_else(|_| Err(anyhow!("a thread of the tests panicked")));
            done.extend(result?);
        }
        Ok(done)
    })
}

fn inside(host: &Path, guest: Guest<'_>) -> Result<Tally> {
    say(&format!("==> {} in the test host", name(guest.test)));
    let mut command = Command::new(host);
    command.args(HOST);
    let target = (&guest.test.package, &guest.test.target);
    let other = OTHER_HOSTS.iter().find(|(suite, _)| target == (&SUITES.into(), &(*suite).into()));
    command.args(other.map_or(&[][..], |(_, options)| options));
    command.arg("--").arg(&guest.test.executable).arg("--test-threads=1");
    if guest.ignored {
        command.arg("--ignored");
    }
    tally(guest.test, command.current_dir(&guest.test.directory))
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
