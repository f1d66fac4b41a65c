//! `cargo xtask test`: unit and device tests on this machine, the suites of `tests/` and every test that
//! says so in the test host, and one line that counts them all. With `--suite`, one of these.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use guest_image::progress::say;
use serde_json::Value;

use crate::cargo::{self, Artifact};
use crate::clock::Clock;
use crate::debian_image;
use crate::fuzz;
use crate::host;
use crate::image;
use crate::libtest::Tally;
use crate::packages;
use crate::report::{Outcome, table};

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

/// A suite that differs from the others.
struct Suite {
    /// Its target in the package [`SUITES`].
    name: &'static str,
    /// Options of its test host, which count before those in [`HOST`].
    host: &'static [&'static str],
    /// It uses the image of `cargo xtask debian`.
    debian: bool,
    /// It runs only where `--suite` names it: it takes too long for every run.
    only_by_name: bool,
}

const PLAIN: Suite = Suite { name: "", host: &[], debian: false, only_by_name: false };
const SPECIAL: [Suite; 4] = [
    Suite { name: "callers", debian: true, ..PLAIN },
    Suite { name: "systemd", host: &["--systemd"], ..PLAIN },
    Suite { name: "cgroup_v1", host: &["--cgroup-v1"], ..PLAIN },
    Suite { name: "processors", host: &["--cpus", "2"], ..PLAIN },
];

/// What is to run.
#[derive(Debug, PartialEq, Eq)]
enum Wanted<'a> {
    Everything,
    /// A suite, or a package for its unit tests, and what its test program is called with: the names of
    /// tests, or parts of them, and options of libtest.
    One {
        suite: &'a str,
        words: &'a [String],
    },
}

/// Runs what is wanted and prints the final line last, on standard output.
pub(crate) fn run(arguments: &[String], clock: &mut Clock) -> Result<ExitCode> {
    let wanted = understood(arguments)?;
    let selection = selection(&wanted)?;
    clock.step("Debian packages", packages::ensure)?;
    let (suites, units) = clock.step("test programs", || programs(&selection, &wanted))?;
    let words = wanted.words();
    let mut outcomes = Vec::new();
    let mut guests: Vec<Guest<'_>> =
        suites.iter().map(|test| Guest { test, ignored: false, words }).collect();
    for unit in &units {
        let mut outcome = timed(name(unit), false, || here(unit, words))?;
        let skipped = &mut outcome.tally.skipped;
        let before = skipped.len();
        skipped.retain(|(_, reason)| reason != NEEDS_HOST);
        if skipped.len() < before {
            guests.push(Guest { test: unit, ignored: true, words });
        }
        outcomes.push(outcome);
    }
    if wanted == Wanted::Everything {
        for target in clock.step("fuzz targets", fuzz::build)? {
            outcomes.push(timed(name(&target), false, || fuzzed(&target))?);
        }
    }
    if !guests.is_empty() {
        let host = prepare(&guests, clock)?;
        outcomes.extend(clock.step("suites in the test host", || all_inside(&host, guests))?);
    }
    clock.report();
    conclude(outcomes)
}

fn understood(arguments: &[String]) -> Result<Wanted<'_>> {
    match arguments {
        [] => Ok(Wanted::Everything),
        [option, suite, words @ ..] if option == "--suite" => Ok(Wanted::One { suite, words }),
        _ => bail!("usage: cargo xtask test [--suite NAME [TEST…]]"),
    }
}

impl<'a> Wanted<'a> {
    fn words(&self) -> &'a [String] {
        match self {
            Self::Everything => &[],
            Self::One { words, .. } => words,
        }
    }
}

/// The arguments by which cargo builds its test programs, and no others.
fn selection(wanted: &Wanted<'_>) -> Result<Vec<String>> {
    let Wanted::One { suite, .. } = wanted else { return Ok(vec!["--workspace".to_owned()]) };
    let metadata = ["metadata", "--no-deps", "--format-version", "1"];
    let metadata = cargo::output(cargo::cargo().args(metadata))?;
    selected(suite, &serde_json::from_str(&metadata).context("cargo metadata")?)
}

fn selected(suite: &str, metadata: &Value) -> Result<Vec<String>> {
    let packages: Vec<&Value> = metadata["packages"].as_array().into_iter().flatten().collect();
    let of_suites = packages.iter().find(|package| package["name"] == SUITES);
    let targets = of_suites.and_then(|package| package["targets"].as_array()).into_iter().flatten();
    let suites: Vec<&str> = targets
        .filter(|target| target["kind"][0] == "test")
        .filter_map(|target| target["name"].as_str())
        .collect();
    let names: Vec<&str> = packages
        .iter()
        .filter_map(|package| package["name"].as_str())
        .filter(|name| *name != SUITES)
        .collect();
    let arguments: &[&str] = if suites.contains(&suite) {
        // Of the whole workspace, whose features are then the same as when everything is built.
        &["--workspace", "--test", suite]
    } else if names.contains(&suite) {
        &["-p", suite]
    } else {
        bail!(
            "no suite {suite}: there are {}, and for the unit tests of a package its name: {}",
            suites.join(", "),
            names.join(", ")
        );
    };
    Ok(arguments.iter().map(|&argument| argument.to_owned()).collect())
}

