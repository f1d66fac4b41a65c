//! Starts the pod's file server, gives it the share, and waits for its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_vmm::config::JailConfig;
use bulkhead_vmm::fileserver::config::{FsAnswer, FsConfig, FsReport, FsVerdict, VERSION};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use tokio::sync::mpsc::{self, error::SendError};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::machine::channel::Channel;
use crate::machine::share::{self, Files, Interpreter, ShareDir, ShareDirs, ShareError};
use crate::machine::spawn::{self, Jailed, Launch};
use crate::state::process::Process;

/// The number of threads that serve requests.
const THREADS: u8 = 6;
/// How long it may take to start and enter its jail.
const PATIENCE: Duration = Duration::from_secs(20);
/// The most descriptors that it may hold: one for each file whose inode the guest has cached.
const DESCRIPTORS: u64 = 1 << 20;
/// How many of its reports may wait. It waits then, and with it the guest.
const REPORTS: usize = 16;

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
    reports: Mutex<Option<Reports>>,
    ended: watch::Receiver<bool>,
    share_dirs: Mutex<ShareDirs>,
}

/// What the guest's sockets need. The file server is not trusted, and neither is what it reports.
#[derive(Debug)]
pub struct Reports {
    control: Arc<Channel>,
    reports: mpsc::Receiver<(FsReport, OwnedFd)>,
}

impl Reports {
    /// Waits for the next one; `None` when the file server has ended.
    pub async fn next(&mut self) -> Option<(FsReport, OwnedFd)> {
        self.reports.recv().await
    }

    /// What answers [`FsReport::Connect`].
    #[must_use]
    pub fn verdicts(&self) -> Verdicts {
        Verdicts(self.control.clone())
    }
}

/// Answers connections. Clones answer the same file server.
#[derive(Clone, Debug)]
pub struct Verdicts(Arc<Channel>);

impl Verdicts {
    /// Answers one; without effect when the file server has ended.
    pub async fn send(&self, verdict: FsVerdict) {
        if let Err(error) = self.0.send(&verdict, &[]).await {
            tracing::debug!(error = %error, "the file server takes no verdicts");
        }
    }
}

impl FileServer {
    /// Starts it with a share that has only the modules, and one end of the relay socket. `sockets`
    /// says whether sockets in shared directories have another end.
    ///
    /// # Errors
    /// When it is not ready within a bounded time.
    pub async fn start(
        launch: Launch<'_>,
        relay: BorrowedFd<'_>,
        modules: File,
        (jail, sockets): (JailConfig, bool),
    ) -> Result<Self, FileServerError> {
        let root = share::root()?;
        raise_descriptor_limit();
        let (jailed, control) = spawn::jailed(launch).map_err(FileServerError::Spawn)?;
        let control = Channel::new(control).map_err(FileServerError::Socket)?;
        let config = FsConfig { version: VERSION, jail, threads: THREADS, sockets };
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
        let control = Arc::new(control);
        let (sender, reports) = mpsc::channel(REPORTS);
        let (over, ended) = watch::channel(false);
        tokio::spawn(listen(control.clone(), sender, over));
        let reports = Mutex::new(sockets.then_some(Reports { control, reports }));
        Ok(Self { jailed, reports, ended, share_dirs: Mutex::default() })
    }

    /// What it reports, once; `None` where sockets have no other end.
    pub fn take_reports(&self) -> Option<Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).take()
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

    /// Attaches the interpreters of binary formats, for as long as it runs.
    ///
    /// # Errors
    /// Names what failed.
    pub async fn show_interpreters(&self, files: Vec<Interpreter>) -> Result<(), ShareError> {
        let pid = self.jailed.process.pid;
        let attached = spawn_blocking(move || share::attach_interpreters(pid, files)).await;
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
        // An error says that nobody listens to it any more.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }
}

/// Passes on what it reports until it has ended.
async fn listen(
    control: Arc<Channel>,
    reports: mpsc::Sender<(FsReport, OwnedFd)>,
    over: watch::Sender<bool>,
) {
    while let Ok(Some(message)) = control.receive().await {
        let mut descriptors = message.descriptors.into_iter();
        match (serde_json::from_slice(&message.bytes), descriptors.next()) {
            (Ok(report), Some(descriptor)) => {
                if let Err(SendError(_)) = reports.send((report, descriptor)).await {
                    tracing::debug!("a report of the file server came too late");
                }
            }
            _ => tracing::warn!("the file server has sent something that is no report"),
        }
    }
    over.send_replace(true);
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
