//! The files that a pod is started from: three programs beside this one, and the guest's kernel,
//! its modules and the initramfs in `../share/bulkhead/`. Environment variables can name other files.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A file of the installation that cannot be used.
#[derive(Debug, Error)]
#[error(
    "cannot use {what} {}: build it with \"cargo xtask image\", or name another with \
     {variable}",
    .path.display()
)]
pub struct AssetError {
    what: &'static str,
    path: PathBuf,
    variable: &'static str,
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
    pub fn find() -> Result<Self, AssetError> {
        Self::find_beside(&beside(), |variable| env::var_os(variable).map(PathBuf::from))
    }

    /// Finds everything in an installation; `named` returns the file that an environment variable
    /// names.
    pub(crate) fn find_beside(
        bin: &Path,
        named: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, AssetError> {
        let share = bin.parent().unwrap_or(bin).join("share/bulkhead");
        let open = |what, variable, default: PathBuf| -> Result<(PathBuf, File), AssetError> {
            let path = named(variable).unwrap_or(default);
            match File::open(&path) {
                Ok(file) => Ok((path, file)),
                Err(source) => Err(AssetError { what, path, variable, source }),
            }
        };
        Ok(Self {
            kernel: open("guest kernel", "BULKHEAD_KERNEL", share.join("vmlinux"))?.1,
            initramfs: open("initramfs", "BULKHEAD_INITRAMFS", share.join("initramfs.cpio"))?.1,
            modules: open("modules", "BULKHEAD_MODULES", share.join("modules"))?.1,
            monitor: open("monitor", "BULKHEAD_VMM", bin.join("bulkhead-vmm"))?.0,
            file_server: open("file server", "BULKHEAD_FS", bin.join("bulkhead-fs"))?.0,
        })
    }
}

/// The path of the stand-in's program.
///
/// # Errors
/// When it is missing.
pub fn stand_in() -> Result<PathBuf, AssetError> {
    let (what, variable) = ("program of the stand-in", "BULKHEAD_STAND_IN");
    let path = env::var_os(variable).map_or_else(|| beside().join("bulkhead-stand-in"), Into::into);
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(AssetError { what, path, variable, source }),
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
            let words = Assets::find_beside(&bin, |_| None).unwrap_err().to_string();
            assert!(
                words.starts_with(&format!("cannot use {what} {}: ", path.display())),
                "{words}"
            );
            assert!(words.contains("cargo xtask image"), "{words}");
            fs::write(path, "").unwrap();
        }
        Assets::find_beside(&bin, |_| None).unwrap();
    }

    #[test]
    fn a_variable_names_another_file() {
        let named = |variable: &str| (variable == "BULKHEAD_KERNEL").then(|| "/my/kernel".into());
        let words = Assets::find_beside(Path::new("/nonexistent/bin"), named).unwrap_err();
        assert!(words.to_string().contains("/my/kernel"), "{words}");
    }
}
