//! The memory controller of a process's cgroup: of version 2
//! (Documentation/admin-guide/cgroup-v2.rst, "Memory"), or of version 1
//! (Documentation/admin-guide/cgroup-v1/memory.rst).

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcgroups::common::DEFAULT_CGROUP_ROOT;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::{flat, paths_of};

/// The controller's files in one cgroup version.
#[derive(Debug)]
struct Files {
    used: &'static str,
    limit: &'static str,
    /// The file that limits swapping, and the file whose value, written there, stops further
    /// swapping; without the second file, the value is 0.
    swap: (&'static str, Option<&'static str>),
    /// The file that counts OOM kills.
    kills: &'static str,
    /// Whether that counter increases only after [`Memory::watch`] has reported a kill.
    counts_late: bool,
}

const V1: Files = Files {
    used: "memory.usage_in_bytes",
    limit: "memory.limit_in_bytes",
    swap: ("memory.swappiness", None),
    kills: "memory.oom_control",
    counts_late: true,
};
const V2: Files = Files {
    used: "memory.current",
    limit: "memory.max",
    swap: ("memory.swap.max", Some("memory.swap.current")),
    kills: "memory.events",
    counts_late: false,
};

/// The memory limit and usage of a cgroup.
#[derive(Debug)]
pub struct Memory {
    directory: PathBuf,
    files: &'static Files,
}

/// What [`Memory::hold`] has changed.
#[derive(Debug)]
pub struct Held {
    limit: String,
    swap: Option<String>,
}

impl Memory {
    /// The memory controller of a process's cgroup.
    ///
    /// # Errors
    /// When there is no such process, or it is in no hierarchy with the controller.
    pub fn of(pid: u32) -> io::Result<Self> {
        let root = Path::new(DEFAULT_CGROUP_ROOT);
        let mut unified = None;
        for (controllers, path) in paths_of(pid)? {
            if controllers.split(',').any(|name| name == "memory") {
                return Ok(Self { directory: root.join("memory").join(path), files: &V1 });
            }
            if controllers.is_empty() {
                unified = Some(Self { directory: root.join(path), files: &V2 });
            }
        }
        unified.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// How many processes in the cgroup the OOM killer has killed.
    ///
    /// # Errors
    /// When the cgroup does not exist any more.
    pub fn kills(&self) -> io::Result<u64> {
        Ok(flat(&self.read(self.files.kills)?, "oom_kill"))
    }

    /// Whether the counter increases only after [`Memory::watch`] has reported a kill.
    #[must_use]
    pub const fn counts_late(&self) -> bool {
        self.files.counts_late
    }

    /// Returns a non-blocking descriptor that becomes readable when there may have been another
    /// kill.
    ///
    /// # Errors
    /// When the cgroup does not exist any more.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        let file = self.directory.join(self.files.kills);
        if !self.counts_late() {
            let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            inotify::add_watch(&changes, &file, WatchFlags::MODIFY)?;
            return Ok(changes);
        }
        let changes = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let kills = File::open(file)?;
        let order = format!("{} {}", changes.as_raw_fd(), kills.as_raw_fd());
        self.write("cgroup.event_control", &order)?;
        Ok(changes)
    }

    /// Stops swapping, and limits the cgroup to the memory that cannot be reclaimed plus `more`
    /// bytes.
    ///
    /// # Errors
    /// When the kernel refuses; a limit that it refuses leaves all as before.
    pub fn hold(&self, more: u64) -> io::Result<Held> {
        let stat = self.read("memory.stat")?;
        let files = flat(&stat, "active_file") + flat(&stat, "inactive_file");
        let used: u64 = self.read(self.files.used)?.trim().parse().map_err(io::Error::other)?;
        let (swap, now) = self.files.swap;
        let held = Held {
            limit: self.read(self.files.limit)?,
            // A kernel without swap does not have this file.
            swap: self.read(swap).ok(),
        };
        if held.swap.is_some() {
            let now = now.map_or_else(|| Ok("0".to_owned()), |file| self.read(file))?;
            self.write(swap, now.trim())?;
        }
        let most = used.saturating_sub(files) + more;
        let most = held.limit.trim().parse().map_or(most, |limit: u64| limit.min(most));
        match self.write(self.files.limit, &most.to_string()) {
            Ok(()) => Ok(held),
            Err(error) => self.restore(&held).and(Err(error)),
        }
    }

    /// Undoes [`Memory::hold`].
    ///
    /// # Errors
    /// When the cgroup does not exist any more.
    pub fn restore(&self, held: &Held) -> io::Result<()> {
        if let Some(swap) = &held.swap {
            self.write(self.files.swap.0, swap.trim())?;
        }
        self.write(self.files.limit, held.limit.trim())
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.directory.join(file))
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.directory.join(file), value)
    }
}

/// Reads everything from the descriptor of [`Memory::watch`].
pub fn drain(changes: &OwnedFd) {
    let mut space = [MaybeUninit::uninit(); 1024];
    // The events are discarded: the counter shows what has changed.
    while rustix::io::read(changes, &mut space).is_ok_and(|(read, _)| !read.is_empty()) {}
}
