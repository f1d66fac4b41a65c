//! What a container that nobody keeps any more has left on the host, and its removal.
//!
//! The state on disk says what there is. Where it cannot be read the kernel is asked: the processes of a
//! pod name its directory on their command lines. Each step is taken whatever became of the one before;
//! a directory stays as long as anything else does, so that what failed can be tried again.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;

use crate::cgroup::Cgroup;
use crate::network::mirror;
use crate::state::home::Lock;
use crate::state::process::Process;
use crate::state::{Home, State};
use crate::supervisor::hooks;

/// How long a process that was killed may take to go.
const KILLED: Duration = Duration::from_secs(10);
/// The programs of a pod, as their files are called.
const SUPERVISOR: &str = "bulkhead";
const MONITOR: &str = "bulkhead-vmm";
const FILE_SERVER: &str = "bulkhead-fs";
const STAND_IN: &str = "bulkhead-stand-in";
/// The verb of a supervisor; the directory of its pod comes behind it.
pub const SUPERVISE: &str = "supervise";

/// Ends what is left of a container and of its pod, then removes it. The last thing that happens are its
/// poststop hooks.
///
/// # Errors
/// The first thing that is still there; so is the directory then.
pub fn end(lock: Lock) -> anyhow::Result<()> {
    match lock.home().read() {
        // Whose processes another version wrote down in another way are looked for too.
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

/// Ends what stands for a container whose pod goes on, then removes it as [`end`] does.
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
    // Whoever removes the directory runs the hooks: nobody else can.
    lock.remove()?;
    hooks::poststop(&home, state);
    Ok(())
}

/// Kills processes, one after the other; gives the first that does not go.
fn kill(processes: &[Process]) -> Option<Process> {
    let others = processes.iter().filter(|it| it.pid != std::process::id());
    others.fold(None, |survivor, it| {
        let stays = !it.kill_and_wait(KILLED);
        survivor.or(stays.then_some(*it))
    })
}

/// What the kernel knows of a container whose state is not known.
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

    /// What is to be removed: what is written down, and what else there is.
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

/// What a process is to a container, in the order in which they are ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Supervisor,
    Jailed,
    StandIn,
}

/// The processes of a container's pod, and those that stand for it, by their command lines.
fn find(home: &Home) -> Vec<(Role, Process)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = numbers.filter_map(|pid| {
        let process = Process::find(pid).ok()?;
        let role = role(pid, home)?;
        // Whoever had the number then has it still.
        process.is_alive().then_some((role, process))
    });
    found.collect()
}

/// What a process is to a container, if anything.
fn role(pid: u32, home: &Home) -> Option<Role> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    // A program that was replaced by another version is "(deleted)".
    let program = program.file_name()?.to_str()?.trim_end_matches(" (deleted)").to_owned();
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8(line).ok()?;
    let arguments: Vec<&str> = line.trim_end_matches('\0').split('\0').skip(1).collect();
    let (role, directory) = match (program.as_str(), arguments.as_slice()) {
        (SUPERVISOR, [SUPERVISE, directory]) => (Role::Supervisor, PathBuf::from(directory)),
        (MONITOR | FILE_SERVER, [directory]) => (Role::Jailed, PathBuf::from(directory)),
        (STAND_IN, ["--root", root, .., id]) => (Role::StandIn, Path::new(root).join(id)),
        _ => return None,
    };
    home.is_at(&directory).then_some(role)
}
