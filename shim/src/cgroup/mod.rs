//! A pod's cgroup on the host: the one that the specification names (OCI runtime-spec, "Control
//! groups"). Every process of the pod is in it, so the host accounts for everything that the pod
//! uses, including guest memory, monitor and supervisor.
//!
//! libcgroups handles cgroup v1, v2 and systemd. This module decides where the cgroup is and which
//! processes enter it when. It never takes over a cgroup that is in use, because removing a cgroup
//! kills the processes in it.

mod controllers;
mod limits;
mod lowering;
mod memory;
mod on_v2;
mod stats;
mod units;

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use libcgroups::common::{
    AnyCgroupManager, AnyManagerError, CgroupConfig, CgroupManager, CgroupSetup, ControllerOpt,
    CreateCgroupSetupError, DEFAULT_CGROUP_ROOT, GetCgroupSetupError, create_cgroup_manager,
    get_cgroup_setup,
};
use libcgroups::stats::Stats;
use libcgroups_nix::unistd::Pid;
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::LinuxResources;
use rustix::process::{Signal, kill_process};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::task::spawn_blocking;

pub use self::limits::Limits;
pub use self::memory::{Memory, drain};
use crate::bundle;
use crate::state::id::ContainerId;

/// Nanoseconds in a microsecond.
const NANOSECONDS: u64 = 1000;
/// Microseconds in a tick of `USER_HZ` (1/100 s), in which the kernel reports times to programs.
const TICK: u64 = 10_000;
/// How long the processes in a cgroup that is being removed may take to die.
const DYING: Duration = Duration::from_secs(10);
/// How long to wait before systemd is asked again.
const ASKED: Duration = Duration::from_millis(10);

