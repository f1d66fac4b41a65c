//! `cargo xtask host`, and the other verbs that run a command in the test host.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use guest_image::progress::say;

use crate::cargo::{self, root};
use crate::clock::Clock;
use crate::{figures, image, packages};

/// Builds `test-host` and returns its path.
pub(crate) fn program() -> Result<PathBuf> {
    let artifacts = cargo::build(&["build", "--quiet", "-p", "test-host"])?;
    let host = artifacts.into_iter().find(|artifact| artifact.target == "test-host");
    Ok(host.context("cargo built no test-host")?.executable)
}

/// Builds `test-host` and the kernel that these options choose; returns the path of `test-host`.
pub(crate) fn prepare(options: &[&str]) -> Result<PathBuf> {
    let host = program()?;
    cargo::succeed(Command::new(&host).args(options).arg("--build-only"))?;
    Ok(host)
}

/// A command in the test host, not started yet.
pub(crate) fn command<S: AsRef<OsStr>>(
    options: &[&str],
    command: impl IntoIterator<Item = S>,
) -> Result<Command> {
    let mut host = Command::new(program()?);
    host.args(options).arg("--").args(command);
    Ok(host)
}

/// Replaces this process by the test host with these arguments.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    packages::ensure()?;
    Err(Command::new(program()?).args(arguments).exec()).context("run test-host")
}

/// The parts that are measured twice: once in the time that the emulation takes, and once with
/// instructions counted.
const COUNTED: &str = "start,verbs,files";
/// How long one pass may take, in seconds. QEMU sometimes hangs while it counts instructions.
const PASS_SECONDS: &str = "1800";
/// The part that is run alone and only once: it repeats its work by itself.
const SOAK: &str = "soak";
/// How long [`SOAK`] may take, in seconds.
const SOAK_SECONDS: &str = "7200";

/// Runs the benchmark in the test host, then what [`COUNTED`] names in one that counts instructions,
/// and keeps the JSON of both. [`SOAK`] is run once.
pub(crate) fn bench(arguments: &[String], clock: &Clock) -> Result<ExitCode> {
    image::build(clock)?;
    let built = clock.step("benchmark program", || {
        cargo::build(&["build", "--release", "-p", "bulkhead-tests", "--bin", "bench"])
    })?;
    let bench = built.into_iter().find(|artifact| artifact.target == "bench");
    let bench = bench.context("cargo built no bench")?.executable;
    let results = root().join("target/bench");
    fs::create_dir_all(&results).with_context(|| results.display().to_string())?;
    let share = results.to_str().context("the checkout's path is not UTF-8")?;
    let soaks = arguments.iter().any(|argument| argument == SOAK);
    let seconds = if soaks { SOAK_SECONDS } else { PASS_SECONDS };
    let run = |options: &[&str], json: &str, parts: &[&str]| {
        let json = format!("/run/share-out/{json}");
        // The parts come first, so that the caller's own choice overrides them.
        let line = parts.iter().copied().chain(arguments.iter().map(String::as_str));
        let line = line.chain(["--json", &json]).map(OsStr::new);
        let mut options = options.to_vec();
        options.extend(["--memory", "8192", "--share", share, "--timeout", seconds]);
        let status = command(&options, [bench.as_os_str()].into_iter().chain(line))?.status();
        status.context("run test-host").map(|status| status.success())
    };
    let json = if soaks { "soak.json" } else { "bench.json" };
    let passed = clock.step("benchmark", || run(&[], json, &[]))?
        && (soaks
            || clock.step("benchmark, instructions counted", || {
                run(&["--count"], "bench-counted.json", &["--only", COUNTED])
            })?);
    say(&format!("figures: {}", results.display()));
    figures::compare(&results)?;
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
