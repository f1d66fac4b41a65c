//! The file server: a pod's files over a socket, and nothing else of the host.
//!
//! One process per pod. Its first message is the [`config::FsConfig`] with the detached mount that
//! becomes its root; then it jails itself (`jail`), answers, and serves FUSE messages from the
//! relay socket on a few threads (`serve`, `share`). What the supervisor attaches below the root
//! later is served too. It exits when the control socket reaches end of file.
//!
//! The guest is hostile, the monitor is not trusted either: whatever arrives is checked, and can at
//! worst fail a request. Deliberately not done: caching on this side, DAX, notifications.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use rustix::io::Errno;
use thiserror::Error;

use crate::config::ConfigError;
use crate::jail::{JailError, descriptors};
use crate::{logging, seqpacket};
use config::{FsAnswer, FsConfig, FsVerdict};
use serve::Service;
use share::Share;
use slots::Slots;
use sockets::Sockets;

mod buffer;
mod caller;
pub mod config;
mod fifos;
mod handles;
mod inodes;
mod jail;
mod places;
mod serve;
mod share;
mod slots;
mod sockets;
mod watches;
pub(crate) mod wire;

/// Virtual size of a serving thread's stack; only touched pages cost memory.
const STACK_BYTES: usize = 256 << 10;

/// Why the file server does not serve.
#[derive(Debug, Error)]
enum StartError {
    /// The control socket failed.
    #[error("control socket of the file server")]
    Control(#[source] io::Error),
    /// The configuration cannot be used.
    #[error("configuration of the file server")]
    Config(#[from] ConfigError),
    /// A step into the jail failed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The share cannot be opened.
    #[error("root of the share")]
    Share(#[source] Errno),
    /// A thread cannot be started.
    #[error("thread of the file server")]
    Thread(#[source] io::Error),
}

/// The whole life of the process `bulkhead-fs`.
#[must_use]
pub fn main() -> ExitCode {
    logging::start();
    let Some(control) = descriptors::inherited_control() else { return ExitCode::FAILURE };
    let control = Arc::new(control);
    match run(&control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let reason = logging::report(&error);
            // The supervisor may be gone; the log has the reason as well.
            let _ = answer(&control, &FsAnswer::Error(reason));
            ExitCode::FAILURE
        }
    }
}

fn run(control: &Arc<OwnedFd>) -> Result<(), StartError> {
    let Some(message) = seqpacket::receive(control).map_err(StartError::Control)? else {
        return Ok(());
    };
    let config = FsConfig::from_json(&message.bytes, message.descriptors.len())?;
    let mut descriptors = message.descriptors;
    let relay = descriptors.remove(config::RELAY);
    let share = descriptors.remove(config::SHARE_ROOT);
    let kept = [control.as_fd(), relay.as_fd()];
    let (proc_self_fd, limit) = jail::enter(config.jail, share, &kept)?;
    let slots = Slots::new(limit, config.threads);
    let sockets = Sockets::new(config.sockets.then(|| Arc::clone(control)));
    let share = Share::new(proc_self_fd, slots, sockets).map_err(StartError::Share)?;
    let service = Arc::new(Service::new(share, relay));
    for number in 0..config.threads {
        let service = Arc::clone(&service);
        start_thread(format!("serve-{number}"), move || service.run())?;
    }
    let (watching, waiting) = (Arc::clone(&service), Arc::clone(&service));
    let connecting = Arc::clone(&service);
    start_thread("locks".into(), move || service.run_locks())?;
    start_thread("watches".into(), move || watching.run_watches())?;
    start_thread("fifos".into(), move || waiting.run_fifos())?;
    jail::seal()?;
    answer(control, &FsAnswer::Ready(true)).map_err(StartError::Control)?;
    while let Some(message) = seqpacket::receive(control).map_err(StartError::Control)? {
        match serde_json::from_slice::<FsVerdict>(&message.bytes) {
            Ok(verdict) => connecting.conclude(verdict),
            Err(error) => log::warn!("not a verdict: {error}"),
        }
    }
    Ok(())
}

/// The error of a system call that rustix does not wrap.
fn check(result: libc::c_int) -> Result<(), Errno> {
    match result {
        -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        _ => Ok(()),
    }
}

fn start_thread(name: String, run: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
    thread::Builder::new()
        .name(name)
        .stack_size(STACK_BYTES)
        .spawn(run)
        .map(drop)
        .map_err(StartError::Thread)
}

fn answer(control: &OwnedFd, answer: &FsAnswer) -> io::Result<()> {
    seqpacket::send(control, &serde_json::to_vec(answer)?, &[])
}