/// Why an operation on a cgroup failed.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The host's cgroup hierarchies cannot be used.
    #[error("cannot use the host's cgroups in /sys/fs/cgroup: {0}")]
    Host(#[from] GetCgroupSetupError),
    /// The path does not have systemd's form.
    #[error(
        "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got \
         {0:?} instead; leave --systemd-cgroup out for a path"
    )]
    NotAUnit(PathBuf),
    /// systemd cgroups were asked for on a host with cgroup v1.
    #[error("--systemd-cgroup needs a host with cgroup v2; leave it out")]
    UnitOnV1,
    /// The cgroup cannot be opened. (The crate's errors repeat their causes, so the chain ends
    /// here.)
    #[error("cgroup {}: {reason}", .path.display())]
    Open {
        /// The cgroup.
        path: PathBuf,
        /// The cause.
        reason: Box<CreateCgroupSetupError>,
    },
    /// The cgroup cannot be made, entered, limited, read or removed.
    #[error("cgroup {}: {reason}", .path.display())]
    Use {
        /// The cgroup.
        path: PathBuf,
        /// The cause.
        reason: Box<AnyManagerError>,
    },
    /// The cgroup has processes already.
    #[error(
        "container's cgroup is not empty: {count} process(es) found in {}; name another with \
         linux.cgroupsPath", .path.display()
    )]
    Taken {
        /// The cgroup.
        path: PathBuf,
        /// The number of processes.
        count: usize,
    },
    /// Its usage cannot be read.
    #[error("cannot read the usage of cgroup {}", .path.display())]
    Stats {
        /// The cgroup.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// systemd did not remove the cgroup in time.
    #[error("unit {} is still there {} s after systemd was asked to stop it", .0.display(), DYING.as_secs())]
    Stays(PathBuf),
    /// A thread failed.
    #[error("the thread that sets cgroups")]
    Thread(#[source] io::Error),
    /// The cgroup of this process cannot be read.
    #[error("/proc/self/cgroup")]
    Own(#[source] io::Error),
}

/// A pod's cgroup, which need not exist yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// The path from the root of the hierarchies, or `slice:prefix:name`.
    path: PathBuf,
    /// The cgroup is a unit of systemd.
    systemd: bool,
    container: ContainerId,
}

impl Cgroup {
    /// The cgroup that a container's `linux.cgroupsPath` names. As in runc, a relative path starts
    /// at the parent of the caller's own cgroup, and the default is the container's id.
    ///
    /// # Errors
    /// [`CgroupError::NotAUnit`] for a plain path if `systemd` is set; when the host has no
    /// cgroups, or cgroup v1 and `systemd` is set.
    pub fn of(
        container: &ContainerId,
        path: Option<&Path>,
        systemd: bool,
    ) -> Result<Self, CgroupError> {
        let given = path.filter(|path| !path.as_os_str().is_empty());
        let unified = matches!(get_cgroup_setup()?, CgroupSetup::Unified);
        let path = if systemd {
            if !unified {
                return Err(CgroupError::UnitOnV1);
            }
            units::name(container, given)?
        } else {
            let path = given.unwrap_or(Path::new(container.as_str()));
            let beside = if unified && path.is_relative() { beside_own()? } else { "/".into() };
            clean(&beside.join(path))
        };
        Ok(Self { path, systemd, container: container.clone() })
    }

    /// The cgroup v2 that a process is in, if the container's id is part of its name; `None`
    /// otherwise.
    #[must_use]
    pub fn of_process(pid: u32, container: &ContainerId) -> Option<Self> {
        let unified = paths_of(pid).ok()?.into_iter().find(|(kind, _)| kind.is_empty())?.1;
        let named = unified.file_name()?.to_str()?.contains(container.as_str());
        let path = Path::new("/").join(unified);
        named.then(|| Self { path, systemd: false, container: container.clone() })
    }

    /// Checks that no process is in the cgroup. Only then may it be removed with the container.
    ///
    /// # Errors
    /// [`CgroupError::Taken`].
    pub fn check_free(&self) -> Result<(), CgroupError> {
        // Listing fails if the cgroup does not exist.
        let count = self.kept(|cgroup| Ok(cgroup.get_all_pids().map_or(0, |pids| pids.len())))?;
        match count {
            0 => Ok(()),
            count => Err(CgroupError::Taken { path: self.path.clone(), count }),
        }
    }

    /// Makes the cgroup if it does not exist, and moves a process into it.
    ///
    /// # Errors
    /// When the host does not allow it.
    pub fn add(&self, pid: u32) -> Result<(), CgroupError> {
        let pid = Pid::from_raw(pid.cast_signed());
        self.kept(|cgroup| cgroup.add_task(pid))?;
        if self.systemd {
            self.files()?.add_task(pid).map_err(self.failed())?;
        }
        if matches!(get_cgroup_setup()?, CgroupSetup::Unified) {
            controllers::enable(&self.directory());
        }
        Ok(())
    }

    /// Sets limits; limits that are not given stay as they are.
    ///
    /// # Errors
    /// When the host has no such limit, or refuses the value.
    pub fn limit(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let mut resources = resources.clone();
        if self.systemd {
            // So that systemd keeps the limits. Limits that it does not know are only written to
            // the files.
            self.kept(|cgroup| cgroup.apply(&options(&resources)))?;
        }
        bundle::say_no_swap(&mut resources);
        if matches!(get_cgroup_setup()?, CgroupSetup::Unified) {
            on_v2::settings(&mut resources, &self.directory());
        }
        Self::apart(|| self.files()?.apply(&options(&resources)).map_err(self.failed()))
    }

    /// [`Cgroup::limit`] in a thread of its own: the kernel may have to free memory first.
    ///
    /// # Errors
    /// As [`Cgroup::limit`].
    pub async fn limit_async(&self, resources: LinuxResources) -> Result<(), CgroupError> {
        let cgroup = self.clone();
        in_a_thread(move || cgroup.limit(&resources)).await
    }

    /// [`Cgroup::add`] of several processes, in a thread of its own.
    ///
    /// # Errors
    /// As [`Cgroup::add`].
    pub async fn add_async(&self, pids: Vec<u32>) -> Result<(), CgroupError> {
        let cgroup = self.clone();
        in_a_thread(move || pids.into_iter().try_for_each(|pid| cgroup.add(pid))).await
    }

    /// Reads the usage.
    ///
    /// # Errors
    /// When the cgroup does not exist.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        if self.systemd {
            return stats::of_scope(&self.directory())
                .map_err(|source| CgroupError::Stats { path: self.path.clone(), source });
        }
        let cgroup = self.files()?;
        let stats = cgroup.stats().map_err(self.failed())?;
        Ok(if matches!(cgroup, AnyCgroupManager::V1(_)) { in_units_of_v2(stats) } else { stats })
    }

    /// Removes the cgroup, and kills the processes that are still in it. A cgroup that does not
    /// exist is no error.
    ///
    /// # Errors
    /// When the host does not allow it, or a process in the cgroup does not die.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + DYING;
        let gone = self.kept(|cgroup| {
            // One attempt of libcgroups takes at most a tenth of a second.
            loop {
                if self.systemd {
                    kill(cgroup);
                }
                match cgroup.remove() {
                    Err(_) if Instant::now() < deadline => {}
                    // systemd removes the cgroup later.
                    Ok(()) if self.systemd && cgroup.get_all_pids().is_ok() => {
                        if Instant::now() >= deadline {
                            return Ok(false);
                        }
                        thread::sleep(ASKED);
                    }
                    removed => return removed.map(|()| true),
                }
            }
        })?;
        if gone { Ok(()) } else { Err(CgroupError::Stays(self.path.clone())) }
    }

    /// Acts on the cgroup through systemd if it is a unit, otherwise through its files.
    fn kept<T: Send>(
        &self,
        act: impl FnOnce(&AnyCgroupManager) -> Result<T, AnyManagerError> + Send,
    ) -> Result<T, CgroupError> {
        let act = || act(&self.by(self.path.clone(), self.systemd)?).map_err(self.failed());
        if self.systemd { Self::apart(act) } else { act() }
    }

    /// Runs `act` in a thread with a descriptor table of its own, which is closed when the thread
    /// ends. libcgroups closes neither its connection to systemd nor the device programs (BPF) that
    /// it loads, and programs that are started meanwhile would inherit the connection.
    fn apart<T: Send>(
        act: impl FnOnce() -> Result<T, CgroupError> + Send,
    ) -> Result<T, CgroupError> {
        let apart = || {
            unshare(CloneFlags::CLONE_FILES).map_err(|error| CgroupError::Thread(error.into()))?;
            act()
        };
        let ended = thread::scope(|scope| scope.spawn(apart).join());
        ended.unwrap_or_else(|_| Err(CgroupError::Thread(io::Error::other("it panicked"))))
    }

    /// Opens the cgroup through its files, even if it is a unit of systemd.
    fn files(&self) -> Result<AnyCgroupManager, CgroupError> {
        self.by(self.in_hierarchy(), false)
    }

    /// Its path from the root of the hierarchies.
    fn in_hierarchy(&self) -> PathBuf {
        if self.systemd { units::path(&self.path) } else { self.path.clone() }
    }

    /// Its directory on a host with cgroup v2.
    fn directory(&self) -> PathBuf {
        let path = self.in_hierarchy();
        Path::new(DEFAULT_CGROUP_ROOT).join(path.strip_prefix("/").unwrap_or(&path))
    }

    fn by(
        &self,
        cgroup_path: PathBuf,
        systemd_cgroup: bool,
    ) -> Result<AnyCgroupManager, CgroupError> {
        let container_name = self.container.to_string();
        let config = CgroupConfig { cgroup_path, systemd_cgroup, container_name };
        create_cgroup_manager(config)
            .map_err(|reason| CgroupError::Open { path: self.path.clone(), reason: reason.into() })
    }

    fn failed(&self) -> impl FnOnce(AnyManagerError) -> CgroupError {
        |reason| CgroupError::Use { path: self.path.clone(), reason: reason.into() }
    }
}

