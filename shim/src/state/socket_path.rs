//! The sockets in a container's directory.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};

use crate::state::{Home, StateError};

/// The Task service.
const TASK: &str = "task.sock";
/// Where stand-ins attach.
const ATTACH: &str = "attach.sock";
/// Where containers join the pod.
const JOIN: &str = "join.sock";
/// Where a container's processes report that they are ready, in a directory of its own.
const NOTIFY: &str = "notify.sock";

/// A directory in the container's. It exists if somebody waits for the container to be ready.
pub const NOTIFY_DIR: &str = "notify";

/// The path of a socket, however long the path of its directory is: `sun_path` holds 107 bytes, so
/// the directory is named by a descriptor. The path is valid as long as this value lives.
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

    /// Where the process that starts a container learns that it is ready.
    ///
    /// # Errors
    /// When nobody waits for that ([`NOTIFY_DIR`] does not exist).
    pub fn notify(home: &Home) -> Result<Self, StateError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(home, NOTIFY_DIR, flags, Mode::empty());
        let path = home.dir().join(NOTIFY_DIR);
        let dir = dir.map_err(|error| StateError::Io { path, source: error.into() })?;
        Ok(Self::within(dir, NOTIFY))
    }

    fn new(home: &Home, name: &str) -> Result<Self, StateError> {
        let dir = home.as_fd().try_clone_to_owned();
        let dir = dir.map_err(|source| StateError::Io { path: home.dir(), source })?;
        Ok(Self::within(dir, name))
    }

    fn within(dir: OwnedFd, name: &str) -> Self {
        Self { path: format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into(), _dir: dir }
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}
