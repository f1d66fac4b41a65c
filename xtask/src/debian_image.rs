//! `cargo xtask debian`: makes an image that the suites use in addition to busybox: a minimal
//! Debian of this machine's release, made by debootstrap from the archive that apt is configured
//! for.
//!
//! The test host has no network, so the image is made before the suites run: once, in the cache, by
//! root. The suites use a copy in `target`. debootstrap mounts file systems and starts processes;
//! both are in namespaces that end with it, and it ends with this process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use guest_image::cache;
use guest_image::progress::{Step, say};

use crate::cargo::{output, root, succeed};
use crate::image::install;
use crate::packages;

/// Increased when this file makes a different image from the same inputs.
const RECIPE: &str = "1";
const VARIANT: &str = "--variant=minbase";
/// A program to run that is larger than a shell.
const INCLUDED: &str = "--include=python3-minimal";
/// Files that are not archived, as patterns of tar: those that differ between machines, and those
/// that no test reads. Directories that belong to a package stay.
const LEFT_OUT: [&str; 12] = [
    "./dev/*",
    "./etc/hostname",
    "./etc/resolv.conf",
    "./usr/share/doc/*",
    "./usr/share/info/*",
    "./usr/share/locale/*",
    "./usr/share/man/*",
    "./var/cache/apt/*.bin",
    "./var/cache/apt/archives/*.deb",
    "./var/lib/apt/lists/*_*",
    "./var/log/*.log",
    "./var/log/apt/*",
];
/// However this program ends, what it starts behind these words ends with it, and so do its mounts.
const CONFINED: [&str; 8] =
    ["--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child"];
/// How much of debootstrap's messages an error shows.
const LOG_LINES: usize = 25;

/// Makes the image unless the cache has it, and puts it where the suites look.
pub(crate) fn build() -> Result<()> {
    install(&archive()?, &place())
}

/// The image in the cache, which is made if it is not there. Its directory has the hash of what it
/// was made from in its name.
pub(crate) fn archive() -> Result<PathBuf> {
    packages::ensure()?;
    let suite = suite(&fs::read_to_string("/etc/os-release").context("/etc/os-release")?)?;
    let cache = cache::directory()?;
    let key = cache::key([RECIPE, VARIANT, INCLUDED, &suite].into_iter().chain(LEFT_OUT));
    let entry = cache.join(format!("debian-{key:.16}"));
    let step = format!("debootstrap {suite}");
    once("debian", &entry, "debian.tar", &step, |partial| make(&suite, partial))
}

/// A file of an image in the cache, whose directory `make` fills if it is not there.
pub(crate) fn once(
    name: &str,
    entry: &Path,
    file: &str,
    step: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let file = entry.join(file);
    if !file.exists() {
        let waiting = || say("waiting for another making of the same image");
        let _lock = cache::lock(&cache::directory()?, name, waiting)?;
        if !file.exists() {
            ensure!(packages::is_root()?, "only root can make an image of Debian");
            let step = Step::start(step.to_owned());
            cache::publish(entry, make)?;
            step.done("made");
        }
    }
    Ok(file)
}

/// Where the suites look.
fn place() -> PathBuf {
    root().join("target/debian.tar")
}

fn make(suite: &str, partial: &Path) -> Result<()> {
    let files = partial.join("root");
    debootstrap(suite, &files)?;
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--numeric-owner", "--file"]);
    tar.arg(partial.join("debian.tar")).arg("--directory").arg(&files);
    succeed(tar.args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}"))).arg("."))?;
    cache::remove(&files)
}

fn debootstrap(suite: &str, files: &Path) -> Result<()> {
    let mut command = Command::new("setpriv");
    command.args(CONFINED).args(["debootstrap", VARIANT, INCLUDED, suite]);
    load("debootstrap", command.arg(files).arg(mirror(suite)?))
}

/// Runs a shell script that installs packages: `$0` is the root file system.
pub(crate) fn install_packages(script: &str, files: &Path, packages: &[&str]) -> Result<()> {
    let mut command = Command::new("setpriv");
    command.args(CONFINED).args(["sh", "-ec", script]).arg(files).args(packages);
    load("apt-get", &mut command)
}

/// Runs a program that loads packages from where apt of this machine has them.
fn load(name: &str, command: &mut Command) -> Result<()> {
    command.env("LC_ALL", "C");
    if let Some(proxy) = proxy()? {
        command.env("http_proxy", proxy);
    }
    let ended = command.output().context("run setpriv (package util-linux)")?;
    let messages = String::from_utf8_lossy(&ended.stdout);
    let lines: Vec<&str> = messages.lines().collect();
    let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
    let errors = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.success(), "{name} failed ({}):\n{last}\n{errors}", ended.status);
    Ok(())
}

/// The release that this machine runs.
fn suite(os_release: &str) -> Result<String> {
    let line = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = line.map(|name| name.trim_matches('"')).filter(|name| !name.is_empty());
    Ok(name.context("/etc/os-release has no VERSION_CODENAME")?.to_owned())
}

/// The archive that apt has this release from.
fn mirror(suite: &str) -> Result<String> {
    let known = || -> Result<Option<String>> {
        let mut targets = Command::new("apt-get");
        targets.args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]);
        targets.args(["Origin: Debian", "Component: main", &format!("Codename: {suite}")]);
        Ok(output(&mut targets)?.lines().next().map(str::to_owned))
    };
    if let Some(mirror) = known()? {
        return Ok(mirror);
    }
    // apt knows only archives whose package lists it has.
    succeed(Command::new("apt-get").arg("update"))?;
    match known()? {
        Some(mirror) => Ok(mirror),
        None => bail!("apt has no archive of Debian {suite} among its sources"),
    }
}

/// The HTTP proxy that apt uses.
fn proxy() -> Result<Option<String>> {
    let mut config = Command::new("apt-config");
    config.args(["dump", "--no-empty", "--format", "%v%n", "Acquire::http::Proxy"]);
    Ok(output(&mut config)?.lines().next().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_is_read_with_and_without_quotes() {
        assert_eq!(suite("ID=debian\nVERSION_CODENAME=bookworm\n").unwrap(), "bookworm");
        assert_eq!(suite("VERSION_CODENAME=\"trixie\"\n").unwrap(), "trixie");
        assert!(suite("ID=debian\n").is_err());
    }
}
