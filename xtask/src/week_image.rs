//! The root file systems of the suite `week`: the small Debian of [`debian_image`] with packages
//! whose programs the suite uses, each as a file with an ext4 file system.
//!
//! apt installs the packages in the image, not on this machine, and starts no daemons. An image is
//! made once, in the cache, by root; the suite finds it through a link in `target`.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use guest_image::cache;

use crate::cargo::{output, root, succeed};
use crate::debian_image;

/// Increased when this file makes a different image from the same inputs.
const RECIPE: &str = "1";

/// An image of the suite.
#[derive(Debug)]
pub(crate) struct Image {
    name: &'static str,
    packages: &'static [&'static str],
}

/// The images: the first has what every run of the suite uses, the second what its long tests use.
pub(crate) static ALL: [Image; 2] =
    [Image { name: "few", packages: &FEW }, Image { name: "more", packages: &MORE }];

const FEW: [&str; 17] = [
    "acl",
    "apache2-utils",
    "attr",
    "gcc",
    "gdb",
    "git",
    "iproute2",
    "libc6-dev",
    "make",
    "nginx-light",
    "postgresql",
    "procps",
    "python3",
    "redis-server",
    "rsync",
    "sqlite3",
    "strace",
];

const MORE: [&str; 39] = [
    "buildah",
    "chromium",
    "chrony",
    "containerd",
    "cron",
    "dbus",
    "default-jdk-headless",
    "ffmpeg",
    "fuse-overlayfs",
    "gcc",
    "golang-go",
    "gunicorn",
    "haproxy",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "libc6-dev",
    "linux-perf",
    "make",
    "mariadb-server",
    "memcached",
    "nfs-common",
    "nfs-kernel-server",
    "nodejs",
    "npm",
    "openvpn",
    "podman",
    "procps",
    "python3-pika",
    "python3-pip",
    "python3-setuptools",
    "python3-venv",
    "python3-wheel",
    "rabbitmq-server",
    "rustc",
    "systemd",
    "systemd-sysv",
    "tcpdump",
    "wireguard-tools",
];

/// Installs packages; `$0` is the root file system. What it has in /dev is this machine's, like the
/// addresses of its name servers, and none of it stays.
const INSTALL: &str = r#"
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
touch "$0/etc/resolv.conf"
mount --bind /etc/resolv.conf "$0/etc/resolv.conf"
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
options='--option Dpkg::Options::=--force-unsafe-io --option Dpkg::Use-Pty=0'
chroot "$0" apt-get --quiet $options update
exec chroot "$0" apt-get --quiet $options install --yes --no-install-recommends "$@"
"#;

/// What the suite does not read: archives and lists of packages, documents, translations.
const LEFT_OUT: [&str; 6] = [
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
];

/// Makes the image unless the cache has it, and puts a link to it where the suite looks.
pub(crate) fn build(image: &Image) -> Result<()> {
    let archive = debian_image::archive()?;
    let base = archive.parent().and_then(Path::file_name).context("the Debian image")?;
    let base = base.to_string_lossy();
    let inputs = [RECIPE, INSTALL, &base, image.name].into_iter().chain(LEFT_OUT);
    let key = cache::key(inputs.chain(image.packages.iter().copied()));
    let name = format!("week-{}", image.name);
    let entry = cache::directory()?.join(format!("{name}-{key:.16}"));
    let step = format!("{} packages and what they need", image.packages.len());
    let file = debian_image::once(&name, &entry, "root.ext4", &step, |partial| {
        make(image, &archive, partial)
    })?;
    let place = place(image);
    let partial = place.with_extension("partial");
    if partial.is_symlink() {
        fs::remove_file(&partial).with_context(|| partial.display().to_string())?;
    }
    symlink(&file, &partial).with_context(|| partial.display().to_string())?;
    fs::rename(&partial, &place).with_context(|| place.display().to_string())
}

/// Where the suite looks.
fn place(image: &Image) -> PathBuf {
    root().join(format!("target/week-{}.ext4", image.name))
}

fn make(image: &Image, archive: &Path, partial: &Path) -> Result<()> {
    let files = partial.join("root");
    fs::create_dir(&files).with_context(|| files.display().to_string())?;
    let mut unpack = Command::new("tar");
    unpack.args(["--extract", "--numeric-owner", "--file"]).arg(archive);
    succeed(unpack.arg("--directory").arg(&files))?;
    // What a package's scripts ask before they start a daemon.
    let policy = files.join("usr/sbin/policy-rc.d");
    fs::write(&policy, "#!/bin/sh\nexit 101\n").context("policy-rc.d")?;
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o755)).context("policy-rc.d")?;
    debian_image::install_packages(INSTALL, &files, image.packages)?;
    fs::remove_file(&policy).context("policy-rc.d")?;
    LEFT_OUT.iter().try_for_each(|path| empty(&files.join(path)))?;
    file_system(&files, &partial.join("root.ext4"))?;
    cache::remove(&files)
}

/// Removes what a directory holds, not itself: it belongs to a package.
fn empty(directory: &Path) -> Result<()> {
    cache::remove(directory)?;
    fs::create_dir(directory).with_context(|| directory.display().to_string())
}

/// Makes an ext4 file system of a directory, in a sparse file that is a quarter larger.
fn file_system(files: &Path, file: &Path) -> Result<()> {
    let used = output(Command::new("du").args(["--summarize", "--block-size=1M"]).arg(files))?;
    let used = used.split_whitespace().next().context("du said nothing")?;
    let used: u64 = used.parse().with_context(|| format!("du said {used}"))?;
    let made = File::create(file).with_context(|| file.display().to_string())?;
    made.set_len((used + used / 4 + 64) << 20).with_context(|| file.display().to_string())?;
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d"]);
    succeed(command.arg(files).arg(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_sorted_and_no_two_images_have_a_name() {
        assert!(ALL.iter().all(|image| image.packages.is_sorted()));
        assert_ne!(place(&ALL[0]), place(&ALL[1]));
    }
}
