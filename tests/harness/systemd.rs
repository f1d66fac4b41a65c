//! A root file system whose init is Debian's systemd, made from the files installed on this
//! machine.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::bundle::install_busybox;

/// The packages that the files come from.
const PACKAGES: [&str; 2] = ["systemd", "libsystemd-shared"];
/// The files that are needed to boot to a target without logins.
const KEPT: [&str; 7] = [
    "/bin/journalctl",
    "/bin/systemctl",
    "/bin/systemd-",
    "/lib/systemd/",
    "/usr/lib/sysusers.d/",
    "/usr/lib/tmpfiles.d/",
    "/usr/lib/x86_64-linux-gnu/systemd/",
];
/// Programs whose libraries include those of all the others.
const LINKED: [&str; 4] = [
    "/bin/systemctl",
    "/bin/systemd-tmpfiles",
    "/lib/systemd/systemd",
    "/lib/systemd/systemd-journald",
];

/// Makes the root file system in `directory`; its init is `/lib/systemd/systemd`.
///
/// # Errors
/// When systemd is not installed, or a file cannot be copied.
pub fn root(directory: &Path) -> Result<PathBuf> {
    let root = directory.join("systemd-root");
    for name in ["dev", "etc/systemd/system", "proc", "run", "sys", "tmp", "usr", "var"] {
        fs::create_dir_all(root.join(name))?;
    }
    for name in ["bin", "lib", "lib64", "sbin"] {
        fs::create_dir_all(root.join("usr").join(name))?;
        symlink(Path::new("usr").join(name), root.join(name))?;
    }
    let listed = lines(Command::new("dpkg-query").arg("--listfiles").args(PACKAGES))?;
    let wanted = |file: &&String| {
        KEPT.iter().any(|kept| file.starts_with(kept)) && !file.starts_with("/lib/systemd/catalog")
    };
    let mut files: BTreeSet<PathBuf> = listed.iter().filter(wanted).map(PathBuf::from).collect();
    for line in lines(Command::new("ldd").args(LINKED))? {
        let library = line.split_whitespace().find(|word| word.starts_with('/'));
        let library = library.filter(|word| !word.ends_with(':')).map(PathBuf::from);
        // A library's name is a link to a file with its version.
        files.extend(library.iter().map(fs::canonicalize).collect::<Result<Vec<_>, _>>()?);
        files.extend(library);
    }
    for file in files.iter().filter(|file| !file.is_dir() || file.is_symlink()) {
        copy(file, &root).with_context(|| file.display().to_string())?;
    }
    install_busybox(&root, &["cat", "mount", "sh", "umount"])?;
    for name in ["group", "passwd"] {
        fs::copy(Path::new("/etc").join(name), root.join("etc").join(name)).context(name)?;
    }
    // Must be empty: without the file, systemd would treat this as a first boot.
    fs::write(root.join("etc/machine-id"), "").context("machine-id")?;
    let units = root.join("etc/systemd/system");
    symlink("/lib/systemd/system/multi-user.target", units.join("default.target"))?;
    // logind needs a message bus.
    symlink("/dev/null", units.join("systemd-logind.service"))?;
    Ok(root)
}

/// Copies a file, or a symbolic link as such, to the resolved path of its directory.
fn copy(file: &Path, root: &Path) -> Result<()> {
    let directory = fs::canonicalize(file.parent().context("no directory")?)?;
    let target = root.join(directory.strip_prefix("/")?);
    fs::create_dir_all(&target)?;
    let target = target.join(file.file_name().context("no name")?);
    if file.is_symlink() {
        // A link may be in both lists.
        if !target.is_symlink() {
            symlink(fs::read_link(file)?, target)?;
        }
    } else {
        fs::copy(file, target)?;
    }
    Ok(())
}

fn lines(command: &mut Command) -> Result<Vec<String>> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {errors}");
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}
