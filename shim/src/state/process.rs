//! A process of the host that is named on disk: its pid, and its start time, so that a pid that the
//! kernel has reused is never signalled.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// One boot of the host: pids and start times of processes are only valid within it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootId(String);

impl BootId {
    /// The current boot.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn current() -> io::Result<Self> {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Self(id.trim().to_owned()))
    }
}

/// A process, not to be confused with a later one that has the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it started, in the kernel's ticks since boot: proc(5), field 22 of `stat`.
    pub start_ticks: u64,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_ticks = start_ticks(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable stat"))?;
        Ok(Self { pid, start_ticks })
    }

    /// This process.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::find(std::process::id())
    }

    /// Whether it still runs; a zombie does not.
    #[must_use]
    pub fn is_alive(self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else {
            return false;
        };
        start_ticks(&stat) == Some(self.start_ticks)
            && !matches!(after_name(&stat).and_then(|mut f| f.next()), Some("Z" | "X"))
    }

    /// A pidfd of the process, if it still exists; it does while its threads are ending.
    #[must_use]
    pub fn open(self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The pidfd pins the number now; check that it is still that of the same process.
        (Self::find(self.pid).ok() == Some(self)).then_some(fd)
    }

    /// Ends it with SIGKILL and waits until it is gone; false when the time is up.
    #[must_use]
    pub fn kill_and_wait(self, patience: Duration) -> bool {
        let Some(fd) = self.open() else { return true };
        // It may end by itself at any moment.
        let _ = pidfd_send_signal(&fd, Signal::KILL);
        wait_gone(&fd, patience)
    }

    /// Waits until it is gone; false when the time is up.
    #[must_use]
    pub fn wait(self, patience: Duration) -> bool {
        self.open().is_none_or(|fd| wait_gone(&fd, patience))
    }
}

/// Waits until the process behind a pidfd has ended; false when the time is up.
fn wait_gone(fd: &OwnedFd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The fields after the process's name, which may hold anything, closing brackets included.
fn after_name(stat: &str) -> Option<std::str::SplitWhitespace<'_>> {
    Some(stat.rsplit_once(')')?.1.split_whitespace())
}

fn start_ticks(stat: &str) -> Option<u64> {
    after_name(stat)?.nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1";
        assert_eq!(start_ticks(stat), Some(4711));
    }

    #[test]
    fn a_process_with_the_number_of_another_is_left_alone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let real = Process::find(child.id()).unwrap();
        let other = Process { start_ticks: real.start_ticks + 1, ..real };
        assert!(!other.is_alive());
        assert!(other.kill_and_wait(Duration::from_secs(1)));
        assert!(real.is_alive());
        assert!(real.kill_and_wait(Duration::from_secs(5)));
        assert!(!real.is_alive(), "a process that waits for its parent is not alive");
        child.wait().unwrap();
    }

    #[test]
    fn waiting_for_a_process_that_stays_ends_with_the_time() {
        let this = Process::current().unwrap();
        assert!(!this.wait(Duration::from_millis(5)));
    }
}
