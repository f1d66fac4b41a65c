//! Says when the clock of the host was set: a timer that is never due, and that the kernel cancels
//! when the clock steps (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`). A host that wakes up from
//! suspension counts as well.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::{Errno, read};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::machine::channel::watch;

/// A timer that is armed.
#[derive(Debug)]
pub struct HostClock(AsyncFd<OwnedFd>);

impl HostClock {
    /// Watches the clock from now on.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn watch() -> io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Realtime,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        arm(&timer)?;
        Ok(Self(watch(timer)?))
    }

    /// Waits until the clock was set.
    ///
    /// # Errors
    /// The timer fails.
    pub async fn was_set(&self) -> io::Result<()> {
        let cancelled = |timer: &OwnedFd| match read(timer, &mut [0; 8]) {
            Err(Errno::CANCELED) => Ok(()),
            Err(error) => Err(error.into()),
            // Nothing is due before the end of time.
            Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
        };
        self.0.async_io(Interest::READABLE, cancelled).await?;
        Ok(arm(self.0.get_ref())?)
    }
}

fn arm(timer: &OwnedFd) -> rustix::io::Result<()> {
    let never = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };
    let once = Itimerspec { it_interval: Timespec::default(), it_value: never };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(timer, flags, &once).map(drop)
}
