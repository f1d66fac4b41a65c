//! A pod's cgroup on the host: the one that the specification names (OCI runtime-spec, "Control
//! groups"), with every process of the pod in it. So what the host counts is what the pod costs,
//! guest memory, monitor and supervisor included.
//!
//! libcgroups speaks to cgroup v1, v2 and systemd. What is ours is where the cgroup is, who is in it
//! when, and that nobody else's cgroup is ever taken over: removing one kills what is in it.

mod limits;
mod lowering;

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use libcgroups::common::{
    AnyCgroupManager, AnyManagerError, CgroupConfig, CgroupManager, CgroupSetup, ControllerOpt,
    CreateCgroupSetupError, DEFAULT_CGROUP_ROOT, GetCgroupSetupError, create_cgroup_manager,
    get_cgroup_setup,
};
use libcgroups::stats::Stats;
use libcgroups_nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::limits::Limits;
use crate::id::ContainerId;

/// What a scope of systemd is called before the container's name, when nobody says it.
const SCOPE_PREFIX: &str = "bulkhead";
/// How long what is in a cgroup that is removed may take to die.
const DYING: Duration = Duration::from_secs(10);

/// Why a cgroup is not as it should be.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The host's hierarchies.
    #[error("the host's cgroups in /sys/fs/cgroup cannot be used: {0}")]
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
    /// It cannot be opened.
    #[error("cgroup {}: {source}", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<CreateCgroupSetupError>,
    },
    /// It cannot be made, entered, limited, read or removed.
    #[error("cgroup {}: {source}", .path.display())]
    Use {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<AnyManagerError>,
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
            unit(container, given)?
        } else {
            let path = given.unwrap_or(Path::new(container.as_str()));
            let beside = if unified && path.is_relative() { beside_own()? } else { "/".into() };
            clean(&beside.join(path))
        };
        Ok(Self { path, systemd, container: container.clone() })
    }

    /// Checks that nobody is in it. Only then is it the container's, to be removed with it.
    ///
    /// # Errors
    /// [`CgroupError::Taken`].
    pub fn check_free(&self) -> Result<(), CgroupError> {
        // One that does not exist cannot be listed.
        let count = self.open()?.get_all_pids().map_or(0, |pids| pids.len());
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
        self.open()?.add_task(Pid::from_raw(pid.cast_signed())).map_err(self.failed())
    }

    /// Sets limits; what they leave out stays as it is.
    ///
    /// # Errors
    /// When the host has no such limit, or refuses the value.
    pub fn limit(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let options = ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        self.open()?.apply(&options).map_err(self.failed())
    }

    /// What is used.
    ///
    /// # Errors
    /// When it is not there.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        self.open()?.stats().map_err(self.failed())
    }

    /// Removes it, and kills what is still in it; one that is gone already is no error.
    ///
    /// # Errors
    /// When the host does not let it, or what is in it does not die.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let cgroup = self.open()?;
        let deadline = Instant::now() + DYING;
        // One try of libcgroups is over in a tenth of a second.
        loop {
            match cgroup.remove() {
                Err(_) if Instant::now() < deadline => {}
                removed => return removed.map_err(self.failed()),
            }
        }
    }

    fn open(&self) -> Result<AnyCgroupManager, CgroupError> {
        let config = CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: self.systemd,
            container_name: self.container.to_string(),
        };
        create_cgroup_manager(config)
            .map_err(|source| CgroupError::Open { path: self.path.clone(), source: source.into() })
    }

    fn failed(&self) -> impl FnOnce(AnyManagerError) -> CgroupError {
        |source| CgroupError::Use { path: self.path.clone(), source: source.into() }
    }
}

/// Moves this process to the root of the hierarchies, where it does not keep a cgroup from being
/// removed. Takes the kernel some milliseconds, in which it waits for a grace period.
///
/// # Errors
/// When the host does not let it.
pub fn leave(container: &ContainerId) -> Result<(), CgroupError> {
    if below_root(std::process::id()).is_ok_and(|own| own.as_os_str().is_empty()) {
        return Ok(());
    }
    let root = Cgroup { path: "/".into(), systemd: false, container: container.clone() };
    root.add(std::process::id())
}

/// The directory of a process's cgroup of version 2.
///
/// # Errors
/// When there is no such process, or no such cgroup.
pub fn unified(pid: u32) -> io::Result<PathBuf> {
    Ok(Path::new(DEFAULT_CGROUP_ROOT).join(below_root(pid)?))
}

/// The path of a process's cgroup of version 2 from the root, empty for the root itself.
fn below_root(pid: u32) -> io::Result<PathBuf> {
    let listed = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = listed.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(path.ok_or(io::ErrorKind::NotFound)?.into())
}

/// The number behind a name in a file such as `memory.events`; 0 when it is not there.
#[must_use]
pub fn flat(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// The unit of systemd: `slice:prefix:name`.
fn unit(container: &ContainerId, given: Option<&Path>) -> Result<PathBuf, CgroupError> {
    let Some(given) = given else {
        return Ok(format!("system.slice:{SCOPE_PREFIX}:{container}").into());
    };
    match given.to_str().map(|path| path.split(':').count()) {
        Some(3) => Ok(given.to_owned()),
        _ => Err(CgroupError::NotAUnit(given.to_owned())),
    }
}

/// Where a relative path of cgroup v2 begins: the parent of this process's own cgroup, as processes
/// in it keep it from having limited ones below.
fn beside_own() -> Result<PathBuf, CgroupError> {
    let own = below_root(std::process::id()).map_err(CgroupError::Own)?;
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
    fn units_have_three_parts() {
        let id: ContainerId = "c".parse().unwrap();
        assert_eq!(unit(&id, None).unwrap(), Path::new("system.slice:bulkhead:c"));
        let given = Path::new("machine.slice:libpod:1");
        assert_eq!(unit(&id, Some(given)).unwrap(), given);
        for given in ["/docker/x", "a:b", "a:b:c:d"] {
            let error = unit(&id, Some(Path::new(given))).unwrap_err().to_string();
            assert!(error.contains("slice:prefix:name") && error.contains(given), "{error}");
        }
    }
}
