//! What is known of a container on disk: `<root>/<id>/`, a directory of its own.
//!
//! `state.json` is written by the process that is responsible: the one that claims the id, then the
//! supervisor. Everybody else reads it and compares with what still runs, so whatever was killed,
//! the answer is right. Nothing here signals or starts a process.

pub mod id;
pub mod process;
pub mod socket_path;
pub mod timestamp;
pub mod users;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Hook;
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;

use crate::cgroup::Cgroup;
use crate::state::id::ContainerId;
use crate::state::process::Process;
use crate::supervisor::lifecycle::Status;

/// The OCI runtime specification whose state is written.
pub const OCI_VERSION: &str = "1.0.2";
const STATE_FILE: &str = "state.json";

/// What went wrong with a container's directory.
#[derive(Debug, Error)]
pub enum StateError {
    /// Nothing under this name.
    #[error(
        "container \"{id}\" does not exist in {}; \"bulkhead list\" shows those that do",
        .root.display()
    )]
    NoSuchContainer {
        /// The name.
        id: ContainerId,
        /// Where it was looked for.
        root: PathBuf,
    },
    /// Something under this name already.
    #[error(
        "container with given ID already exists: {id} in {}; take another id, or end that one \
         with \"bulkhead delete --force {id}\"",
        .root.display()
    )]
    Taken {
        /// The name.
        id: ContainerId,
        /// Where it is.
        root: PathBuf,
    },
    /// The file is not what this version writes.
    #[error("{} cannot be read; \"bulkhead delete --force\" removes it", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A file or directory.
    #[error("{}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The end of a container's init process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As a shell shows it: the exit code, or 128 and the signal.
    pub status: u8,
    /// When, in nanoseconds since the epoch.
    pub at_ns: u64,
    /// The guest's kernel has killed a process of the container for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
}

/// One container, as `state.json` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its name.
    pub id: ContainerId,
    /// As last written; see [`State::observed`].
    pub status: Status,
    /// Who writes this file: its death is the container's.
    pub keeper: Process,
    /// The host process that stands for the container.
    pub stand_in: Option<Process>,
    /// Monitor and file server.
    pub helpers: Vec<Process>,
    /// The bundle's directory, absolute.
    pub bundle: PathBuf,
    /// The root file system, absolute; empty until the bundle has been read.
    pub rootfs: PathBuf,
    /// When the id was claimed, RFC 3339.
    pub created: String,
    /// From the bundle.
    pub annotations: HashMap<String, String>,
    /// Once it has ended.
    pub exit: Option<Exit>,
    /// The user who claimed the id.
    pub owner: u32,
    /// The pod's cgroup on the host, once it is the container's to remove.
    pub cgroup: Option<Cgroup>,
    /// What to run on the host once the container has been deleted.
    pub poststop: Vec<Hook>,
    /// It is in a pod that another container has brought up.
    #[serde(default)]
    pub joined: bool,
    /// It has ended and its pod goes on for others: keeper and helpers are not its own any more.
    #[serde(default)]
    pub outlived: bool,
    /// The network namespace whose interfaces its pod has, unless it goes with the container.
    #[serde(default)]
    pub network: Option<PathBuf>,
}

impl State {
    /// The status by what runs: a container is stopped when any process that carries it is dead.
    #[must_use]
    pub fn observed(&self) -> Status {
        let mut carriers =
            [self.keeper].into_iter().chain(self.stand_in).chain(self.helpers.iter().copied());
        if carriers.all(Process::is_alive) { self.status } else { Status::Stopped }
    }
}

/// What `state` and `list` show, and what hooks read: the OCI state with runc's additions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// [`OCI_VERSION`].
    pub oci_version: &'static str,
    /// Its name.
    pub id: ContainerId,
    /// The process that stands for it; 0 when it is stopped.
    pub pid: u32,
    /// By what runs.
    #[serde(serialize_with = "shown")]
    pub status: Status,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The root file system.
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    /// From the bundle.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// A user's name.
    pub owner: String,
}

/// A container's directory.
#[derive(Clone, Debug)]
pub struct Home {
    root: PathBuf,
    id: ContainerId,
}

