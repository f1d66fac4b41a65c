//! `cargo xtask test`: unit and device tests on this machine, the suites of `tests/` and every test that
//! says so in the test host, and one line that counts them all.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use guest_image::progress::say;

use crate::cargo::{self, Artifact};
use crate::clock::Clock;
use crate::host;
use crate::image;
use crate::libtest::Tally;

/// The package whose suites need KVM and root.
const SUITES: &str = "bulkhead-tests";
/// The reason to ignore that sends a test of another package to the test host.
const NEEDS_HOST: &str = "needs the test host";
/// Options of every run in the test host; the time is a bound on hangs.
const HOST: [&str; 4] = ["--memory", "8192", "--timeout", "2400"];

/// Runs everything and prints the final line last, on standard output.
pub(crate) fn run(clock: &mut Clock) -> Result<ExitCode> {
    image::build(clock)?;
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
    for unit in &units {
        let name = name(unit);
        let mut tally = clock.step(&name, || here(unit))?;
        let before = tally.skipped.len();
        tally.skipped.retain(|(_, reason)| reason != NEEDS_HOST);
        if tally.skipped.len() < before {
            let name = format!("{name} in the test host");
            let ignored = ["--ignored", "--test-threads=1"];
            let more = clock.step(&name, || inside(&host, unit, &ignored))?;
            total.add(more);
        }
        total.add(tally);
    }
    for suite in &suites {
        total.add(clock.step(&name(suite), || inside(&host, suite, &["--test-threads=1"]))?);
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

fn inside(host: &Path, test: &Artifact, arguments: &[&str]) -> Result<Tally> {
    let mut command = Command::new(host);
    command.args(HOST).arg("--").arg(&test.executable).args(arguments);
    tally(test, command.current_dir(&test.directory))
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
