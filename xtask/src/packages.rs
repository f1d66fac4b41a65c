//! The Debian packages that the repository needs besides Rust; installed if this process is root.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::succeed;

const NEEDED: [&str; 43] = [
    "aardvark-dns",
    "bc",
    "binutils",
    "bison",
    "busybox-static",
    "containernetworking-plugins",
    "crun",
    "dbus",
    "debootstrap",
    "docker.io",
    "dosfstools",
    "e2fsprogs",
    "flex",
    "g++",
    "gcc",
    "iperf3",
    "iproute2",
    "ipset",
    "kmod",
    "libc6-dev",
    "libelf-dev",
    "libseccomp-dev",
    "libssl-dev",
    "linux-source-6.12",
    "make",
    "netavark",
    "nftables",
    "patch",
    "pkgconf",
    "podman",
    "procps",
    "python3",
    "qemu-system-x86",
    "runc",
    "seabios",
    "squashfs-tools",
    "systemd",
    "tar",
    "tcpdump",
    "util-linux",
    "xfsprogs",
    "xz-utils",
    "zlib1g-dev",
];

/// Installs missing packages, or fails with the list of what to install.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root()? {
        bail!(
            "missing Debian packages, install them as root: apt-get install {}",
            missing.join(" ")
        );
    }
    let mut install = Command::new("apt-get");
    install.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
    install.env("DEBIAN_FRONTEND", "noninteractive");
    succeed(Command::new("apt-get").arg("update"))?;
    succeed(&mut install)
}

/// Whether this process is root.
pub(crate) fn is_root() -> Result<bool> {
    let user = Command::new("id").arg("-u").output().context("run id")?;
    Ok(user.stdout == b"0\n")
}

fn missing() -> Result<Vec<&'static str>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${Package}\n"])
        .args(NEEDED)
        .output()
        .context("run dpkg-query (is this Debian?)")?;
    Ok(not_installed(&String::from_utf8_lossy(&output.stdout)))
}

fn not_installed(listing: &str) -> Vec<&'static str> {
    let installed: BTreeSet<&str> =
        listing.lines().filter_map(|line| line.strip_prefix("installed ")).collect();
    NEEDED.into_iter().filter(|package| !installed.contains(package)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_packages_count_as_missing() {
        let mut listing: String = NEEDED.iter().map(|name| format!("installed {name}\n")).collect();
        assert!(not_installed(&listing).is_empty());
        listing = listing.replace("installed bc\n", "config-files bc\n");
        assert_eq!(not_installed(&listing), ["bc"]);
    }
}
