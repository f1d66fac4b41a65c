//! Paths of sockets: one may have 107 bytes, and a container's id alone 255.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

/// A short path to a socket in a directory, for as long as it lives.
#[derive(Debug)]
pub(crate) struct SocketPath {
    path: PathBuf,
    _directory: File,
}

impl SocketPath {
    /// # Errors
    /// There is no such directory.
    pub(crate) fn within(directory: &Path, name: &str) -> io::Result<Self> {
        let directory = File::open(directory)?;
        let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()).into();
        Ok(Self { path, _directory: directory })
    }

    // Lent, not `AsRef<Path>`: a function that takes that by value may drop it before using the
    // path.
    pub(crate) fn as_path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_socket_is_reached_however_long_its_path_is() {
        let above = tempfile::tempdir().unwrap();
        let directory = above.path().join("x".repeat(255));
        std::fs::create_dir(&directory).unwrap();
        assert!(UnixListener::bind(directory.join("socket")).is_err());
        let path = SocketPath::within(&directory, "socket").unwrap();
        let _listener = UnixListener::bind(path.as_path()).unwrap();
        UnixStream::connect(path.as_path()).unwrap();
        assert!(directory.join("socket").exists());
    }
}
