//! A container's directory, `<root>/<id>/`: its state and its sockets.
//!
//! A [`Home`] holds the directory open, not only its name: a process that has opened the directory
//! of a container never reads or writes that of a later container with the same name. A process
//! that removes it, or does what must be done once at its end, holds its [`Lock`].
//!
//! Space for the state is reserved when it is first written, so that a file system that fills up
//! later does not keep a container from starting or ending.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{
    FlockOperation, Mode, OFlags, RenameFlags, flock, openat, renameat, renameat_with,
};
use rustix::io::Errno;
use serde_json::{Map, Value};
use thiserror::Error;

use super::State;
use super::id::ContainerId;
use super::process::{BootId, Process};
use super::timestamp;

const STATE_FILE: &str = "state.json";
/// The next state while it is written, then the previous one, whose space is used for the next.
const SPARE_FILE: &str = "state.json.new";
/// How many bytes a state can grow within the reserved space.
const SLACK: usize = 4096;
/// How often a lock that another process holds is tried again.
const ASK_AGAIN: Duration = Duration::from_millis(10);

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
    /// Another process removes it.
    #[error("container \"{0}\" is being deleted by another process; try again later")]
    Locked(ContainerId),
    /// The file is not JSON.
    #[error("{} cannot be read; \"bulkhead delete --force\" removes the container", .path.display())]
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

/// A container's directory. Clones share it.
#[derive(Clone, Debug)]
pub struct Home {
    root: PathBuf,
    id: ContainerId,
    dir: Arc<OwnedFd>,
}

/// The right to remove a container, and to do what is done once at its end. Its holder loses it by
/// dropping it, or by dying.
#[derive(Debug)]
pub struct Lock {
    home: Home,
    _held: OwnedFd,
}

