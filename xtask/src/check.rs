//! `cargo xtask check`: the checks that a change must pass before review.

use std::process::ExitCode;

use anyhow::{Result, bail};
use guest_image::progress::say;

use crate::cargo::{cargo, succeed};
use crate::clock::Clock;
use crate::fuzz;
use crate::tidy;

/// A check's name and its function.
type Check = (&'static str, fn() -> Result<()>);

const CHECKS: [Check; 4] =
    [("format", format), ("clippy", clippy), ("documentation", documentation), ("rules", rules)];

/// Runs the named checks, or all of them. Runs all even if one fails, and fails if any did.
pub(crate) fn run(names: &[String], clock: &Clock) -> Result<ExitCode> {
    let known = |name: &String| CHECKS.iter().any(|(check, _)| check == name);
    if let Some(unknown) = names.iter().find(|name| !known(name)) {
        bail!("no check {unknown}: there are format, clippy, documentation and rules");
    }
    let mut status = ExitCode::SUCCESS;
    for (name, check) in CHECKS {
        if !names.is_empty() && !names.iter().any(|wanted| wanted == name) {
            continue;
        }
        if let Err(error) = clock.step(name, check) {
            say(&format!("error: {error:#}"));
            status = ExitCode::FAILURE;
        }
    }
    Ok(status)
}

fn format() -> Result<()> {
    succeed(cargo().args(["fmt", "--all", "--check"]))?;
    succeed(cargo().args(["fmt", "--check"]).args(fuzz::MANIFEST))
}

fn clippy() -> Result<()> {
    let lints = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    succeed(cargo().args(lints))?;
    fuzz::lint()
}

fn documentation() -> Result<()> {
    let rustdoc = ["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"];
    succeed(cargo().args(rustdoc).env("RUSTDOCFLAGS", "-D warnings"))
}

fn rules() -> Result<()> {
    let broken = tidy::broken()?;
    if !broken.is_empty() {
        bail!("{} rules broken:\n  {}", broken.len(), broken.join("\n  "));
    }
    Ok(())
}