impl Home {
    /// Makes the directory of a new container, with a first state in it.
    ///
    /// # Errors
    /// [`StateError::Taken`] when the id is in use.
    pub fn claim(root: &Path, id: &ContainerId, bundle: &Path) -> Result<Self, StateError> {
        let home = Self { root: root.to_owned(), id: id.clone() };
        let mut builder = DirBuilder::new();
        builder.mode(0o711).recursive(true);
        builder.create(root).map_err(at(root))?;
        builder.mode(0o700).recursive(false);
        builder.create(home.dir()).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => {
                StateError::Taken { id: id.clone(), root: root.to_owned() }
            }
            _ => StateError::Io { path: home.dir(), source },
        })?;
        home.write(&home.first_state(bundle)?).inspect_err(|_| {
            // Nothing else is in it yet; the error that is returned says why it was given up.
            let _ = home.remove();
        })?;
        Ok(home)
    }

    fn first_state(&self, bundle: &Path) -> Result<State, StateError> {
        Ok(State {
            id: self.id.clone(),
            status: Status::Creating,
            keeper: Process::current().map_err(at(Path::new("/proc/self/stat")))?,
            stand_in: None,
            helpers: Vec::new(),
            bundle: bundle.to_owned(),
            rootfs: PathBuf::new(),
            created: timestamp::now(),
            annotations: HashMap::new(),
            exit: None,
            owner: rustix::process::geteuid().as_raw(),
            cgroup: None,
            poststop: Vec::new(),
            joined: false,
            outlived: false,
            network: None,
        })
    }

    /// The directory of a container that exists.
    ///
    /// # Errors
    /// [`StateError::NoSuchContainer`].
    pub fn open(root: &Path, id: &ContainerId) -> Result<Self, StateError> {
        let home = Self { root: root.to_owned(), id: id.clone() };
        match fs::symlink_metadata(home.dir()) {
            Ok(_) => Ok(home),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(home.missing()),
            Err(source) => Err(StateError::Io { path: home.dir(), source }),
        }
    }

    /// All containers of a root, by name.
    ///
    /// # Errors
    /// When the root cannot be listed; one that does not exist is empty.
    pub fn all(root: &Path) -> Result<Vec<Self>, StateError> {
        let io = |source| StateError::Io { path: root.to_owned(), source };
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io)?,
        };
        let mut homes = Vec::new();
        for entry in entries {
            let name = entry.map_err(io)?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok()) {
                homes.push(Self { root: root.to_owned(), id });
            }
        }
        homes.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(homes)
    }

    /// The container's name.
    #[must_use]
    pub const fn id(&self) -> &ContainerId {
        &self.id
    }

    /// The directory that holds all containers.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.root.join(self.id.as_str())
    }

    /// A file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// What was last written.
    ///
    /// # Errors
    /// When there is nothing, or nothing that can be read.
    pub fn read(&self) -> Result<State, StateError> {
        let path = self.path(STATE_FILE);
        let json = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(self.missing()),
            json => json.map_err(at(&path))?,
        };
        serde_json::from_slice(&json).map_err(|source| StateError::Unreadable { path, source })
    }

    /// Replaces what is written, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, state: &State) -> Result<(), StateError> {
        let (path, new) = (self.path(STATE_FILE), self.path("state.json.new"));
        let json = serde_json::to_vec(state)
            .map_err(|source| StateError::Unreadable { path: path.clone(), source })?;
        fs::write(&new, json).map_err(at(&new))?;
        fs::rename(&new, &path).map_err(at(&path))
    }

    /// Removes the directory; one that is gone already is no error.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(&self) -> Result<(), StateError> {
        match fs::remove_dir_all(self.dir()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StateError::Io { path: self.dir(), source: error })
            }
            _ => Ok(()),
        }
    }

    /// What callers are shown.
    #[must_use]
    pub fn view(&self, state: State) -> View {
        let status = state.observed();
        let stand_in = state.stand_in.filter(|_| status != Status::Stopped);
        View {
            oci_version: OCI_VERSION,
            pid: stand_in.map_or(0, |process| process.pid),
            status,
            owner: self.owner(&state),
            id: state.id,
            bundle: state.bundle,
            rootfs: state.rootfs,
            created: state.created,
            annotations: state.annotations.into_iter().collect(),
        }
    }

    /// The name of the user who claimed the id, as `/etc/passwd` has it; else the number.
    fn owner(&self, state: &State) -> String {
        let uid = fs::metadata(self.dir()).map_or(state.owner, |metadata| metadata.uid());
        users::name(uid)
    }

    fn missing(&self) -> StateError {
        StateError::NoSuchContainer { id: self.id.clone(), root: self.root.clone() }
    }
}

/// A status in the words of the specification, which has fewer.
fn shown<S: Serializer>(status: &Status, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(status)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StateError + use<> {
    let path = path.to_owned();
    |source| StateError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ContainerId {
        name.parse().unwrap()
    }

    #[test]
    fn an_id_is_claimed_once() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &id("a"), Path::new("/b")).unwrap();
        let state = home.read().unwrap();
        assert_eq!((state.status, state.observed()), (Status::Creating, Status::Creating));
        let error = Home::claim(root.path(), &id("a"), Path::new("/b")).unwrap_err();
        assert!(error.to_string().contains("already exists: a in /"), "{error}");
        home.remove().unwrap();
        home.remove().unwrap();
        Home::claim(root.path(), &id("a"), Path::new("/b")).unwrap();
    }

    #[test]
    fn what_does_not_exist_is_named_with_its_place() {
        let root = tempfile::tempdir().unwrap();
        let error = Home::open(root.path(), &id("nosuch")).unwrap_err();
        assert!(error.to_string().starts_with("container \"nosuch\" does not exist in /"));
        assert!(Home::all(&root.path().join("never")).unwrap().is_empty());
    }

    #[test]
    fn a_container_whose_process_is_dead_is_stopped() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &id("a"), Path::new("/b")).unwrap();
        let mut state = home.read().unwrap();
        state.status = Status::Running;
        state.stand_in = Some(state.keeper);
        state.helpers = vec![state.keeper];
        assert_eq!(state.observed(), Status::Running);
        let dead = Process { pid: state.keeper.pid, start_ticks: 1 };
        for killed in [
            State { keeper: dead, ..state.clone() },
            State { stand_in: Some(dead), ..state.clone() },
            State { helpers: vec![state.keeper, dead], ..state.clone() },
        ] {
            home.write(&killed).unwrap();
            assert_eq!(home.read().unwrap().observed(), Status::Stopped);
        }
    }

    #[test]
    fn a_state_that_cannot_be_read_says_what_removes_it() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &id("a"), Path::new("/b")).unwrap();
        fs::write(home.path(STATE_FILE), "{").unwrap();
        assert!(home.read().unwrap_err().to_string().contains("delete --force"));
    }
}
