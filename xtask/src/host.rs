//! `cargo xtask host` and what else runs a command in the test host.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use guest_image::progress::say;

use crate::cargo::{self, root};
use crate::clock::Clock;
use crate::{image, packages};

/// The built `test-host`.
pub(crate) fn program() -> Result<PathBuf> {
    let artifacts = cargo::build(&["build", "--quiet", "-p", "test-host"])?;
    let host = artifacts.into_iter().find(|artifact| artifact.target == "test-host");
    Ok(host.context("cargo built no test-host")?.executable)
}

/// A command in the test host, to be run.
pub(crate) fn command<S: AsRef<OsStr>>(
    options: &[&str],
    command: impl IntoIterator<Item = S>,
) -> Result<Command> {
    let mut host = Command::new(program()?);
    host.args(options).arg("--").args(command);
    Ok(host)
}

/// Becomes the test host with these arguments.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    packages::ensure()?;
    Err(Command::new(program()?).args(arguments).exec()).context("run test-host")
}

/// Runs the benchmark in the test host and keeps its JSON.
pub(crate) fn bench(arguments: &[String], clock: &mut Clock) -> Result<ExitCode> {
    image::build(clock)?;
    let built = clock.step("benchmark program", || {
        cargo::build(&["build", "--release", "-p", "bulkhead-tests", "--bin", "bench"])
    })?;
    let bench = built.into_iter().find(|artifact| artifact.target == "bench");
    let bench = bench.context("cargo built no bench")?.executable;
    let results = root().join("target/bench");
    fs::create_dir_all(&results).with_context(|| results.display().to_string())?;
    let share = results.to_str().context("the checkout's path is not UTF-8")?;
    let status = clock.step("benchmark", || {
        let arguments = arguments.iter().map(OsStr::new);
        let json = [OsStr::new("--json"), OsStr::new("/run/share-out/bench.json")];
        let line = [bench.as_os_str()].into_iter().chain(arguments).chain(json);
        let mut bench = command(&["--memory", "8192", "--share", share], line)?;
        bench.status().context("run test-host")
    })?;
    say(&format!("figures: {}", results.join("bench.json").display()));
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