impl Home {
    /// Makes the directory of a new container, with a first state in it.
    ///
    /// # Errors
    /// [`StateError::Taken`] when the id is in use.
    pub fn claim(root: &Path, id: &ContainerId, bundle: &Path) -> Result<Self, StateError> {
        let mut builder = DirBuilder::new();
        builder.mode(0o711).recursive(true);
        builder.create(root).map_err(at(root))?;
        let path = root.join(id.as_str());
        builder.mode(0o700).recursive(false);
        builder.create(&path).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => {
                StateError::Taken { id: id.clone(), root: root.to_owned() }
            }
            _ => StateError::Io { path: path.clone(), source },
        })?;
        let home = Self::open(root, id)?;
        if let Err(error) = first_state(id, bundle).and_then(|state| home.write(&state)) {
            // The directory holds nothing else yet. The returned error says why it is removed.
            let _ = home.lock(Duration::ZERO).and_then(Lock::remove);
            return Err(error);
        }
        Ok(home)
    }

    /// The directory of a container that exists.
    ///
    /// # Errors
    /// [`StateError::NoSuchContainer`].
    pub fn open(root: &Path, id: &ContainerId) -> Result<Self, StateError> {
        let path = root.join(id.as_str());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(dir) => Ok(Self { root: root.to_owned(), id: id.clone(), dir: Arc::new(dir) }),
            Err(Errno::NOENT) => {
                Err(StateError::NoSuchContainer { id: id.clone(), root: root.to_owned() })
            }
            Err(error) => Err(StateError::Io { path, source: error.into() }),
        }
    }

    /// All containers of a root, by name.
    ///
    /// # Errors
    /// When the root cannot be listed; one that does not exist is empty.
    pub fn all(root: &Path) -> Result<Vec<Self>, StateError> {
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(at(root))?,
        };
        let mut homes = Vec::new();
        for entry in entries {
            let name = entry.map_err(at(root))?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            // A container may be removed meanwhile, and a name without a directory is no container.
            homes.extend(Self::open(root, &id).ok());
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

    /// The directory's name. A later container may have it once this one is removed.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.root.join(self.id.as_str())
    }

    /// Opens a file in it, or makes one that only its owner can use.
    ///
    /// # Errors
    /// When the kernel does not allow it.
    pub fn file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(openat(&*self.dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode)?.into())
    }

    /// Whether a path leads to this very directory.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        let own = rustix::fs::fstat(&*self.dir).map(|it| (it.st_dev, it.st_ino));
        let there = fs::metadata(path).map(|it| (it.dev(), it.ino()));
        matches!((own, there), (Ok(own), Ok(there)) if own == there)
    }

    /// Reads the state that was last written.
    ///
    /// # Errors
    /// When there is no state, or it cannot be read.
    pub fn read(&self) -> Result<State, StateError> {
        let path = self.dir().join(STATE_FILE);
        let mut json = Vec::new();
        let read =
            self.file(STATE_FILE, OFlags::RDONLY).and_then(|mut file| file.read_to_end(&mut json));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(self.missing()),
            other => other.map_err(at(&path))?,
        };
        // An empty array would also be read, as a state of which nothing is known.
        let state: State = serde_json::from_slice::<Map<String, Value>>(&json)
            .and_then(|fields| serde_json::from_value(Value::Object(fields)))
            .map_err(|source| StateError::Unreadable { path, source })?;
        let boot = BootId::current().map_err(at(Path::new("/proc")))?;
        Ok(state.after_boot(&boot))
    }

    /// Replaces the state atomically.
    ///
    /// # Errors
    /// When the file cannot be written. Lack of space is no reason, unless the state has become
    /// much larger.
    pub fn write(&self, state: &State) -> Result<(), StateError> {
        let path = self.dir().join(STATE_FILE);
        let json = serde_json::to_vec(state)
            .map_err(|source| StateError::Unreadable { path: path.clone(), source })?;
        self.replace(json).map_err(at(&path))
    }

    /// Blanks after the JSON keep the space of both files reserved.
    fn replace(&self, mut json: Vec<u8>) -> io::Result<()> {
        let spare = self.file(SPARE_FILE, OFlags::RDWR | OFlags::CREATE)?;
        let before = self.file(STATE_FILE, OFlags::RDWR);
        let length =
            |file: &File| file.metadata().map_or(0, |it| usize::try_from(it.len()).unwrap_or(0));
        let had = before.as_ref().map_or(0, length).max(length(&spare));
        let room = match json.len() {
            length if length <= had => had,
            length => (length + SLACK).next_multiple_of(SLACK),
        };
        json.resize(room, b' ');
        spare.write_all_at(&json, 0)?;
        let Ok(before) = before else {
            renameat(&*self.dir, SPARE_FILE, &*self.dir, STATE_FILE)?;
            return self
                .file(SPARE_FILE, OFlags::RDWR | OFlags::CREATE)?
                .write_all_at(&vec![b' '; room], 0);
        };
        let exchange = RenameFlags::EXCHANGE;
        match renameat_with(&*self.dir, SPARE_FILE, &*self.dir, STATE_FILE, exchange) {
            // The file system cannot exchange files: no space is reserved for the next state.
            Err(Errno::INVAL | Errno::NOSYS) => {
                Ok(renameat(&*self.dir, SPARE_FILE, &*self.dir, STATE_FILE)?)
            }
            Err(error) => Err(error.into()),
            Ok(()) if length(&before) < room => {
                before.write_all_at(&vec![b' '; room - length(&before)], length(&before) as u64)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Waits for the right to remove the container; see [`Lock`].
    ///
    /// # Errors
    /// [`StateError::Locked`] when another process holds it for so long,
    /// [`StateError::NoSuchContainer`] when there is nothing to remove any more.
    pub fn lock(&self, patience: Duration) -> Result<Lock, StateError> {
        let (path, deadline) = (self.dir(), Instant::now() + patience);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // Opened again, because flock(2) locks the open file description, not the process.
        let held = openat(&*self.dir, ".", flags, Mode::empty());
        let held = held.map_err(|error| self.gone_or(error))?;
        loop {
            match flock(&held, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if self.is_at(&path) => {
                    return Ok(Lock { home: self.clone(), _held: held });
                }
                Ok(()) => return Err(self.missing()),
                Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(ASK_AGAIN),
                Err(Errno::AGAIN) => return Err(StateError::Locked(self.id.clone())),
                Err(error) => return Err(self.gone_or(error)),
            }
        }
    }

    fn gone_or(&self, error: Errno) -> StateError {
        match error {
            Errno::NOENT => self.missing(),
            error => StateError::Io { path: self.dir(), source: error.into() },
        }
    }

    fn missing(&self) -> StateError {
        StateError::NoSuchContainer { id: self.id.clone(), root: self.root.clone() }
    }
}

impl AsFd for Home {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl Lock {
    /// The directory of the container.
    #[must_use]
    pub const fn home(&self) -> &Home {
        &self.home
    }

    /// Removes the directory.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(self) -> Result<(), StateError> {
        let path = self.home.dir();
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StateError::Io { path, source: error })
            }
            _ => Ok(()),
        }
    }
}

