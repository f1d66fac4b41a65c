//! Containers that share a machine. Who names a namespace of a running container, by the number of
//! the process that stands for it or by the network namespace that this process is in, asks to be
//! in the same pod: `--network container:X` of Docker, a pod of Podman.
//!
//! On the host a stand-in has none of these namespaces but the network; they are inside.

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

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name.
    pub id: ContainerId,
    /// Its pod's supervisor.
    keeper: Process,
    /// The number of the process that stands for it.
    stand_in: u32,
}

impl Neighbours {
    /// Those of a root, as they are now.
    ///
    /// # Errors
    /// When the root cannot be listed.
    pub fn of(root: &Path) -> Result<Self, StateError> {
        let running = |home: Home| {
            // One that is being made or removed has no state that can be read.
            let state = home.read().ok()?;
            let lives =
                matches!(state.observed(), Status::Created | Status::Running | Status::Paused);
            let stand_in = state.stand_in.filter(|_| lives)?.pid;
            Some(Neighbour { id: home.id().clone(), keeper: state.keeper?, stand_in })
        };
        Ok(Self(Home::all(root)?.into_iter().filter_map(running).collect()))
    }

    /// Those that a supervisor serves.
    pub fn of_keeper(&self, keeper: Process) -> impl Iterator<Item = &ContainerId> {
        self.0.iter().filter(move |it| it.keeper == keeper).map(|it| &it.id)
    }

    /// The one whose namespace the path is.
    #[must_use]
    pub fn owner(&self, kind: LinuxNamespaceType, path: &Path) -> Option<&Neighbour> {
        let named = |neighbour: &&Neighbour| *path == of_process(neighbour.stand_in, kind);
        self.0.iter().find(named).or_else(|| match kind {
            LinuxNamespaceType::Network => self.in_network(path),
            _ => None,
        })
    }

    /// The one whose stand-in is in this network, unless that is this process's own: one in the
    /// foreground stays where its caller is.
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

/// Where the kernel has a namespace of a process.
#[must_use]
pub fn of_process(pid: u32, kind: LinuxNamespaceType) -> PathBuf {
    format!("/proc/{pid}/ns/{kind}").into()
}

/// The namespaces of neighbours that a container joins: none if it gets a machine of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Joined(Vec<(LinuxNamespaceType, Neighbour)>);

impl Joined {
    /// Notes one.
    pub fn add(&mut self, kind: LinuxNamespaceType, neighbour: &Neighbour) {
        self.0.push((kind, neighbour.clone()));
    }

    /// Checks that all of it is in one machine, network included.
    ///
    /// # Errors
    /// Names what is not.
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

    /// A container of the pod, if there is one.
    #[must_use]
    pub fn pod(&self) -> Option<&ContainerId> {
        self.0.first().map(|(_, neighbour)| &neighbour.id)
    }

    /// Which namespace is whose, without the network, which is the machine's.
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
