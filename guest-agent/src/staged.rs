//! File systems that wait to be mounted in a container, at paths of the guest. libcontainer binds
//! them.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// What is mounted. Dropping this detaches it there, so that only the container has it.
#[derive(Debug, Default)]
pub(crate) struct Staged(Vec<PathBuf>);

impl Staged {
    /// Mounts a file system with these parameters at a directory, which is made.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn mount(
        &mut self,
        (source, kind): (&Path, &str),
        target: &Path,
        flags: MountFlags,
        parameters: &[String],
    ) -> io::Result<()> {
        std::fs::create_dir_all(target)?;
        let parameters = CString::new(parameters.join(","))?;
        mount(source, target, kind, flags, parameters.as_c_str())?;
        self.0.push(target.to_owned());
        Ok(())
    }
}

/// Makes a mount of a specification bind what is mounted at `target`, with these options.
pub(crate) fn bind(mount: &mut Mount, target: PathBuf, mut options: Vec<String>) {
    options.push("bind".to_owned());
    mount.set_typ(Some("bind".to_owned())).set_source(Some(target)).set_options(Some(options));
}

impl Drop for Staged {
    fn drop(&mut self) {
        for target in &self.0 {
            // If one stays, nothing can be done about it.
            let _ = unmount(target, UnmountFlags::DETACH);
            let _ = std::fs::remove_dir(target);
        }
    }
}