/// The test programs that have tests: the suites, and those of the other packages.
fn programs(selection: &[String], wanted: &Wanted<'_>) -> Result<(Vec<Artifact>, Vec<Artifact>)> {
    let arguments = ["test", "--no-run"].into_iter().chain(selection.iter().map(String::as_str));
    let mut artifacts = cargo::build(&arguments.collect::<Vec<_>>())?;
    artifacts.retain(|artifact| {
        artifact.is_test && is_part(special_of(artifact), wanted) && has_tests(artifact)
    });
    Ok(artifacts.into_iter().partition(|artifact| artifact.package == SUITES))
}

/// Builds what these use, and the test host, whose program it returns.
fn prepare(guests: &[Guest<'_>], clock: &mut Clock) -> Result<PathBuf> {
    image::build(clock)?;
    if guests.iter().any(|guest| special_of(guest.test).is_some_and(|suite| suite.debian)) {
        clock.step("Debian image", debian_image::build)?;
    }
    clock.step("test host", || {
        let host = host::program()?;
        cargo::succeed(Command::new(&host).arg("--build-only"))?;
        Ok(host)
    })
}

/// Whether a test program runs, one of a suite that differs or another.
fn is_part(suite: Option<&Suite>, wanted: &Wanted<'_>) -> bool {
    *wanted != Wanted::Everything || !suite.is_some_and(|suite| suite.only_by_name)
}

fn special_of(artifact: &Artifact) -> Option<&'static Suite> {
    (artifact.package == SUITES).then(|| special(&artifact.target)).flatten()
}

fn special(name: &str) -> Option<&'static Suite> {
    SPECIAL.iter().find(|suite| suite.name == name)
}

/// Runs a test program, and says how long that took.
fn timed(name: String, serial: bool, work: impl FnOnce() -> Result<Tally>) -> Result<Outcome> {
    say(&format!("==> {name}"));
    let started = Instant::now();
    let tally = work()?;
    Ok(Outcome { name, took: started.elapsed(), tally, serial })
}

/// Tells what took how long, what was not run and what failed; the counts are the last line.
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

fn here(test: &Artifact, words: &[String]) -> Result<Tally> {
    let mut command = Command::new(&test.executable);
    tally(test, command.args(words).current_dir(&test.directory))
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
    /// Further arguments of the program.
    words: &'a [String],
}

/// Runs them all, [`AT_ONCE`] at a time: an emulated host keeps one processor busy.
fn all_inside(host: &Path, guests: Vec<Guest<'_>>) -> Result<Vec<Outcome>> {
    let waiting = Mutex::new(guests.into_iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let mut done = Vec::new();
        while let Some(guest) = next() {
            let name = format!("{} in the test host", name(guest.test));
            done.push(timed(name, true, || inside(host, guest))?);
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
    let mut command = Command::new(host);
    command.args(HOST);
    command.args(special_of(guest.test).map_or(&[][..], |suite| suite.host));
    command.arg("--").arg(&guest.test.executable).arg("--test-threads=1").args(guest.words);
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn metadata() -> Value {
        let target = |kind: &str, name: &str| json!({ "kind": [kind], "name": name });
        json!({ "packages": [
            { "name": SUITES, "targets": [target("lib", "bulkhead_tests"), target("test", "oci")] },
            { "name": "bulkhead-vmm", "targets": [target("lib", "bulkhead_vmm")] },
        ] })
    }

    #[test]
    fn a_suite_is_built_alone_and_so_is_a_package() {
        let suite = selected("oci", &metadata()).unwrap();
        assert_eq!(suite, ["--workspace", "--test", "oci"]);
        assert_eq!(selected("bulkhead-vmm", &metadata()).unwrap(), ["-p", "bulkhead-vmm"]);
    }

    #[test]
    fn unknown_suite_is_refused_and_the_known_ones_are_named() {
        let error = selected("oic", &metadata()).unwrap_err().to_string();
        assert!(error.contains("no suite oic: there are oci, ") && error.contains("bulkhead-vmm"));
    }

    #[test]
    fn words_after_the_suite_are_the_test_programs() {
        let words: Vec<String> = ["--suite", "oci", "kill::", "--exact"].map(str::to_owned).into();
        assert_eq!(understood(&words).unwrap(), Wanted::One { suite: "oci", words: &words[2..] });
        assert_eq!(understood(&[]).unwrap(), Wanted::Everything);
        assert!(understood(&words[1..]).is_err());
        assert!(understood(&words[..1]).is_err());
    }

    /// A name that no target has would give its suite the plain host in silence.
    #[test]
    fn every_special_suite_is_a_target_of_the_suites() {
        let manifest = std::fs::read_to_string(cargo::root().join("tests/Cargo.toml")).unwrap();
        for suite in SPECIAL {
            assert!(
                manifest.contains(&format!("[[test]]\nname = \"{}\"", suite.name)),
                "{}",
                suite.name
            );
        }
    }

    #[test]
    fn suite_that_runs_only_by_name_is_left_out_of_everything() {
        let by_name = Suite { only_by_name: true, ..PLAIN };
        let one = Wanted::One { suite: "", words: &[] };
        assert!(is_part(Some(&by_name), &one) && is_part(Some(&PLAIN), &Wanted::Everything));
        assert!(
            !is_part(Some(&by_name), &Wanted::Everything) && is_part(None, &Wanted::Everything)
        );
    }
}
