//! `cargo xtask fuzz`: programs that act as a hostile guest, as their input bytes say. libFuzzer
//! searches for inputs that reach more of the code. `docs/decisions/0019-fuzzing.md` says why it is
//! built this way.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use guest_image::progress::say;

use crate::cargo::{self, Artifact, cargo, root, succeed};
use crate::clock::Clock;

/// Cargo's option for the workspace of the targets.
pub(crate) const MANIFEST: [&str; 2] = ["--manifest-path", "tests/fuzz/Cargo.toml"];
/// A target directory of its own: the other builds cannot use these artifacts.
const DIRECTORY: [&str; 2] = ["--target-dir", "target/fuzz"];
/// Compiles the entry points for the targets into the crates under test.
const FUZZING: &str = "--cfg fuzzing";
/// Counts taken branches, and reports the operands of comparisons to libFuzzer.
const COVERAGE: &str = "-Cpasses=sancov-module \
     -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// How long each target runs if no time is given.
const SHORTLY: Duration = Duration::from_secs(60);
/// One input normally takes a tenth of a millisecond and some megabytes. Longer inputs reach no
/// further code.
const BOUNDS: [&str; 3] = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=1024"];

/// What a target is to do.
#[derive(Debug, PartialEq, Eq)]
enum Work {
    /// Look for inputs that break something.
    Search(Duration),
    /// Run an input that did.
    Repeat(PathBuf),
}

/// Builds all targets, and runs one or all.
pub(crate) fn run(arguments: &[String], clock: &Clock) -> Result<ExitCode> {
    let (wanted, work) = understood(arguments)?;
    let mut targets = clock.step("fuzz targets", build)?;
    let names: Vec<String> = targets.iter().map(|target| target.target.clone()).collect();
    targets.retain(|target| wanted.is_none_or(|wanted| target.target == wanted));
    if targets.is_empty() {
        bail!("no such target: there are {}", names.join(", "));
    }
    let mut status = ExitCode::SUCCESS;
    for target in &targets {
        let finding = clock.step(&format!("fuzz {}", target.target), || match &work {
            Work::Search(time) => fuzz(target, *time),
            Work::Repeat(input) => repeat(target, input),
        })?;
        if let Some(finding) = finding {
            say(&format!("error: {finding}"));
            status = ExitCode::FAILURE;
        }
    }
    Ok(status)
}

/// The target, or `None` for all, and how long to search or which input to run.
fn understood(arguments: &[String]) -> Result<(Option<&str>, Work)> {
    Ok(match arguments {
        [] => (None, Work::Search(SHORTLY)),
        [target] => (Some(target), Work::Search(SHORTLY)),
        [target, what] => match what.parse() {
            Ok(seconds) => (Some(target), Work::Search(Duration::from_secs(seconds))),
            Err(_) => (Some(target), Work::Repeat(what.into())),
        },
        _ => bail!("usage: cargo xtask fuzz [TARGET] [SECONDS | FILE]"),
    })
}

/// Builds the targets with their own flags instead of those in cargo's configuration: libFuzzer
/// does not start in a static program.
pub(crate) fn build() -> Result<Vec<Artifact>> {
    let mut build = cargo();
    build.args(["build", "--release"]).args(MANIFEST).args(DIRECTORY);
    cargo::artifacts(build.env("RUSTFLAGS", format!("{FUZZING} {COVERAGE}")))
}

/// Runs clippy on code that is compiled for the targets only.
pub(crate) fn lint() -> Result<()> {
    let mut lint = cargo();
    lint.args(["clippy", "-p", "bulkhead-vmm", "--lib", "--quiet"]).args(DIRECTORY);
    succeed(lint.args(["--", "-D", "warnings"]).env("RUSTFLAGS", FUZZING))
}

