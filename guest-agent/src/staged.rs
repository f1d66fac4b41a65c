//! File systems that wait to be mounted in a container, at paths of the guest. libcontainer binds
//! them.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

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

impl Drop for Staged {
    fn drop(&mut self) {
        for target in &self.0 {
            // If one stays, nothing can be done about it.
            let _ = unmount(target, UnmountFlags::DETACH);
            let _ = std::fs::remove_dir(target);
        }
    }
}
