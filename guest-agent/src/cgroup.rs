//! A container's cgroup (cgroup v2, Documentation/admin-guide/cgroup-v2.rst), which is below that of
//! all containers: lists, freezes and kills its processes, sets its limits, removes it, and tells
//! whether its memory limit has killed a process. libcontainer sets the first limits.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcgroups::common::{CgroupManager as _, ControllerOpt};
use libcgroups::v2::manager::{Manager, V2ManagerError};
use oci_spec::runtime::LinuxResources;
use tokio::time::{Instant, sleep};

/// Where the cgroup file system is.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// The cgroup of all containers, below [`ROOT`].
pub(crate) const CONTAINERS: &str = "containers";
/// The most processes that are listed.
const PROCESSES: usize = 100_000;
/// How long the processes of a removed cgroup may take to die.
const DYING: Duration = Duration::from_secs(10);
/// How long the processes of a cgroup may take to freeze.
const FREEZING: Duration = Duration::from_secs(10);

/// One container's cgroup, with those below it. It need not exist.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// The path of a container's cgroup in the hierarchy, as specifications have it.
    pub(crate) fn path(container_id: &str) -> PathBuf {
        Path::new("/").join(CONTAINERS).join(container_id)
    }

    /// The cgroup of the container with this id.
    pub(crate) fn of(container_id: &str) -> Self {
        Self(Path::new(ROOT).join(CONTAINERS).join(container_id))
    }

    /// The pids in it and below it, in order; at most [`PROCESSES`].
    ///
    /// # Errors
    /// A list of processes cannot be read.
    pub(crate) fn processes(&self) -> io::Result<Vec<u32>> {
        let mut pids = BTreeSet::new();
        for directory in tree(&self.0)? {
            let listed = match fs::read_to_string(directory.join("cgroup.procs")) {
                Ok(listed) => listed,
                // Gone meanwhile, or a threaded cgroup, whose processes its parent lists.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let listed = listed.lines().filter_map(|line| line.parse::<u32>().ok());
            pids.extend(listed.filter(|pid| *pid != 0).take(PROCESSES - pids.len()));
        }
        Ok(pids.into_iter().collect())
    }

    /// The cgroup below it, that of the container's init, which a further process joins. `None` if
    /// a process can join this cgroup itself. It cannot if the cgroup enables controllers for its
    /// children, as it does when systemd is the container's init.
    ///
    /// # Errors
    /// The list of controllers or the init's cgroup cannot be read.
    pub(crate) fn joined(&self, init: u32) -> io::Result<Option<PathBuf>> {
        if fs::read_to_string(self.0.join("cgroup.subtree_control"))?.trim().is_empty() {
            return Ok(None);
        }
        let listed = fs::read_to_string(format!("/proc/{init}/cgroup"))?;
        let path = listed.lines().find_map(|line| line.strip_prefix("0::/"));
        let below = self.0.strip_prefix(ROOT).unwrap_or(&self.0);
        let path = path.and_then(|path| Path::new(path).strip_prefix(below).ok());
        Ok(path.filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned))
    }

    /// Kills every process in it and below it.
    ///
    /// # Errors
    /// It exists and the kernel refuses.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match fs::write(self.0.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            killed => killed,
        }
    }

    /// Freezes every process in it and below it, and waits until all are frozen.
    ///
    /// # Errors
    /// It does not exist, or one still runs after [`FREEZING`]; all run again then.
    pub(crate) async fn freeze(&self) -> io::Result<()> {
        self.set_frozen(true)?;
        let deadline = Instant::now() + FREEZING;
        let mut pause = Duration::from_millis(1);
        while !self.is_frozen()? {
            if Instant::now() >= deadline {
                self.thaw()?;
                return Err(io::ErrorKind::TimedOut.into());
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Lets every process in it and below it run again.
    ///
    /// # Errors
    /// It does not exist.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        self.set_frozen(false)
    }

    /// Whether all of its processes are frozen.
    ///
    /// # Errors
    /// It does not exist.
    pub(crate) fn is_frozen(&self) -> io::Result<bool> {
        let events = fs::read_to_string(self.0.join("cgroup.events"))?;
        Ok(events.lines().any(|line| line == "frozen 1"))
    }

    fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.0.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Sets limits, and which devices may be used. A limit that is left out stays as it is. Without
    /// device rules, only the devices that every container has may be used.
    ///
    /// # Errors
    /// It does not exist, or the kernel refuses one.
    pub(crate) fn limit(&self, resources: &LinuxResources) -> Result<(), V2ManagerError> {
        let path = self.0.strip_prefix(ROOT).unwrap_or(&self.0);
        let options = ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        Manager::new(ROOT.into(), path.to_owned())?.apply(&options)
    }

    /// Whether the kernel has killed a process of it because memory ran out.
    pub(crate) fn oom_killed(&self) -> bool {
        let events = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        oom_kills(&events) > 0
    }

    /// Kills every process and removes the cgroup and those below it.
    ///
    /// # Errors
    /// Processes remain after [`DYING`], or a directory cannot be removed.
    pub(crate) async fn remove(&self) -> io::Result<()> {
        let deadline = Instant::now() + DYING;
        let mut pause = Duration::from_millis(1);
        loop {
            self.kill()?;
            let removed =
                tree(&self.0)?.iter().rev().try_for_each(|directory| {
                    match fs::remove_dir(directory) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                        removed => removed,
                    }
                });
            match removed {
                Err(error)
                    if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {}
                removed => return removed,
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

/// A directory and all below it, parents first; nothing if it does not exist.
fn tree(top: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![top.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        match fs::read_dir(&directory) {
            Ok(entries) => {
                for entry in entries.flatten() {
                    if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                        found.push(entry.path());
                    }
                }
                next += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                found.remove(next);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The kills that `memory.events` counts.
fn oom_kills(events: &str) -> u64 {
    number(events, "oom_kill")
}

/// The value on the line of that name in a file of a cgroup or of `/proc/vmstat`; 0 without one.
pub(crate) fn number(text: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let value = lines.find(|(found, _)| *found == name).map(|(_, value)| value.trim());
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_for_memory_are_counted() {
        assert_eq!(oom_kills("low 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n"), 1);
        assert_eq!(oom_kills("oom 2\noom_group_kill 3\n"), 0);
        assert_eq!(oom_kills(""), 0);
    }

    #[test]
    fn processes_are_listed_through_the_tree() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup(root.path().join("one"));
        assert_eq!(cgroup.processes().unwrap(), Vec::<u32>::new());
        fs::create_dir_all(cgroup.0.join("inner")).unwrap();
        fs::write(cgroup.0.join("cgroup.procs"), "7\n3\n").unwrap();
        fs::write(cgroup.0.join("inner/cgroup.procs"), "5\n0\n").unwrap();
        assert_eq!(cgroup.processes().unwrap(), [3, 5, 7]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cgroup_that_does_not_come_to_a_stand_is_thawed() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup(root.path().to_owned());
        fs::write(root.path().join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        assert_eq!(cgroup.freeze().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(fs::read_to_string(root.path().join("cgroup.freeze")).unwrap(), "0");
        fs::write(root.path().join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        cgroup.freeze().await.unwrap();
        assert_eq!(fs::read_to_string(root.path().join("cgroup.freeze")).unwrap(), "1");
    }

    #[test]
    fn a_cgroup_that_takes_processes_is_joined_itself() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup(root.path().to_owned());
        let joined = |handed_on: &str| {
            fs::write(root.path().join("cgroup.subtree_control"), handed_on).unwrap();
            cgroup.joined(std::process::id()).unwrap()
        };
        assert_eq!(joined("\n"), None);
        // This process is elsewhere.
        assert_eq!(joined("memory pids\n"), None);
        fs::remove_file(root.path().join("cgroup.subtree_control")).unwrap();
        assert!(cgroup.joined(std::process::id()).is_err());
    }

    #[tokio::test]
    async fn a_cgroup_that_is_not_there_is_removed_already() {
        let root = tempfile::tempdir().unwrap();
        Cgroup(root.path().join("none")).remove().await.unwrap();
    }

    #[test]
    fn a_tree_lists_parents_first() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b")).unwrap();
        let found = tree(root.path()).unwrap();
        assert_eq!(found, [root.path().to_owned(), root.path().join("a"), root.path().join("a/b")]);
    }
}
