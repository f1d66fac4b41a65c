//! Where the kernel's source comes from: Debian's package, or a pinned upstream archive.
//!
//! Only files that an x86 build can use are unpacked; the others are more than half of the tree.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::cache;
use crate::progress::{Step, say};

const DEBIAN_PACKAGE: &str = "linux-source-6.12";
const DEBIAN_ARCHIVE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Files that are not unpacked, as patterns of tar. Kconfig and make files stay, because the
/// top-level ones read all of them, also `arch/*/crypto/Kconfig` and `arch/um/scripts`.
const LEFT_OUT: [&str; 29] = [
    "*/arch/alpha/[!c]*",
    "*/arch/arc/[!c]*",
    "*/arch/arm/[!c]*",
    "*/arch/arm64/[!c]*",
    "*/arch/csky/[!c]*",
    "*/arch/hexagon/[!c]*",
    "*/arch/loongarch/[!c]*",
    "*/arch/m68k/[!c]*",
    "*/arch/microblaze/[!c]*",
    "*/arch/mips/[!c]*",
    "*/arch/nios2/[!c]*",
    "*/arch/openrisc/[!c]*",
    "*/arch/parisc/[!c]*",
    "*/arch/powerpc/[!c]*",
    "*/arch/riscv/[!c]*",
    "*/arch/s390/[!c]*",
    "*/arch/sh/[!c]*",
    "*/arch/sparc/[!c]*",
    "*/arch/xtensa/[!c]*",
    "linux-*/Documentation/[!K]*/*",
    "linux-*/drivers/gpu/*.[ch]",
    "linux-*/drivers/iio/*.[ch]",
    "linux-*/drivers/infiniband/*.[ch]",
    "linux-*/drivers/media/*.[ch]",
    "linux-*/drivers/net/wireless/*.[ch]",
    "linux-*/drivers/staging/*.[ch]",
    "linux-*/sound/*.[ch]",
    "linux-*/tools/perf/*",
    "linux-*/tools/testing/*",
];

/// A source archive, and the version or hash that pins it.
#[derive(Debug, Clone)]
pub enum Source {
    /// Debian's package, pinned by its version.
    Debian {
        /// The package's version.
        version: String,
    },
    /// An upstream archive that must have this SHA-256.
    Tarball {
        /// `linux-6.x.y.tar.xz`.
        path: PathBuf,
        /// In lower-case hexadecimal digits.
        sha256: String,
    },
}

/// A change to the source, for `patch -p1`.
#[derive(Debug, Clone, Copy)]
pub struct Patch<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// A unified difference; what stands before it says why.
    pub text: &'a str,
}

impl Source {
    /// `$BULKHEAD_KERNEL_TARBALL` with `$BULKHEAD_KERNEL_SHA256`, else Debian's package.
    ///
    /// # Errors
    /// When only one of the two is set, or the package is not installed.
    pub fn from_environment() -> Result<Self> {
        let (path, sha256) =
            (env::var_os("BULKHEAD_KERNEL_TARBALL"), env::var("BULKHEAD_KERNEL_SHA256").ok());
        match (path, sha256) {
            (Some(path), Some(sha256)) => Self::tarball(path.into(), &sha256),
            (None, None) => Self::debian(),
            _ => bail!("set both BULKHEAD_KERNEL_TARBALL and BULKHEAD_KERNEL_SHA256, or neither"),
        }
    }

    /// A pinned archive.
    ///
    /// # Errors
    /// When the sum is not 64 hexadecimal digits.
    pub fn tarball(path: PathBuf, sha256: &str) -> Result<Self> {
        let digits = sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
        ensure!(digits, "not a SHA-256 of 64 hexadecimal digits: {sha256}");
        Ok(Self::Tarball { path, sha256: sha256.to_ascii_lowercase() })
    }

    fn debian() -> Result<Self> {
        let output = Command::new("dpkg-query")
            .args(["-W", "-f", "${db:Status-Status} ${Version}", DEBIAN_PACKAGE])
            .output()
            .context("run dpkg-query to find the kernel source package")?;
        let text = String::from_utf8_lossy(&output.stdout);
        match text.strip_prefix("installed ") {
            Some(version) => Ok(Self::Debian { version: version.to_owned() }),
            None => bail!(
                "the package {DEBIAN_PACKAGE} is not installed: apt-get install {DEBIAN_PACKAGE}, or \
                 set BULKHEAD_KERNEL_TARBALL and BULKHEAD_KERNEL_SHA256"
            ),
        }
    }

    /// The string that represents the source in the hash of a build's inputs.
    #[must_use]
    pub fn identity(&self) -> String {
        match self {
            Self::Debian { version } => format!("{DEBIAN_PACKAGE} {version}"),
            Self::Tarball { sha256, .. } => format!("sha256 {sha256}"),
        }
    }