fn first_state(id: &ContainerId, bundle: &Path) -> Result<State, StateError> {
    let failed = || at(Path::new("/proc"));
    Ok(State {
        id: Some(id.clone()),
        boot: Some(BootId::current().map_err(failed())?),
        status: crate::supervisor::lifecycle::Status::Creating,
        keeper: Some(Process::current().map_err(failed())?),
        bundle: bundle.to_owned(),
        created: timestamp::now(),
        owner: rustix::process::geteuid().as_raw(),
        ..State::default()
    })
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StateError + use<> {
    let path = path.to_owned();
    |source| StateError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::lifecycle::Status;

    fn id(name: &str) -> ContainerId {
        name.parse().unwrap()
    }

    fn claimed(root: &Path) -> Home {
        Home::claim(root, &id("a"), Path::new("/b")).unwrap()
    }

    fn remove(home: &Home) {
        home.lock(Duration::ZERO).unwrap().remove().unwrap();
    }

    #[test]
    fn an_id_is_claimed_once() {
        let root = tempfile::tempdir().unwrap();
        let home = claimed(root.path());
        let state = home.read().unwrap();
        assert_eq!((state.status, state.observed()), (Status::Creating, Status::Creating));
        let error = Home::claim(root.path(), &id("a"), Path::new("/b")).unwrap_err();
        assert!(error.to_string().contains("already exists: a in /"), "{error}");
        remove(&home);
        assert!(matches!(home.lock(Duration::ZERO), Err(StateError::NoSuchContainer { .. })));
        claimed(root.path());
    }

    #[test]
    fn what_does_not_exist_is_named_with_its_place() {
        let root = tempfile::tempdir().unwrap();
        let error = Home::open(root.path(), &id("nosuch")).unwrap_err();
        assert!(error.to_string().starts_with("container \"nosuch\" does not exist in /"));
        assert!(Home::all(&root.path().join("never")).unwrap().is_empty());
    }

    #[test]
    fn a_later_container_of_the_same_name_is_another() {
        let root = tempfile::tempdir().unwrap();
        let first = claimed(root.path());
        let mut state = first.read().unwrap();
        remove(&first);
        let second = claimed(root.path());
        state.status = Status::Stopped;
        first.write(&state).unwrap_err();
        assert!(first.read().is_err());
        assert!(matches!(first.lock(Duration::ZERO), Err(StateError::NoSuchContainer { .. })));
        assert_eq!(second.read().unwrap().status, Status::Creating);
    }

    #[test]
    fn one_at_a_time_may_remove_a_container() {
        let root = tempfile::tempdir().unwrap();
        let home = claimed(root.path());
        let lock = home.lock(Duration::ZERO).unwrap();
        let again = Home::open(root.path(), &id("a")).unwrap();
        let error = again.lock(Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("is being deleted by another process"), "{error}");
        let waiting = thread::spawn(move || again.lock(Duration::from_secs(10)));
        thread::sleep(Duration::from_millis(50));
        lock.remove().unwrap();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(error, StateError::NoSuchContainer { .. }), "{error}");
    }

    #[test]
    fn a_state_that_cannot_be_read_says_what_removes_it() {
        let root = tempfile::tempdir().unwrap();
        let home = claimed(root.path());
        fs::write(home.dir().join(STATE_FILE), "{").unwrap();
        assert!(home.read().unwrap_err().to_string().contains("delete --force"));
    }

    #[test]
    fn a_state_takes_no_more_room_when_it_changes() {
        let root = tempfile::tempdir().unwrap();
        let home = claimed(root.path());
        let lengths = || {
            [STATE_FILE, SPARE_FILE].map(|name| fs::metadata(home.dir().join(name)).unwrap().len())
        };
        let mut state = home.read().unwrap();
        state.annotations.insert("key".to_owned(), "x".repeat(10_000));
        home.write(&state).unwrap();
        let room = lengths();
        assert_eq!(room[0], room[1]);
        state.annotations.insert("more".to_owned(), "y".repeat(2_000));
        for status in [Status::Running, Status::Stopped] {
            state.status = status;
            home.write(&state).unwrap();
            assert_eq!(lengths(), room);
            assert_eq!(home.read().unwrap(), state);
        }
    }
}
