//! Reports an OOM kill in the guest to the host.
//!
//! Callers learn of an OOM kill from the container's cgroup: containerd's shim for runc and
//! "bulkhead events" watch `memory.events` of cgroup v2 there, or `memory.oom_control` of v1. But
//! the guest's kernel killed, and the host has counted nothing. So the supervisor makes the host
//! count one kill: it starts a child for this purpose only, lowers the cgroup's memory limit for a
//! moment, and the child takes more memory than that and is killed. The child has the highest OOM
//! score, so the kernel kills nothing else of the pod.

use std::fs;
use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::mm::{MlockAllFlags, mlockall};

use crate::cgroup::{Cgroup, Memory};

/// How much memory the pod may take in addition while the victim is being killed, in bytes.
const HEADROOM: u64 = 16 << 20;
/// How much memory the victim asks for, in bytes; it never gets all of it.
const DEMAND: usize = 64 << 20;
/// How long the kernel may take to kill it.
const PATIENCE: Duration = Duration::from_secs(10);
/// The `oom_score_adj` of the process that is killed first: proc(5).
const FIRST: &str = "1000";

/// Makes the host count an OOM kill in a cgroup, or in this process's own. Blocks for some
/// milliseconds.
///
/// # Errors
/// When the host does not account memory, or did not kill the victim.
pub fn report(other: Option<&Cgroup>) -> io::Result<()> {
    let mut victim = Victim::spawn()?;
    if let Some(cgroup) = other {
        cgroup.add(victim.0.id()).map_err(io::Error::other)?;
    }
    let cgroup = Memory::of(victim.0.id())?;
    let before = cgroup.kills()?;
    let limits = cgroup.hold(HEADROOM)?;
    let killed = victim.demand();
    cgroup.restore(&limits)?;
    killed?;
    if cgroup.kills()? == before {
        return Err(io::Error::other("the host did not count the kill"));
    }
    Ok(())
}

/// The program of the victim: it waits for a byte on standard input, and then takes memory that
/// cannot be swapped.
///
/// # Errors
/// When it cannot lock memory or set its OOM score.
pub fn victim() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", FIRST)?;
    // Not the program itself: its pages count as files, which are taken for reclaimable.
    mlockall(MlockAllFlags::FUTURE)?;
    io::stdout().write_all(b"r")?;
    io::stdout().flush()?;
    if io::stdin().read(&mut [0])? == 1 {
        std::hint::black_box(vec![1_u8; DEMAND]);
    }
    Ok(())
}

/// The process that is to be killed; dropping it ends it.
struct Victim(Child);

impl Victim {
    /// Starts it, in this process's cgroup, and waits until it is ready.
    fn spawn() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("oom-victim").stderr(Stdio::null());
        let mut victim = Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let output = victim.0.stdout.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        output.read_exact(&mut [0])?;
        Ok(victim)
    }

    /// Tells it to take memory, and waits for its end.
    fn demand(&mut self) -> io::Result<()> {
        self.0.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?.write_all(b"g")?;
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Both fail only if the child was already waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
