//! Containers that share a machine. A container joins the pod of a running container if its
//! specification names a namespace of that container: by the pid of the container's stand-in, or by
//! the network namespace that the stand-in is in. Docker's `--network container:X` and Podman's
//! pods do this.
//!
//! Of these namespaces, only the network namespace exists on the host; the others are in the guest.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;

use crate::bundle::refuse::{Refusal, refuse};
use crate::state::id::ContainerId;
use crate::state::process::Process;
use crate::state::{Home, StateError};
use crate::supervisor::lifecycle::Status;

/// The containers of one root that have not ended.
#[derive(Clone, Debug, Default)]
pub struct Neighbours(Vec<Neighbour>);

/// A container that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its id.
    pub id: ContainerId,
    /// Its pod's supervisor.
    keeper: Process,
    /// The pid of its stand-in.
    stand_in: u32,
}

impl Neighbours {
    /// Returns the running containers of a root.
    ///
    /// # Errors
    /// When the root cannot be listed.
    pub fn of(root: &Path) -> Result<Self, StateError> {
        let running = |home: Home| {
            // The state of a container that is being created or removed may not be readable.
            let state = home.read().ok()?;
            let lives = !matches!(state.observed(), Status::Creating | Status::Stopped);
            let stand_in = state.stand_in.filter(|_| lives)?.pid;
            Some(Neighbour { id: home.id().clone(), keeper: state.keeper?, stand_in })
        };
        Ok(Self(Home::all(root)?.into_iter().filter_map(running).collect()))
    }

    /// The containers that a supervisor serves.
    pub fn of_keeper(&self, keeper: Process) -> impl Iterator<Item = &ContainerId> {
        self.0.iter().filter(move |it| it.keeper == keeper).map(|it| &it.id)
    }

    /// Returns the container to which the namespace at a path belongs.
    #[must_use]
    pub fn owner(&self, kind: LinuxNamespaceType, path: &Path) -> Option<&Neighbour> {
        let named = |neighbour: &&Neighbour| *path == of_process(neighbour.stand_in, kind);
        self.0.iter().find(named).or_else(|| match kind {
            LinuxNamespaceType::Network => self.in_network(path),
            _ => None,
        })
    }

    /// Returns the container whose stand-in is in the network namespace at a path. This process's
    /// own network namespace belongs to none: a stand-in in the foreground stays in the namespace
    /// of its caller.
    fn in_network(&self, path: &Path) -> Option<&Neighbour> {
        let file = |path: &Path| fs::metadata(path).ok().map(|it| (it.dev(), it.ino()));
        let network = |pid| file(&of_process(pid, LinuxNamespaceType::Network));
        let wanted = file(path)?;
        if network(std::process::id()) == Some(wanted) {
            return None;
        }
        self.0.iter().find(|neighbour| network(neighbour.stand_in) == Some(wanted))
    }
}

/// The path in `/proc` of a namespace of a process.
#[must_use]
pub fn of_process(pid: u32, kind: LinuxNamespaceType) -> PathBuf {
    format!("/proc/{pid}/ns/{kind}").into()
}

/// The namespaces of other containers that a container joins; empty if it gets a machine of its
/// own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Joined(Vec<(LinuxNamespaceType, Neighbour)>);

impl Joined {
    /// Adds a namespace.
    pub fn add(&mut self, kind: LinuxNamespaceType, neighbour: &Neighbour) {
        self.0.push((kind, neighbour.clone()));
    }

    /// Checks that all namespaces are of one machine, and that the network is among them.
    ///
    /// # Errors
    /// Names the namespaces that are in different machines, or whose network is not joined.
    pub fn check(self) -> Result<Self, Refusal> {
        let Some((kind, first)) = self.0.first() else { return Ok(self) };
        if let Some((other, second)) = self.0.iter().find(|(_, it)| it.keeper != first.keeper) {
            let what = format!(
                "linux.namespaces joins the {kind} namespace of container {} and the {other} \
                 namespace of container {}, which are in different machines",
                first.id, second.id
            );
            return Err(refuse(what, "join containers of one pod"));
        }
        if !self.0.iter().any(|(kind, _)| *kind == LinuxNamespaceType::Network) {
            let what = format!(
                "linux.namespaces joins the {kind} namespace of container {}, but not its network",
                first.id
            );
            return Err(refuse(what, "join its network too: then both are in one machine"));
        }
        Ok(self)
    }

    /// Returns a container of the pod that is joined, or `None` if none is.
    #[must_use]
    pub fn pod(&self) -> Option<&ContainerId> {
        self.0.first().map(|(_, neighbour)| &neighbour.id)
    }

    /// Returns each joined namespace and its container, without the network, which belongs to the
    /// machine.
    pub fn inside(&self) -> impl Iterator<Item = (LinuxNamespaceType, &ContainerId)> {
        let inside = self.0.iter().filter(|(kind, _)| *kind != LinuxNamespaceType::Network);
        inside.map(|(kind, neighbour)| (*kind, &neighbour.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use LinuxNamespaceType::{Ipc, Network, Pid};

    fn neighbour(name: &str, keeper: u32, stand_in: u32) -> Neighbour {
        let keeper = Process { pid: keeper, start_ticks: 1 };
        Neighbour { id: name.parse().unwrap(), keeper, stand_in }
    }

    #[test]
    fn a_namespace_is_its_whose_stand_in_the_path_names() {
        let list = Neighbours(vec![neighbour("a", 1, 70001), neighbour("b", 2, 70002)]);
        let owner = |kind, path: &str| list.owner(kind, path.as_ref()).map(|it| it.id.as_str());
        assert_eq!(owner(Ipc, "/proc/70002/ns/ipc"), Some("b"));
        assert_eq!(owner(Pid, "/proc/70001/ns/pid"), Some("a"));
        assert_eq!(owner(Network, "/proc/70001/ns/net"), Some("a"));
        assert_eq!(owner(Ipc, "/proc/70002/ns/pid"), None);
        assert_eq!(owner(Ipc, "/proc/70003/ns/ipc"), None);
    }

    #[test]
    fn the_network_of_this_process_is_nobody_elses() {
        let own = std::process::id();
        let list = Neighbours(vec![neighbour("a", 1, own)]);
        assert_eq!(list.owner(Network, "/proc/self/ns/net".as_ref()), None);
        let by_number = of_process(own, Network);
        assert_eq!(list.owner(Network, &by_number).map(|it| it.id.as_str()), Some("a"));
    }

    #[test]
    fn what_is_joined_is_in_one_machine() {
        let (a, b) = (neighbour("a", 1, 3), neighbour("b", 2, 4));
        let joined = |list: &[(LinuxNamespaceType, &Neighbour)]| {
            let mut joined = Joined::default();
            list.iter().for_each(|(kind, neighbour)| joined.add(*kind, neighbour));
            joined.check().map_err(|refusal| refusal.to_string())
        };
        assert_eq!(joined(&[]).unwrap().pod(), None);
        let both = joined(&[(Ipc, &a), (Network, &a)]).unwrap();
        assert_eq!(both.pod(), Some(&a.id));
        assert_eq!(both.inside().collect::<Vec<_>>(), [(Ipc, &a.id)]);
        let words = joined(&[(Ipc, &a), (Network, &b)]).unwrap_err();
        assert!(words.contains("container a and the net namespace of container b"), "{words}");
        let words = joined(&[(Ipc, &a)]).unwrap_err();
        assert!(words.contains("container a, but not its network; join"), "{words}");
    }
}
