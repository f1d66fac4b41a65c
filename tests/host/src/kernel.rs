//! The kernel that the host boots: one that is built for the suites, or Debian's.
//!
//! The suites compare what a container sees under runc on the host and in a machine, so the host's
//! kernel is configured like the guest's, with everything built in. To just run a container,
//! Debian's kernel is available in seconds; its initramfs is made here, and its modules are in the
//! cache.

use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use guest_image::kernel::{self, Recipe};
use guest_image::progress::say;
use guest_image::source::Source;

use crate::debian;
use crate::request::MODULE;

/// Which kernel is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Built from `x86_64.config`.
    Built,
    /// Debian's, or the built one if Debian's is not available.
    Debian,
}

impl FromStr for Choice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "built" => Ok(Self::Built),
            "debian" => Ok(Self::Debian),
            _ => bail!("--kernel is built or debian, not {text}"),
        }
    }
}

/// A kernel to boot.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The file that QEMU loads.
    pub(crate) image: PathBuf,
    /// Its modules, if not everything is built in.
    pub(crate) modules: Option<Modules>,
}

/// The modules of a kernel.
#[derive(Debug)]
pub(crate) struct Modules {
    /// The directory that `/lib/modules` should have for this kernel.
    pub(crate) directory: PathBuf,
    /// The modules that are needed before that directory is reachable, in the order of loading.
    pub(crate) first: Vec<PathBuf>,
}

impl Kernel {
    /// Finds the kernel in the cache, or makes it.
    ///
    /// # Errors
    /// As [`kernel::build`].
    pub(crate) fn prepare(choice: Choice) -> Result<Self> {
        if choice == Choice::Debian {
            match debian::kernel() {
                Ok(kernel) => return Ok(kernel),
                Err(error) => say(&format!("cannot get Debian's kernel: {error:#}; building one")),
            }
        }
        let fragment = include_str!("../x86_64.config");
        let recipe = Recipe { name: "host", fragment, patches: &[] };
        let built = kernel::build(recipe, &Source::from_environment()?)?;
        Ok(Self { image: built.vmlinux, modules: None })
    }
}

impl Modules {
    /// The files that the initramfs holds beside the first process.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(crate) fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let read = |(number, path): (usize, &PathBuf)| {
            let data = fs::read(path).with_context(|| path.display().to_string())?;
            Ok((format!("{MODULE}{number}"), data))
        };
        self.first.iter().enumerate().map(read).collect()
    }
}
