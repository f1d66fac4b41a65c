//! Starts the pod's file server, gives it the share, and waits for its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_vmm::config::JailConfig;
use bulkhead_vmm::fileserver::config::{FsAnswer, FsConfig, VERSION};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::machine::channel::Channel;
use crate::machine::share::{self, Files, ShareDir, ShareDirs, ShareError};
use crate::machine::spawn::{self, Jailed, Launch};
use crate::state::process::Process;

/// The number of threads that serve requests.
const THREADS: u8 = 6;
/// How long it may take to start and enter its jail.
const PATIENCE: Duration = Duration::from_secs(20);
/// The most descriptors that it may hold: one for each file whose inode the guest has cached.
const DESCRIPTORS: u64 = 1 << 20;

/// Why the file server did not start or did not share files.
#[derive(Debug, Error)]
pub enum FileServerError {
    /// The program cannot be started.
    #[error("cannot start the file server")]
    Spawn(#[source] io::Error),
    /// The control socket failed.
    #[error("control socket of the file server")]
    Socket(#[source] io::Error),
    /// The file server reported an error.
    #[error("file server: {0}")]
    Refused(String),
    /// The file server ended without an answer.
    #[error("the file server ended before it was ready; see {0}")]
    Ended(&'static str),
    /// The file server did not answer in time.
    #[error("the file server was not ready within {0:?}")]
    Late(Duration),
    /// The share failed.
    #[error("share")]
    Share(#[from] ShareError),
}

/// A running file server.
#[derive(Debug)]
pub struct FileServer {
    jailed: Jailed,
    control: Channel,
    share_dirs: Mutex<ShareDirs>,
}

impl FileServer {
    /// Starts it with a share that has only the modules, and one end of the relay socket.
    ///
    /// # Errors
    /// When it is not ready within a bounded time.
    pub async fn start(
        launch: Launch<'_>,
        relay: BorrowedFd<'_>,
        modules: File,
        jail: JailConfig,
    ) -> Result<Self, FileServerError> {
        let root = share::root()?;
        raise_descriptor_limit();
        let (jailed, control) = spawn::jailed(launch).map_err(FileServerError::Spawn)?;
        let control = Channel::new(control).map_err(FileServerError::Socket)?;
        let config = FsConfig { version: VERSION, jail, threads: THREADS };
        control.send(&config, &[root.as_fd(), relay]).await.map_err(FileServerError::Socket)?;
        let answer = timeout(PATIENCE, control.receive_json()).await;
        match answer.map_err(|_| FileServerError::Late(PATIENCE))? {
            Ok(Some(FsAnswer::Ready(_))) => {}
            Ok(Some(FsAnswer::Error(words))) => return Err(FileServerError::Refused(words)),
            Ok(None) => return Err(FileServerError::Ended("fileserver.log")),
            Err(error) => return Err(FileServerError::Socket(error)),
        }
        let pid = jailed.process.pid;
        let attached = spawn_blocking(move || share::attach_modules(pid, &modules)).await;
        attached.unwrap_or_else(|error| Err(ShareError::Namespace(error.into())))?;
        Ok(Self { jailed, control, share_dirs: Mutex::default() })
    }

    /// Takes an empty directory of the share for a container; the first is [`ShareDir::default`].
    ///
    /// # Errors
    /// [`ShareError::Full`].
    pub fn take_share_dir(&self) -> Result<ShareDir, ShareError> {
        self.share_dirs().take().ok_or(ShareError::Full)
    }

    /// Attaches the files of a container to its directory of the share.
    ///
    /// # Errors
    /// Names the path that failed.
    pub async fn show(&self, files: Files, dir: ShareDir) -> Result<(), ShareError> {
        let pid = self.jailed.process.pid;
        let attached = spawn_blocking(move || files.attach(pid, dir)).await;
        attached.unwrap_or_else(|error| Err(ShareError::Namespace(error.into())))
    }

    /// Detaches the files of a container and gives its directory back.
    ///
    /// # Errors
    /// When no files are attached there; the directory is given back all the same.
    pub fn leave_share_dir(&self, dir: ShareDir) -> Result<(), ShareError> {
        let detached = share::detach(self.jailed.process.pid, dir);
        self.share_dirs().leave(dir);
        detached
    }

    fn share_dirs(&self) -> MutexGuard<'_, ShareDirs> {
        self.share_dirs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process.
    #[must_use]
    pub const fn process(&self) -> Process {
        self.jailed.process
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        // It sends no further messages, so this returns when the socket is closed.
        let _ = self.control.receive().await;
    }
}

/// Raises the limit of open files as far as this process may, for its children to inherit. The file
/// server works with whatever limit it gets.
fn raise_descriptor_limit() {
    let raised = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    if setrlimit(Resource::Nofile, raised).is_err() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}
