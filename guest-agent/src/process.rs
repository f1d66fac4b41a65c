//! The one reaper: PID 1 inherits every orphan of the guest and must collect all of them, without
//! taking the exit status of a process that some call waits for.
//!
//! Every status that `wait` yields goes to whoever asked for that pid; the rest are dropped. A
//! container's init is not our child from the start: its pid becomes known only after its parent,
//! the creator, has ended, and by then it may have ended too. While such an [`Adoption`] is open
//! unclaimed statuses are therefore kept.

// UNSAFETY: the safe wrapper of kill(2) has no real-time signals, which containers are stopped with.
#![expect(unsafe_code, reason = "kill(2) with any signal number")]

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::{Pid, WaitOptions, wait};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// How many unclaimed statuses are kept while an adoption is open; beyond that none is added.
const UNCLAIMED: usize = 16384;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit code, or 128 and the signal.
    pub(crate) status: u32,
    /// When it was collected.
    pub(crate) at: SystemTime,
}

/// Yields a process's end; may be cloned and asked again.
#[derive(Clone, Debug)]
pub(crate) struct Waiter(watch::Receiver<Option<Exit>>);

impl Waiter {
    /// Waits for the end of the process.
    pub(crate) async fn wait(&mut self) -> Exit {
        let ended = self.0.wait_for(Option::is_some).await.map(|exit| *exit).ok().flatten();
        match ended {
            Some(exit) => exit,
            // The reaper lives as long as the agent, so the sender is not dropped before it sends.
            None => std::future::pending().await,
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<Exit> {
        *self.0.borrow()
    }
}

/// Collects ended processes. Clones share one table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    awaited: HashMap<Pid, watch::Sender<Option<Exit>>>,
    unclaimed: HashMap<Pid, Exit>,
    adoptions: usize,
}

/// While it lives, the status of a process that is not awaited yet is kept.
#[derive(Debug)]
pub(crate) struct Adoption(Reaper);

impl Reaper {
    /// Starts a child and awaits it. The reaper collects it, never `std`.
    ///
    /// # Errors
    /// What `Command::spawn` answers.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Waiter> {
        // The lock keeps the reaper from collecting the child before it is in the table.
        let mut table = self.table();
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        Ok(table.await_pid(pid))
    }

    /// Keeps unclaimed statuses until the adoption is dropped.
    pub(crate) fn adopt(&self) -> Adoption {
        self.table().adoptions += 1;
        Adoption(self.clone())
    }

    /// Collects ended children whenever SIGCHLD comes, for ever.
    ///
    /// # Errors
    /// The signal cannot be received.
    pub(crate) async fn run(self) -> io::Result<()> {
        let mut ended: Signal = signal(SignalKind::child())?;
        loop {
            self.collect();
            if ended.recv().await.is_none() {
                return Err(io::Error::other("cannot receive SIGCHLD any more"));
            }
        }
    }

    /// Collects every child that has ended.
    fn collect(&self) {
        let mut table = self.table();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(status) = shell_status(status.exit_status(), status.terminating_signal()) {
                table.ended(pid, Exit { status, at: SystemTime::now() });
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it holds the lock, so the table is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn await_pid(&mut self, pid: Pid) -> Waiter {
        let exit = self.unclaimed.remove(&pid);
        let (sender, receiver) = watch::channel(exit);
        if exit.is_none() {
            self.awaited.insert(pid, sender);
        }
        Waiter(receiver)
    }

    fn ended(&mut self, pid: Pid, exit: Exit) {
        if let Some(sender) = self.awaited.remove(&pid) {
            sender.send_replace(Some(exit));
        } else if self.adoptions > 0 && self.unclaimed.len() < UNCLAIMED {
            self.unclaimed.insert(pid, exit);
        }
    }
}

impl Adoption {
    /// Awaits a process that has become, or is about to become, our child.
    pub(crate) fn claim(&self, pid: Pid) -> Waiter {
        self.0.table().await_pid(pid)
    }
}

impl Drop for Adoption {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.adoptions -= 1;
        if table.adoptions == 0 {
            table.unclaimed.clear();
        }
    }
}

/// Sends a signal, real-time ones included; 0 only asks whether the process is there.
///
/// # Errors
/// There is no such signal (`EINVAL`) or process (`ESRCH`).
pub(crate) fn send_signal(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: the call has no memory to touch. A `Pid` is positive, so that one process is meant.
    let sent = unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The status as a shell shows it; `None` if the process has only stopped or continued.
fn shell_status(code: Option<i32>, signal: Option<i32>) -> Option<u32> {
    let number = code.or_else(|| Some(128 + signal?))?;
    u32::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }

    fn exit(status: u32) -> Exit {
        Exit { status, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn an_awaited_process_yields_its_status() {
        let reaper = Reaper::default();
        let waiter = reaper.adopt().claim(pid(7));
        assert_eq!(waiter.ended(), None);
        reaper.table().ended(pid(7), exit(3));
        assert_eq!(waiter.ended(), Some(exit(3)));
    }

    #[test]
    fn an_adopted_process_that_ended_before_it_was_claimed_yields_its_status() {
        let reaper = Reaper::default();
        let adoption = reaper.adopt();
        reaper.table().ended(pid(9), exit(137));
        assert_eq!(adoption.claim(pid(9)).ended(), Some(exit(137)));
    }

    #[test]
    fn nothing_is_kept_without_an_adoption() {
        let reaper = Reaper::default();
        reaper.table().ended(pid(5), exit(1));
        drop(reaper.adopt());
        reaper.table().ended(pid(6), exit(1));
        assert!(reaper.table().unclaimed.is_empty());
        let adoption = reaper.adopt();
        reaper.table().ended(pid(6), exit(1));
        drop(adoption);
        assert!(reaper.table().unclaimed.is_empty());
    }

    #[test]
    fn a_pid_that_is_used_again_yields_the_later_status() {
        let reaper = Reaper::default();
        let adoption = reaper.adopt();
        reaper.table().ended(pid(4), exit(1));
        reaper.table().ended(pid(4), exit(2));
        assert_eq!(adoption.claim(pid(4)).ended(), Some(exit(2)));
    }

    #[test]
    fn statuses_are_those_of_a_shell() {
        assert_eq!(shell_status(Some(5), None), Some(5));
        assert_eq!(shell_status(None, Some(libc::SIGKILL)), Some(137));
        assert_eq!(shell_status(None, None), None);
    }
}