/// Runs a target for `time`, beginning with the corpus of the last run; returns what it found, and
/// how to reproduce it.
pub(crate) fn fuzz(target: &Artifact, time: Duration) -> Result<Option<String>> {
    let name = &target.target;
    let (corpus, found) = (place("corpus", name)?, place("found", name)?);
    let mut command = program(target);
    command.arg(format!("-max_total_time={}", time.as_secs()));
    command.arg(format!("-artifact_prefix={}/", found.display())).arg(&corpus);
    let words = target.directory.join(format!("targets/{name}.dict"));
    if words.exists() {
        command.arg(format!("-dict={}", words.display()));
    }
    let mut child = command.spawn().with_context(|| format!("run {name}"))?;
    let input = follow(name, &mut child)?;
    let status = child.wait().with_context(|| format!("wait for {name}"))?;
    Ok(match input {
        _ if status.success() => None,
        Some(input) => {
            let input = input.strip_prefix(root()).unwrap_or(&input).display();
            Some(format!("{name} broke; to see it again: cargo xtask fuzz {name} {input}"))
        }
        None => Some(format!("{name} ended without a word of why ({status})")),
    })
}

fn repeat(target: &Artifact, input: &Path) -> Result<Option<String>> {
    let name = &target.target;
    let mut command = program(target);
    let mut child = command.arg(input).spawn().with_context(|| format!("run {name}"))?;
    follow(name, &mut child)?;
    let status = child.wait().with_context(|| format!("wait for {name}"))?;
    let broke = || format!("{name} breaks by {} ({status})", input.display());
    Ok((!status.success()).then(broke))
}

fn program(target: &Artifact) -> Command {
    let mut command = Command::new(&target.executable);
    command.args(BOUNDS).env("RUST_BACKTRACE", "1");
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A directory that is kept between runs and is not part of the repository.
fn place(what: &str, target: &str) -> Result<PathBuf> {
    let place = root().join("target/fuzz").join(what).join(target);
    fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    Ok(place)
}

/// Shows a target's output, and returns the file in which it saved the input that broke it.
fn follow(name: &str, child: &mut Child) -> Result<Option<PathBuf>> {
    let output = child.stderr.take().context("no output")?;
    let mut kept = None;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.with_context(|| format!("read the output of {name}"))?;
        let line = String::from_utf8_lossy(&line);
        if !is_step(&line) {
            say(&format!("{name}: {line}"));
        }
        kept = kept.or_else(|| input(&line));
    }
    Ok(kept)
}

/// Whether this is one of thousands of progress lines: an input that reached new code, or a
/// suggested word for the dictionary.
fn is_step(line: &str) -> bool {
    let mut words = line.split_whitespace();
    match (words.next().unwrap_or_default(), words.next()) {
        (_, Some("NEW" | "REDUCE")) => true,
        (first, _) => ["\"", "NEW_FUNC", "######"].iter().any(|start| first.starts_with(start)),
    }
}

/// The file in which libFuzzer has saved an input, if this line names one.
fn input(line: &str) -> Option<PathBuf> {
    let (_, path) = line.split_once("Test unit written to ")?;
    Some(path.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_a_time_and_anything_else_an_input() {
        let understand = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            let (target, work) = understood(&words)?;
            Ok::<_, anyhow::Error>((target.map(str::to_owned), work))
        };
        let queue = || Some("queue".to_owned());
        assert_eq!(understand(&[]).unwrap(), (None, Work::Search(SHORTLY)));
        assert_eq!(understand(&["queue"]).unwrap(), (queue(), Work::Search(SHORTLY)));
        let seconds = Work::Search(Duration::from_secs(5));
        assert_eq!(understand(&["queue", "5"]).unwrap(), (queue(), seconds));
        let input = Work::Repeat("found/crash-5".into());
        assert_eq!(understand(&["queue", "found/crash-5"]).unwrap(), (queue(), input));
        assert!(understand(&["queue", "5", "6"]).is_err());
    }

    #[test]
    fn steps_are_not_shown_and_results_are() {
        assert!(is_step("#2914\tNEW    cov: 300 ft: 900 corp: 3/9b lim: 4 exec/s: 0 rss: 27Mb"));
        assert!(is_step("\"\\000\\001\" # Uses: 9"));
        assert!(is_step("\tNEW_FUNC[1/2]: 0x55fc92828091"));
        assert!(!is_step("#103978\tDONE   cov: 807 ft: 2926 corp: 459/35Kb"));
        assert!(!is_step("Done 103978 runs in 11 second(s)"));
    }

    #[test]
    fn the_input_that_broke_something_is_named() {
        let line = "artifact_prefix='/x/'; Test unit written to /x/crash-0a1b";
        assert_eq!(input(line), Some("/x/crash-0a1b".into()));
        assert_eq!(input("Done 1 runs in 0 second(s)"), None);
    }
}
