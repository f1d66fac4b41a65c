//! What is stored on disk about a container: `<root>/<id>/`, a directory of its own ([`Home`]).
//!
//! `state.json` is written by the process that is responsible: first the one that claims the id,
//! then the supervisor. All others read it and compare it with the processes that still run, so
//! that the answer is right whichever process was killed. Nothing here signals or starts a process.
//!
//! The file is read across versions: a field that is missing, unknown or of another shape counts as
//! not known, and never makes a container unreadable.

pub mod home;
pub mod id;
pub mod process;
pub mod socket_path;
pub mod timestamp;
pub mod users;
mod view;

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::Hook;
use serde::de::{DeserializeOwned, Deserializer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::home::{Home, StateError};
use self::id::ContainerId;
use self::process::{BootId, Process};
pub use self::view::{OCI_VERSION, View};
use crate::cgroup::Cgroup;
use crate::supervisor::lifecycle::Status;

/// The end of a container's init process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As a shell shows it: the exit code, or 128 and the signal.
    pub status: u8,
    /// When, in nanoseconds since the epoch.
    pub at_ns: u64,
    /// The guest's kernel has killed a process of the container because memory ran out.
    #[serde(default)]
    pub oom_killed: bool,
}

/// One container, as `state.json` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Its name; the name of the directory takes precedence.
    #[serde(deserialize_with = "if_readable")]
    pub id: Option<ContainerId>,
    /// The boot of the host in which the state was written: after another boot no process of it
    /// runs.
    #[serde(deserialize_with = "if_readable")]
    pub boot: Option<BootId>,
    /// As last written; see [`State::observed`].
    #[serde(deserialize_with = "if_readable")]
    pub status: Status,
    /// The process that writes this file. When it dies, the container ends.
    #[serde(deserialize_with = "if_readable")]
    pub keeper: Option<Process>,
    /// The host process that stands for the container.
    #[serde(deserialize_with = "if_readable")]
    pub stand_in: Option<Process>,
    /// Monitor and file server.
    #[serde(deserialize_with = "if_readable")]
    pub helpers: Vec<Process>,
    /// The bundle's directory, absolute.
    #[serde(deserialize_with = "if_readable")]
    pub bundle: PathBuf,
    /// The root file system, absolute; empty until the bundle has been read.
    #[serde(deserialize_with = "if_readable")]
    pub rootfs: PathBuf,
    /// When the id was claimed, RFC 3339.
    #[serde(deserialize_with = "if_readable")]
    pub created: String,
    /// From the bundle.
    #[serde(deserialize_with = "if_readable")]
    pub annotations: HashMap<String, String>,
    /// How it has ended, once it has.
    #[serde(deserialize_with = "if_readable")]
    pub exit: Option<Exit>,
    /// The user who claimed the id.
    #[serde(deserialize_with = "if_readable")]
    pub owner: u32,
    /// The pod's cgroup on the host, once the container has to remove it.
    #[serde(deserialize_with = "if_readable")]
    pub cgroup: Option<Cgroup>,
    /// What to run on the host once the container has been deleted.
    #[serde(deserialize_with = "if_readable")]
    pub poststop: Vec<Hook>,
    /// It has joined the pod of another container.
    #[serde(deserialize_with = "if_readable")]
    pub joined: bool,
    /// It has ended, but its pod goes on for others: keeper and helpers are no longer its own.
    #[serde(deserialize_with = "if_readable")]
    pub outlived: bool,
    /// The network namespace that its pod mirrors, unless the namespace ends with the container.
    #[serde(deserialize_with = "if_readable")]
    pub network: Option<PathBuf>,
}

/// Reads a field, or its default if it has another shape.
fn if_readable<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).unwrap_or_default())
}

impl Default for State {
    /// Nothing is known.
    fn default() -> Self {
        Self {
            id: None,
            boot: None,
            status: Status::default(),
            keeper: None,
            stand_in: None,
            helpers: Vec::new(),
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            created: String::new(),
            annotations: HashMap::new(),
            exit: None,
            owner: 0,
            cgroup: None,
            poststop: Vec::new(),
            joined: false,
            outlived: false,
            network: None,
        }
    }
}

