//! Debian's kernel: apt fetches the package, and it is unpacked into the cache but not installed,
//! so the machine keeps its own kernel.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use guest_image::cache;
use guest_image::progress::{Step, say};

use crate::kernel::{Kernel, Modules};

/// Increased when this file makes something different from the same package.
const RECIPE: &str = "1";
/// Packages that depend on the newest kernel: of the version that the built kernels have, or of the
/// release.
const NAMES: [&str; 2] = ["linux-image-6.12-amd64", "linux-image-amd64"];
/// Files to unpack, as patterns of tar in which `*` is one name. The other files, most of the
/// package, are for hardware that the test host does not have.
const KEPT: [&str; 16] = [
    "./boot/vmlinuz-*",
    "./lib/modules/*/modules.*",
    "./lib/modules/*/kernel/arch",
    "./lib/modules/*/kernel/block",
    "./lib/modules/*/kernel/crypto",
    "./lib/modules/*/kernel/drivers/block",
    "./lib/modules/*/kernel/drivers/char/hw_random",
    "./lib/modules/*/kernel/drivers/crypto/ccp",
    "./lib/modules/*/kernel/drivers/net/*.ko.xz",
    "./lib/modules/*/kernel/drivers/net/ipvlan",
    "./lib/modules/*/kernel/drivers/net/vxlan",
    "./lib/modules/*/kernel/drivers/vhost",
    "./lib/modules/*/kernel/fs",
    "./lib/modules/*/kernel/lib",
    "./lib/modules/*/kernel/net",
    "./lib/modules/*/kernel/virt",
];
/// The modules that are needed to mount the machine's root and the overlay, in the order of
/// loading.
const FIRST: [&str; 5] = [
    "kernel/fs/netfs/netfs.ko",
    "kernel/net/9p/9pnet.ko",
    "kernel/net/9p/9pnet_virtio.ko",
    "kernel/fs/9p/9p.ko",
    "kernel/fs/overlayfs/overlay.ko",
];

/// Gets the kernel unless the cache has it.
///
/// # Errors
/// When there is no such package, apt cannot fetch it, or it holds something else than expected.
pub(crate) fn kernel() -> Result<Kernel> {
    let package = package()?;
    let cache = cache::directory()?;
    let key = cache::key([RECIPE, &package].into_iter().chain(KEPT).chain(FIRST));
    let entry = cache.join(format!("kernel-debian-{key:.16}"));
    if !entry.exists() {
        let waiting = || say("waiting for another unpacking of the same kernel");
        let _lock = cache::lock(&cache, "kernel-debian", waiting)?;
        if !entry.exists() {
            let step = Step::start(format!("fetch and unpack {package}"));
            cache::publish(&entry, |partial| unpack(&package, partial))?;
            step.done("done");
        }
    }
    let directory = only(&entry.join("lib/modules"))?;
    let first = FIRST.map(|module| directory.join(module)).into();
    Ok(Kernel { image: only(&entry.join("boot"))?, modules: Some(Modules { directory, first }) })
}

/// The newest package that apt knows, as `name=version`.
fn package() -> Result<String> {
    for name in NAMES {
        let mut show = Command::new("apt-cache");
        show.args(["show", "--no-all-versions", name]).stderr(Stdio::null());
        let output = show.output().context("run apt-cache")?;
        if let Some(package) = needed(&String::from_utf8_lossy(&output.stdout)) {
            return Ok(package);
        }
    }
    bail!("apt knows no package {}", NAMES.join(" or "))
}

/// The package that a metapackage depends on.
fn needed(description: &str) -> Option<String> {
    let depends = description.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let (name, version) = depends.split_once(" (= ")?;
    Some(format!("{name}={}", version.split(')').next()?))
}

fn unpack(package: &str, directory: &Path) -> Result<()> {
    let archive = directory.join("download");
    fs::create_dir(&archive)?;
    let mut fetch = Command::new("apt-get");
    // As root, apt would download as another user, who may not write here.
    fetch.args(["--quiet", "--option", "APT::Sandbox::User=root", "download", package]);
    succeed(fetch.current_dir(&archive))?;
    untar(&only(&archive)?, directory)?;
    cache::remove(&archive)?;
    let modules = only(&directory.join("lib/modules"))?;
    for module in FIRST {
        let compressed = modules.join(module).with_extension("ko.xz");
        succeed(Command::new("xz").arg("--decompress").arg(compressed))?;
    }
    let release = modules.file_name().context("cannot read the kernel's modules")?;
    succeed(Command::new("depmod").arg("--basedir").arg(directory).arg(release))
}

fn untar(package: &Path, directory: &Path) -> Result<()> {
    let mut unpacking = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("run dpkg-deb")?;
    let files = unpacking.stdout.take().context("dpkg-deb has no output")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--no-same-owner", "--wildcards", "--no-wildcards-match-slash"]);
    let result = succeed(tar.arg("--directory").arg(directory).args(KEPT).stdin(files));
    let status = unpacking.wait().context("wait for dpkg-deb")?;
    ensure!(status.success(), "dpkg-deb cannot read {}: {status}", package.display());
    result
}

/// Runs a command that must succeed; its output is part of the error.
fn succeed(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed ({}): {}", output.status, said.trim());
    Ok(())
}

/// The one file of a directory.
fn only(directory: &Path) -> Result<PathBuf> {
    let files = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let files: Vec<PathBuf> = files.map(|file| Ok(file?.path())).collect::<io::Result<_>>()?;
    match <[PathBuf; 1]>::try_from(files) {
        Ok([file]) => Ok(file),
        Err(files) => bail!("{} holds {} files, not one", directory.display(), files.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_is_the_one_that_the_newest_depends_on() {
        let description = "Package: linux-image-6.12-amd64\n\
            Version: 6.12.9-1\nDepends: linux-image-6.12.9-amd64 (= 6.12.9-1)\n";
        assert_eq!(needed(description).as_deref(), Some("linux-image-6.12.9-amd64=6.12.9-1"));
        assert_eq!(needed(""), None);
    }

    #[test]
    fn only_one_file_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        assert!(only(directory.path()).is_err());
        fs::write(directory.path().join("one"), "").unwrap();
        assert_eq!(only(directory.path()).unwrap(), directory.path().join("one"));
        fs::write(directory.path().join("two"), "").unwrap();
        assert!(only(directory.path()).unwrap_err().to_string().contains("2 files"));
    }
}
