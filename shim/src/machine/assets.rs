//! The files that a pod is started from: three programs beside this one, for which tests name others
//! by environment variables, and the guest's kernel, its modules and its initramfs, which the policy
//! names.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::policy::GuestPolicy;

/// A file of the installation that cannot be used.
#[derive(Debug, Error)]
#[error(
    "cannot use {what} {}: build it with \"cargo xtask image\", or name another with {name}",
    .path.display()
)]
pub struct AssetError {
    what: &'static str,
    path: PathBuf,
    /// What names another file.
    name: &'static str,
    source: io::Error,
}

/// What a pod is started from.
#[derive(Debug)]
pub struct Assets {
    /// The monitor's program.
    pub monitor: PathBuf,
    /// The file server's program.
    pub file_server: PathBuf,
    /// The guest kernel, open.
    pub kernel: File,
    /// The guest's initramfs, open.
    pub initramfs: File,
    /// The modules of the guest's kernel, open.
    pub modules: File,
}

impl Assets {
    /// Finds everything.
    ///
    /// # Errors
    /// Names the first file that is missing, and the command that builds it.
    pub fn find(guest: &GuestPolicy) -> Result<Self, AssetError> {
        let named = |variable: &str| env::var_os(variable).map(PathBuf::from);
        Self::find_beside(&beside(), guest, named)
    }

    /// Finds everything in an installation; `named` returns the program that an environment
    /// variable names.
    pub(crate) fn find_beside(
        bin: &Path,
        guest: &GuestPolicy,
        named: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, AssetError> {
        let program = |what, name, default| {
            open(what, name, named(name).unwrap_or_else(|| bin.join(default))).map(|it| it.0)
        };
        let (kernel, initramfs) = (from(bin, &guest.kernel), from(bin, &guest.initramfs));
        Ok(Self {
            kernel: open("guest kernel", "guest.kernel", kernel)?.1,
            initramfs: open("initramfs", "guest.initramfs", initramfs)?.1,
            modules: open("modules", "guest.modules", from(bin, &guest.modules))?.1,
            monitor: program("monitor", "BULKHEAD_VMM", "bulkhead-vmm")?,
            file_server: program("file server", "BULKHEAD_FS", "bulkhead-fs")?,
        })
    }
}

fn open(
    what: &'static str,
    name: &'static str,
    path: PathBuf,
) -> Result<(PathBuf, File), AssetError> {
    match File::open(&path) {
        Ok(file) => Ok((path, file)),
        Err(source) => Err(AssetError { what, path, name, source }),
    }
}

/// A path that starts at the program's directory unless it is absolute. That directory has no links
/// in it, so that its parent is found by its name.
fn from(bin: &Path, path: &Path) -> PathBuf {
    let (mut from, mut path) = (bin, path);
    while let Ok(rest) = path.strip_prefix("..") {
        from = from.parent().unwrap_or(from);
        path = rest;
    }
    from.join(path)
}

/// The path of the stand-in's program.
///
/// # Errors
/// When it is missing.
pub fn stand_in() -> Result<PathBuf, AssetError> {
    let (what, name) = ("program of the stand-in", "BULKHEAD_STAND_IN");
    let path = env::var_os(name).map_or_else(|| beside().join("bulkhead-stand-in"), Into::into);
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(AssetError { what, path, name, source }),
    }
}

/// The directory of this program.
fn beside() -> PathBuf {
    let exe = env::current_exe().unwrap_or_default();
    exe.parent().unwrap_or(Path::new("/")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_file_is_named_with_what_makes_it() {
        let dist = tempfile::tempdir().unwrap();
        let (bin, share) = (dist.path().join("bin"), dist.path().join("share/bulkhead"));
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(&share).unwrap();
        for (path, what) in [
            (share.join("vmlinux"), "guest kernel"),
            (share.join("initramfs.cpio"), "initramfs"),
            (share.join("modules"), "modules"),
            (bin.join("bulkhead-vmm"), "monitor"),
            (bin.join("bulkhead-fs"), "file server"),
        ] {
            let words = Assets::find_beside(&bin, &GuestPolicy::default(), |_| None)
                .unwrap_err()
                .to_string();
            assert!(
                words.starts_with(&format!("cannot use {what} {}: ", path.display())),
                "{words}"
            );
            assert!(words.contains("cargo xtask image"), "{words}");
            fs::write(path, "").unwrap();
        }
        Assets::find_beside(&bin, &GuestPolicy::default(), |_| None).unwrap();
    }

    #[test]
    fn the_policy_names_other_files() {
        let bin = Path::new("/nonexistent/bin");
        for (kernel, path) in
            [("/my/kernel", "/my/kernel"), ("../share/full", "/nonexistent/share/full")]
        {
            let guest = GuestPolicy { kernel: kernel.into(), ..GuestPolicy::default() };
            let words = Assets::find_beside(bin, &guest, |_| None).unwrap_err().to_string();
            assert!(words.contains(&format!("guest kernel {path}: ")), "{words}");
            assert!(words.ends_with("guest.kernel"), "{words}");
        }
    }
}
