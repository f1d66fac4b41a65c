//! A pod's cgroup on the host: the one that the specification names (OCI runtime-spec, "Control
//! groups"), with every process of the pod in it. So what the host counts is what the pod costs,
//! guest memory, monitor and supervisor included.
//!
//! libcgroups speaks to cgroup v1, v2 and systemd. What is ours is where the cgroup is, who is in it
//! when, and that nobody else's cgroup is ever taken over: removing one kills what is in it.

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

/// Nanoseconds of a microsecond.
const NANOSECONDS: u64 = 1000;
/// Microseconds of one of the hundredths of a second in which the kernel tells programs times.
const TICK: u64 = 10_000;
/// How long what is in a cgroup that is removed may take to die.
const DYING: Duration = Duration::from_secs(10);
/// How long systemd is left alone before it is asked again.
const ASKED: Duration = Duration::from_millis(10);

/// Why a cgroup is not as it should be.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The host's hierarchies.
    #[error("cannot use the host's cgroups in /sys/fs/cgroup: {0}")]
    Host(#[from] GetCgroupSetupError),
    /// A path in systemd's form was not given.
    #[error(
        "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got \
         {0:?} instead; leave --systemd-cgroup out for a path"
    )]
    NotAUnit(PathBuf),
    /// systemd with old cgroups.
    #[error("--systemd-cgroup needs a host with cgroup v2; leave it out")]
    UnitOnV1,
    /// It cannot be opened. (The crate's errors repeat their causes, so the chain ends here.)
    #[error("cgroup {}: {reason}", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: Box<CreateCgroupSetupError>,
    },
    /// It cannot be made, entered, limited, read or removed.
    #[error("cgroup {}: {reason}", .path.display())]
    Use {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: Box<AnyManagerError>,
    },
    /// Somebody else's.
    #[error(
        "container's cgroup is not empty: {count} process(es) found in {}; name another with \
         linux.cgroupsPath", .path.display()
    )]
    Taken {
        /// Which.
        path: PathBuf,
        /// Who is there.
        count: usize,
    },
    /// What it uses cannot be read.
    #[error("cannot read the usage of cgroup {}", .path.display())]
    Stats {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// systemd does not remove it.
    #[error("unit {} is still there {} s after systemd was asked to stop it", .0.display(), DYING.as_secs())]
    Stays(PathBuf),
    /// It cannot be done apart.
    #[error("the thread that sets cgroups")]
    Thread(#[source] io::Error),
    /// Where this process is cannot be read.
    #[error("/proc/self/cgroup")]
    Own(#[source] io::Error),
}

/// The name of a pod's cgroup; it need not exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// From the root of the hierarchies, or `slice:prefix:name`.
    path: PathBuf,
    /// It is a unit of systemd.
    systemd: bool,
    container: ContainerId,
}

impl Cgroup {
    /// The cgroup that a container's `linux.cgroupsPath` names. As under runc, a relative one is
    /// beside the caller's own, and one that is not given has the container's name.
    ///
    /// # Errors
    /// [`CgroupError::NotAUnit`] for a path where systemd is asked; when the host has no cgroups.
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

    /// The cgroup of cgroup v2 that a process is in, if it is one of the container's own: it has the
    /// container's name in its own.
    #[must_use]
    pub fn of_process(pid: u32, container: &ContainerId) -> Option<Self> {
        let unified = paths_of(pid).ok()?.into_iter().find(|(kind, _)| kind.is_empty())?.1;
        let named = unified.file_name()?.to_str()?.contains(container.as_str());
        let path = Path::new("/").join(unified);
        named.then(|| Self { path, systemd: false, container: container.clone() })
    }

    /// Checks that nobody is in it. Only then is it the container's, to be removed with it.
    ///
    /// # Errors
    /// [`CgroupError::Taken`].
    pub fn check_free(&self) -> Result<(), CgroupError> {
        // One that does not exist cannot be listed.
        let count = self.kept(|cgroup| Ok(cgroup.get_all_pids().map_or(0, |pids| pids.len())))?;
        match count {
            0 => Ok(()),
            count => Err(CgroupError::Taken { path: self.path.clone(), count }),
        }
    }

    /// Makes it if need be and moves a process into it.
    ///
    /// # Errors
    /// When the host does not let it.
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

    /// Sets limits; what they leave out stays as it is.
    ///
    /// # Errors
    /// When the host has no such limit, or refuses the value.
    pub fn limit(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let mut resources = resources.clone();
        if self.systemd {
            // So that it keeps them; what it does not know is only in the files.
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

    /// What is used.
    ///
    /// # Errors
    /// When it is not there.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        if self.systemd {
            return stats::of_scope(&self.directory())
                .map_err(|source| CgroupError::Stats { path: self.path.clone(), source });
        }
        let cgroup = self.files()?;
        let stats = cgroup.stats().map_err(self.failed())?;
        Ok(if matches!(cgroup, AnyCgroupManager::V1(_)) { in_units_of_v2(stats) } else { stats })
    }

    /// Removes it, and kills what is still in it; one that is gone already is no error.
    ///
    /// # Errors
    /// When the host does not let it, or what is in it does not die.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + DYING;
        let gone = self.kept(|cgroup| {
            // One try of libcgroups is over in a tenth of a second.
            loop {
                if self.systemd {
                    kill(cgroup);
                }
                match cgroup.remove() {
                    Err(_) if Instant::now() < deadline => {}
                    // systemd has only been asked.
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

    /// Does something with the cgroup by whoever keeps it.
    fn kept<T: Send>(
        &self,
        act: impl FnOnce(&AnyCgroupManager) -> Result<T, AnyManagerError> + Send,
    ) -> Result<T, CgroupError> {
        let act = || act(&self.by(self.path.clone(), self.systemd)?).map_err(self.failed());
        if self.systemd { Self::apart(act) } else { act() }
    }

    /// Does something in a thread that has a table of descriptors of its own, which goes with it.
    /// libcgroups neither closes its connection to systemd nor the programs for devices that it loads,
    /// and lets programs that are started meanwhile inherit the connection.
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

    /// The cgroup by its files, also where systemd keeps it.
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

/// Does something that may block where it blocks nobody.
async fn in_a_thread<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, CgroupError> + Send + 'static,
) -> Result<T, CgroupError> {
    let done = spawn_blocking(act).await;
    done.unwrap_or_else(|error| Err(CgroupError::Thread(error.into())))
}

fn options(resources: &LinuxResources) -> ControllerOpt<'_> {
    ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None }
}

/// Kills who is in it; systemd would ask them to end, and wait.
fn kill(cgroup: &AnyCgroupManager) {
    for pid in cgroup.get_all_pids().unwrap_or_default() {
        if let Some(pid) = rustix::process::Pid::from_raw(pid.as_raw()) {
            // It may have ended meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Moves this process to the root of the hierarchies, where it does not keep a cgroup from being
/// removed. Takes the kernel some milliseconds, in which it waits for a grace period.
///
/// # Errors
/// When the host does not let it.
pub fn leave(container: &ContainerId) -> Result<(), CgroupError> {
    let own = paths_of(std::process::id()).unwrap_or_default();
    if !own.is_empty() && own.iter().all(|(_, path)| path.as_os_str().is_empty()) {
        return Ok(());
    }
    let root = Cgroup { path: "/".into(), systemd: false, container: container.clone() };
    root.add(std::process::id())
}

/// The cgroups of a process: the controllers of each hierarchy, none for version 2, and the path from
/// its root, empty for the root itself.
fn paths_of(pid: u32) -> io::Result<Vec<(String, PathBuf)>> {
    let listed = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let paths = listed.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
        Some((controllers.to_owned(), path.into()))
    });
    Ok(paths.collect())
}

/// Numbers of version 1 as version 2 has them: times in microseconds, swap without memory.
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

/// The number behind a name in a file such as `memory.events`; 0 when it is not there.
#[must_use]
fn flat(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// Where a relative path of cgroup v2 begins: the parent of this process's own cgroup, as processes
/// in it keep it from having limited ones below.
fn beside_own() -> Result<PathBuf, CgroupError> {
    let listed = paths_of(std::process::id()).map_err(CgroupError::Own)?;
    let own = listed.into_iter().find(|(controllers, _)| controllers.is_empty());
    let (_, own) = own.ok_or_else(|| CgroupError::Own(io::ErrorKind::NotFound.into()))?;
    Ok(Path::new("/").join(own.parent().unwrap_or(Path::new(""))))
}

/// An absolute path without `.` and `..`, never above the root.
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
