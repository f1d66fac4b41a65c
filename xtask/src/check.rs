//! `cargo xtask check`: what a change must pass before anybody reads it.

use std::process::ExitCode;

use anyhow::{Result, bail};
use guest_image::progress::say;

use crate::cargo::{cargo, succeed};
use crate::clock::Clock;
use crate::tidy;

/// Runs every check, then fails if any did.
pub(crate) fn run(clock: &mut Clock) -> Result<ExitCode> {
    let results = [
        clock.step("format", || succeed(cargo().args(["fmt", "--all", "--check"]))),
        clock.step("clippy", || {
            let lints =
                ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
            succeed(cargo().args(lints))
        }),
        clock.step("documentation", || {
            let rustdoc =
                ["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"];
            succeed(cargo().args(rustdoc).env("RUSTDOCFLAGS", "-D warnings"))
        }),
        clock.step("rules of the repository", rules),
    ];
    let mut failed = 0;
    for error in results.into_iter().filter_map(Result::err) {
        say(&format!("error: {error:#}"));
        failed += 1;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn rules() -> Result<()> {
    let broken = tidy::broken()?;
    if !broken.is_empty() {
        bail!("{} rules broken:\n  {}", broken.len(), broken.join("\n  "));
    }
    Ok(())
}
