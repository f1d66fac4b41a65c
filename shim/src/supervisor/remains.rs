//! Removes what is left of a container on the host.
//!
//! The state on disk lists what there is. If it cannot be read, `/proc` is searched: the processes
//! of a pod have its directory on their command lines, but for stand-ins, whose command lines are
//! the container's; they have it open. A step is taken even if the step before it failed. The
//! directory is removed last, and only if nothing else is left, so that the removal can be tried
//! again.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;

use crate::cgroup::Cgroup;
use crate::network::mirror;
use crate::state::home::Lock;
use crate::state::process::Process;
use crate::state::{Home, State};
use crate::supervisor::hooks;

/// How long a killed process may take to end.
const KILLED: Duration = Duration::from_secs(10);
/// The file names of the programs of a pod.
const SUPERVISOR: &str = "bulkhead";
const MONITOR: &str = "bulkhead-vmm";
const FILE_SERVER: &str = "bulkhead-fs";
const STAND_IN: &str = "bulkhead-stand-in";
/// The verb on a supervisor's command line; the pod's directory follows it.
pub const SUPERVISE: &str = "supervise";

/// Ends what is left of a container and of its pod, then removes it. Its poststop hooks run last.
///
/// # Errors
/// Names the first thing that could not be removed; the directory stays then.
pub fn end(lock: Lock) -> anyhow::Result<()> {
    match lock.home().read() {
        // Without a keeper the processes are searched for: another version may have written the
        // state in another form.
        Ok(state) if state.keeper.is_some() || state.outlived => {
            let survivor = kill(&state.processes());
            remove_with(lock, state, survivor)
        }
        read => {
            let found = Found::of(lock.home());
            let survivor = kill(&found.processes);
            let state = found.state(read.unwrap_or_default());
            remove_with(lock, state, survivor)
        }
    }
}

/// Ends the processes of a container whose pod continues, then removes it as [`end`] does.
///
/// # Errors
/// As [`end`].
pub fn end_without_pod(lock: Lock) -> anyhow::Result<()> {
    let mut state = lock.home().read().unwrap_or_default();
    state.outlived = true;
    let survivor = kill(&state.processes());
    remove_with(lock, state, survivor)
}

/// Removes a container whose processes end by themselves, as [`end`] does.
///
/// # Errors
/// As [`end`].
pub fn remove(lock: Lock) -> anyhow::Result<()> {
    let state = lock.home().read()?;
    remove_with(lock, state, None)
}

fn remove_with(lock: Lock, state: State, survivor: Option<Process>) -> anyhow::Result<()> {
    let mut failed = survivor.map(|it| anyhow!("cannot end process {}", it.pid));
    if let Some(network) = &state.network
        && let Err(error) = mirror::restore(network)
    {
        let network = network.display();
        tracing::warn!(%network, %error, "cannot restore the interfaces of the network namespace");
    }
    if let Some(Err(error)) = state.cgroup.as_ref().map(Cgroup::remove) {
        failed.get_or_insert(error.into());
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let home = lock.home().clone();
    // The process that removes the directory runs the hooks, so they run only once.
    lock.remove()?;
    hooks::poststop(&home, state);
    Ok(())
}

/// Kills processes one after the other; returns the first that does not end.
fn kill(processes: &[Process]) -> Option<Process> {
    let others = processes.iter().filter(|it| it.pid != std::process::id());
    others.fold(None, |survivor, it| {
        let stays = !it.kill_and_wait(KILLED);
        survivor.or(stays.then_some(*it))
    })
}

/// What `/proc` shows of a container whose state cannot be read.
struct Found {
    /// The supervisor is the first.
    processes: Vec<Process>,
    cgroup: Option<Cgroup>,
    /// The network namespace of its stand-in.
    network: Option<File>,
}

impl Found {
    fn of(home: &Home) -> Self {
        let mut found = find(home);
        found.sort_by_key(|(role, _)| *role);
        let of = |wanted| found.iter().find(|(role, _)| *role == wanted).map(|(_, it)| it.pid);
        let cgroup = |role| of(role).and_then(|pid| Cgroup::of_process(pid, home.id()));
        let cgroup = cgroup(Role::Supervisor).or_else(|| cgroup(Role::StandIn));
        let network =
            of(Role::StandIn).and_then(|pid| File::open(format!("/proc/{pid}/ns/net")).ok());
        let processes = found.into_iter().map(|(_, process)| process).collect();
        Self { processes, cgroup, network }
    }

    /// Completes the written state with what was found.
    fn state(&self, written: State) -> State {
        let network = self.network.as_ref();
        let network = network.map(|it| format!("/proc/self/fd/{}", it.as_raw_fd()).into());
        State {
            cgroup: written.cgroup.or_else(|| self.cgroup.clone()),
            network: written.network.or(network),
            ..written
        }
    }
}

/// The role of a process in a pod, in the order in which they are ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Supervisor,
    Jailed,
    StandIn,
}

/// Finds the processes of a container's pod and its stand-ins.
fn find(home: &Home) -> Vec<(Role, Process)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = numbers.filter_map(|pid| {
        let process = Process::find(pid).ok()?;
        let role = role(pid, home)?;
        // Still alive, so the pid was not reused while `/proc` was read.
        process.is_alive().then_some((role, process))
    });
    found.collect()
}

/// Returns the role of a process, or `None` if it is not the container's.
fn role(pid: u32, home: &Home) -> Option<Role> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    // The kernel appends "(deleted)" if the program's file was replaced.
    let program = program.file_name()?.to_str()?.trim_end_matches(" (deleted)").to_owned();
    if program == STAND_IN {
        return has_open(pid, home).then_some(Role::StandIn);
    }
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8(line).ok()?;
    let arguments: Vec<&str> = line.trim_end_matches('\0').split('\0').skip(1).collect();
    let (role, directory) = match (program.as_str(), arguments.as_slice()) {
        (SUPERVISOR, [SUPERVISE, directory]) => (Role::Supervisor, directory),
        (MONITOR | FILE_SERVER, [directory]) => (Role::Jailed, directory),
        _ => return None,
    };
    home.is_at(Path::new(directory)).then_some(role)
}

/// Whether a process has the container's directory open.
fn has_open(pid: u32, home: &Home) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors.map(|entry| entry.path()).any(|link| {
        // By its name first: a file system that does not answer is not asked for other files.
        let named = fs::read_link(&link);
        named.is_ok_and(|path| path.ends_with(home.id().as_str())) && home.is_at(&link)
    })
}
