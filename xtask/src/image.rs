//! `cargo xtask image`: all binaries, the guest kernel and the initramfs, laid out in `target/dist` as
//! they would be installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use guest_image::source::Source;
use guest_image::{initramfs, kernel};

use crate::cargo::{self, root};
use crate::clock::{Clock, both};
use crate::packages;

const AGENT: &str = "bulkhead-agent";
const PACKAGES: [&str; 8] =
    ["build", "--release", "-p", "bulkhead", "-p", "bulkhead-vmm", "-p", "bulkhead-agent"];
const PROGRAMS: [&str; 4] = ["bulkhead", "bulkhead-stand-in", "bulkhead-vmm", "bulkhead-fs"];

/// Where everything is laid out.
pub(crate) fn dist() -> PathBuf {
    root().join("target/dist")
}

/// Builds whatever is out of date. Programs and kernel are built in parallel, which keeps every
/// processor busy to the end.
pub(crate) fn build(clock: &Clock) -> Result<()> {
    clock.step("Debian packages", packages::ensure)?;
    let (bin, share) = (dist().join("bin"), dist().join("share/bulkhead"));
    for directory in [&bin, &share] {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    let (artifacts, kernel) = both(
        || clock.step("programs", || cargo::build(&PACKAGES)),
        || {
            let build = || kernel::build(kernel::guest(), &Source::from_environment()?);
            clock.step("guest kernel", build)
        },
    )?;
    let built = |name: &str| {
        let found = artifacts.iter().find(|artifact| artifact.target == name);
        found.with_context(|| format!("cargo built no program {name}"))
    };
    for program in PROGRAMS {
        install(&built(program)?.executable, &bin.join(program))?;
    }
    install(&kernel.vmlinux, &share.join("vmlinux"))?;
    install(&kernel.modules, &share.join("modules"))?;
    install(&kernel.symbols, &share.join("System.map"))?;
    install(&root().join("docs/config.toml"), &share.join("config.toml"))?;
    let agent = &built(AGENT)?.executable;
    clock.step("initramfs", || initramfs::write(agent, &share.join("initramfs.cpio")))?;
    Ok(())
}

/// Copies to a new name and renames it, so that a running program is not overwritten.
pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    let partial = to.with_extension("partial");
    fs::copy(from, &partial).with_context(|| format!("copy {}", from.display()))?;
    fs::rename(&partial, to).with_context(|| format!("rename to {}", to.display()))
}