/// Runs blocking work in a separate thread.
async fn in_a_thread<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, CgroupError> + Send + 'static,
) -> Result<T, CgroupError> {
    let done = spawn_blocking(act).await;
    done.unwrap_or_else(|error| Err(CgroupError::Thread(error.into())))
}

fn options(resources: &LinuxResources) -> ControllerOpt<'_> {
    ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None }
}

/// Kills all processes of the cgroup; systemd would send SIGTERM first, and wait.
fn kill(cgroup: &AnyCgroupManager) {
    for pid in cgroup.get_all_pids().unwrap_or_default() {
        if let Some(pid) = rustix::process::Pid::from_raw(pid.as_raw()) {
            // The process may have ended meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Moves this process to the root of the hierarchies, so that its cgroup can be removed. This takes
/// some milliseconds, because the kernel waits for an RCU grace period.
///
/// # Errors
/// When the host does not allow it.
pub fn leave(container: &ContainerId) -> Result<(), CgroupError> {
    let own = paths_of(std::process::id()).unwrap_or_default();
    if !own.is_empty() && own.iter().all(|(_, path)| path.as_os_str().is_empty()) {
        return Ok(());
    }
    let root = Cgroup { path: "/".into(), systemd: false, container: container.clone() };
    root.add(std::process::id())
}

/// The cgroups of a process: for each hierarchy the names of its controllers, which are empty for
/// version 2, and the path from its root, which is empty for the root itself.
fn paths_of(pid: u32) -> io::Result<Vec<(String, PathBuf)>> {
    let listed = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let paths = listed.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
        Some((controllers.to_owned(), path.into()))
    });
    Ok(paths.collect())
}

/// Converts numbers of version 1 to those of version 2: times in microseconds, swap without memory.
fn in_units_of_v2(mut stats: Stats) -> Stats {
    let usage = &mut stats.cpu.usage;
    usage.usage_total /= NANOSECONDS;
    usage.usage_user *= TICK;
    usage.usage_kernel *= TICK;
    stats.cpu.throttling.throttled_time /= NANOSECONDS;
    let (memory, swap) = (&stats.memory.memory, &mut stats.memory.memswap);
    swap.usage = swap.usage.saturating_sub(memory.usage);
    swap.limit = swap.limit.saturating_sub(memory.limit);
    stats
}

/// The number after a name in a file such as `memory.events`; 0 if the name is missing.
#[must_use]
fn flat(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// Where a relative path of cgroup v2 starts: at the parent of this process's own cgroup. The own
/// cgroup contains processes, so it cannot have limited cgroups below it.
fn beside_own() -> Result<PathBuf, CgroupError> {
    let listed = paths_of(std::process::id()).map_err(CgroupError::Own)?;
    let own = listed.into_iter().find(|(controllers, _)| controllers.is_empty());
    let (_, own) = own.ok_or_else(|| CgroupError::Own(io::ErrorKind::NotFound.into()))?;
    Ok(Path::new("/").join(own.parent().unwrap_or(Path::new(""))))
}

/// Resolves `.` and `..` to an absolute path that is never above the root.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        for (path, expected) in [
            ("/docker/x", "/docker/x"),
            ("/../..//etc/./x", "/etc/x"),
            ("/a/../../b", "/b"),
            ("/", "/"),
        ] {
            assert_eq!(clean(Path::new(path)), Path::new(expected));
        }
    }

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let events = "oom 2\noom_kill 3\noom_group_kill 4\n";
        assert_eq!((flat(events, "oom"), flat(events, "oom_kill")), (2, 3));
        assert_eq!((flat(events, "max"), flat("", "oom")), (0, 0));
    }

    #[test]
    fn numbers_of_v1_are_told_as_those_of_v2() {
        let mut stats = Stats::default();
        stats.cpu.usage.usage_total = 7_000_000;
        stats.cpu.usage.usage_user = 3;
        stats.memory.memory.usage = 5;
        stats.memory.memswap.usage = 7;
        let stats = in_units_of_v2(stats);
        assert_eq!((stats.cpu.usage.usage_total, stats.cpu.usage.usage_user), (7_000, 30_000));
        assert_eq!(stats.memory.memswap.usage, 2);
    }
}