    /// Unpacks the source into the cache and changes it, unless it is there; returns its directory.
    ///
    /// # Errors
    /// When the archive is missing, has another sum, or tar fails; when a patch does not apply.
    pub fn unpack(&self, cache: &Path, patches: &[Patch<'_>]) -> Result<PathBuf> {
        let mut hash = Sha256::new();
        hash.update(self.identity());
        LEFT_OUT.iter().for_each(|pattern| hash.update(pattern));
        patches.iter().for_each(|patch| hash.update(patch.text));
        let name = format!("source-{:.16}", hex(&hash.finalize()));
        let tree = cache.join(&name);
        let _lock = cache::lock(cache, &name, || say("waiting for another unpacking"))?;
        if tree.exists() {
            return Ok(tree);
        }
        let archive = self.archive();
        let step = Step::start(format!("unpack {}", archive.display()));
        self.verify()?;
        cache::publish(&tree, |partial| {
            untar(archive, partial)?;
            patches.iter().try_for_each(|patch| apply(patch, partial))
        })?;
        step.done("unpacked");
        Ok(tree)
    }

    fn archive(&self) -> &Path {
        match self {
            Self::Debian { .. } => Path::new(DEBIAN_ARCHIVE),
            Self::Tarball { path, .. } => path,
        }
    }

    fn verify(&self) -> Result<()> {
        let Self::Tarball { path, sha256 } = self else { return Ok(()) };
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut hash = Sha256::new();
        io::copy(&mut file, &mut hash).with_context(|| format!("read {}", path.display()))?;
        let found = hex(&hash.finalize());
        ensure!(found == *sha256, "{} has SHA-256 {found}, not {sha256}", path.display());
        Ok(())
    }
}

fn untar(archive: &Path, directory: &Path) -> Result<()> {
    let output = Command::new("tar")
        .args(["-x", "--strip-components=1", "--no-same-owner", "-f"])
        .arg(archive)
        .arg("-C")
        .arg(directory)
        .args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}")))
        .output()
        .context("run tar")?;
    let reason = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tar cannot unpack {}: {reason}", archive.display());
    ensure!(fs::exists(directory.join("Kconfig"))?, "{} holds no kernel source", archive.display());
    Ok(())
}

/// Applies a patch exactly: hunks that fit only nearby are refused, because they may be in a place
/// that means something else.
fn apply(patch: &Patch<'_>, tree: &Path) -> Result<()> {
    let mut child = Command::new("patch")
        .args(["--strip=1", "--fuzz=0", "--batch", "--forward", "--reject-file=-", "-d"])
        .arg(tree)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("run patch (apt-get install patch)")?;
    let mut input = child.stdin.take().context("patch has no input")?;
    input.write_all(patch.text.as_bytes()).context("write to patch")?;
    drop(input);
    let output = child.wait_with_output().context("wait for patch")?;
    let words = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{} does not apply to the kernel's source: {words}",
        patch.name
    );
    Ok(())
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUM_OF_ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn archive_with_another_sum_is_refused_and_both_sums_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("linux.tar");
        fs::write(&path, "abc").unwrap();
        Source::tarball(path.clone(), SUM_OF_ABC).unwrap().verify().unwrap();
        let error = Source::tarball(path, &"0".repeat(64)).unwrap().verify().unwrap_err();
        assert!(error.to_string().contains(SUM_OF_ABC), "{error}");
    }

    #[test]
    fn sum_must_be_hexadecimal() {
        assert!(Source::tarball("x".into(), "abc").is_err());
        assert!(Source::tarball("x".into(), &"g".repeat(64)).is_err());
    }

    #[test]
    fn a_patch_is_applied_exactly_or_refused_by_its_name() {
        let tree = tempfile::tempdir().unwrap();
        let file = tree.path().join("file");
        let text = "--- a/file\n+++ b/file\n@@ -1,3 +1,3 @@\n one\n-two\n+deux\n three\n";
        let patch = Patch { name: "french.patch", text };
        fs::write(&file, "one\ntwo\nthree\n").unwrap();
        apply(&patch, tree.path()).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "one\ndeux\nthree\n");
        for other in ["one\ndeux\nthree\n", "one\ntwo\n3\n", "zero\n"] {
            fs::write(&file, other).unwrap();
            let error = apply(&patch, tree.path()).unwrap_err().to_string();
            assert!(error.contains("french.patch does not apply"), "{error}");
            assert_eq!(fs::read_to_string(&file).unwrap(), other);
        }
    }

    #[test]
    fn archive_without_a_kernel_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("linux.tar");
        fs::create_dir(directory.path().join("linux-1")).unwrap();
        let tar = Command::new("tar")
            .current_dir(directory.path())
            .args(["-cf", "linux.tar", "linux-1"])
            .status();
        assert!(tar.unwrap().success());
        let error = untar(&path, directory.path()).unwrap_err().to_string();
        assert!(error.contains("holds no kernel source"), "{error}");
    }
}
