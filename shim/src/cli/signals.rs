//! Signals that end this program while the process that it stands for does not run yet.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use rustix::process::Signal;

use crate::machine::channel::{self, Steady};
use crate::streams::relay::Signals;

/// Waits for a signal that ends a program which does not handle it. Others mean nothing to a
/// container that does not run yet.
///
/// # Errors
/// When the kernel has no room to wait.
pub(super) async fn fatal(signals: &Signals) -> anyhow::Result<u32> {
    let fatal = [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM].map(Signal::as_raw);
    let ready = channel::watch(Watched(signals))?;
    loop {
        let mut guard = ready.readable().await?;
        while let Some(signal) = signals.next()? {
            if fatal.contains(&signal.cast_signed()) {
                return Ok(signal);
            }
        }
        guard.clear_ready();
    }
}

/// The signals' descriptor, which stays the same as long as they live.
struct Watched<'a>(&'a Signals);

impl AsRawFd for Watched<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Steady for Watched<'_> {}