impl State {
    /// The status, checked against what runs: a container is stopped when its keeper, its stand-in
    /// or a helper is dead.
    #[must_use]
    pub fn observed(&self) -> Status {
        let carriers = self.stand_in.into_iter().chain(self.helpers.iter().copied());
        let keeper_lives = self.keeper.is_some_and(Process::is_alive);
        if keeper_lives && carriers.into_iter().all(Process::is_alive) {
            self.status
        } else {
            Status::Stopped
        }
    }

    /// The container's own processes; those of a pod that goes on for others are not its own.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        // The keeper first: otherwise it would start to take the others down.
        let pod = self.keeper.into_iter().chain(self.helpers.iter().copied());
        pod.filter(|_| !self.outlived).chain(self.stand_in).collect()
    }

    /// Forgets the processes and paths of another boot of the host: they belong to others now.
    fn after_boot(mut self, boot: &BootId) -> Self {
        if self.boot.as_ref().is_some_and(|written| written != boot) {
            self.status = Status::Stopped;
            (self.keeper, self.stand_in, self.helpers) = (None, None, Vec::new());
            (self.cgroup, self.network) = (None, None);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What the first versions wrote.
    const FIRST: &str = r#"{"id":"a","status":"running","keeper":{"pid":1,"start_ticks":2},
        "stand_in":null,"helpers":[{"pid":3,"start_ticks":4}],"bundle":"/b","rootfs":"/b/rootfs",
        "created":"T","annotations":{"k":"v"},"exit":null,"owner":0,"cgroup":null,"poststop":[]}"#;

    #[test]
    fn a_state_of_another_version_is_read() {
        let first: State = serde_json::from_str(FIRST).unwrap();
        assert_eq!(first.keeper, Some(Process { pid: 1, start_ticks: 2 }));
        assert_eq!((first.status, first.joined, first.boot), (Status::Running, false, None));
        let later = json!({
            "status": "hibernating", "keeper": {"pidfd": 7}, "helpers": [{"pid": 3, "start_ticks": 4}],
            "exit": {"code": 3}, "cgroup": "/c", "more": [1, 2]
        });
        let later: State = serde_json::from_value(later).unwrap();
        assert_eq!(later.helpers, [Process { pid: 3, start_ticks: 4 }]);
        assert_eq!((later.keeper, later.exit, later.cgroup), (None, None, None));
        assert_eq!(serde_json::from_str::<State>("{}").unwrap(), State::default());
        assert!(serde_json::from_str::<State>("{").is_err());
    }

    #[test]
    fn a_container_whose_process_is_dead_is_stopped() {
        let own = Process::current().unwrap();
        let state = State {
            status: Status::Running,
            keeper: Some(own),
            stand_in: Some(own),
            helpers: vec![own],
            ..State::default()
        };
        assert_eq!(state.observed(), Status::Running);
        let dead = Process { pid: own.pid, start_ticks: 1 };
        for killed in [
            State { keeper: Some(dead), ..state.clone() },
            State { keeper: None, ..state.clone() },
            State { stand_in: Some(dead), ..state.clone() },
            State { helpers: vec![own, dead], ..state.clone() },
        ] {
            assert_eq!(killed.observed(), Status::Stopped);
        }
    }

    #[test]
    fn processes_of_another_boot_are_nobodys() {
        let boot = |name: &str| serde_json::from_value::<BootId>(json!(name)).unwrap();
        let own = Process::current().unwrap();
        let running = State {
            boot: Some(boot("before")),
            keeper: Some(own),
            stand_in: Some(own),
            network: Some("/n".into()),
            ..State::default()
        };
        assert_eq!(running.clone().after_boot(&boot("before")), running);
        let later = running.clone().after_boot(&boot("after"));
        assert_eq!(
            (later.status, later.processes(), later.network),
            (Status::Stopped, vec![], None)
        );
        let unknown = State { boot: None, ..running };
        assert_eq!(unknown.clone().after_boot(&boot("after")), unknown);
    }

    #[test]
    fn a_pod_that_goes_on_is_not_its_containers() {
        let own = Process::current().unwrap();
        let other = Process { start_ticks: 1, ..own };
        let ended = State {
            keeper: Some(own),
            helpers: vec![own],
            stand_in: Some(other),
            ..State::default()
        };
        assert_eq!(ended.processes(), [own, own, other]);
        assert_eq!(State { outlived: true, ..ended }.processes(), [other]);
    }
}
