//! The sockets in a container's directory.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::state::{Home, StateError};

/// The Task service.
const TASK: &str = "task.sock";
/// Where stand-ins attach.
const ATTACH: &str = "attach.sock";
/// Where containers join the pod.
const JOIN: &str = "join.sock";

/// A socket's path however long the directory's is: `sun_path` holds 107 bytes, so the directory is
/// named by a descriptor. The path is good as long as this lives.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    _dir: OwnedFd,
}

impl SocketPath {
    /// Where stand-ins attach.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn attach(home: &Home) -> Result<Self, StateError> {
        Self::new(home, ATTACH)
    }

    /// The Task service.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn task(home: &Home) -> Result<Self, StateError> {
        Self::new(home, TASK)
    }

    /// Where containers join the pod.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn join(home: &Home) -> Result<Self, StateError> {
        Self::new(home, JOIN)
    }

    fn new(home: &Home, name: &str) -> Result<Self, StateError> {
        let dir = home.as_fd().try_clone_to_owned();
        let dir = dir.map_err(|source| StateError::Io { path: home.dir(), source })?;
        let number = dir.as_raw_fd();
        Ok(Self { path: format!("/proc/self/fd/{number}/{name}").into(), _dir: dir })
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}
