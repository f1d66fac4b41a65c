//! Reads a file that only root can have written: no other user may write to the file, to a directory
//! on the way to it, or to a link. Each component is opened relative to the one before, so what is
//! checked is what is read.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat};
use rustix::io::Errno;

use super::PolicyError;

/// The host's policy.
pub(super) const FILE: &str = "/etc/bulkhead/config.toml";
/// The largest file that is read.
pub(super) const BYTES_MAX: u64 = 1 << 20;
/// How many links are followed, as by the kernel.
const LINKS_MAX: usize = 40;

/// Why a file is not trusted.
#[derive(Debug, PartialEq, Eq)]
pub struct Distrust {
    /// The file, a directory on the way or a link.
    path: PathBuf,
    reason: Reason,
}

#[derive(Debug, PartialEq, Eq)]
enum Reason {
    /// It belongs to another user.
    Owner(u32),
    /// Others may write to it, by its mode.
    Writable(u32),
    /// It is not a regular file.
    Kind,
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.reason {
            Reason::Owner(user) => write!(
                f,
                "{path} belongs to user {user}; give it to root with \"chown root:root {path}\""
            ),
            Reason::Writable(mode) => write!(
                f,
                "others than root may write to {path} (mode {mode:04o}); take that away with \
                 \"chmod go-w {path}\""
            ),
            Reason::Kind => write!(f, "{path} is not a regular file"),
        }
    }
}

/// Reads a file that only `owner` can have written; `None` if there is none.
pub(super) fn read(path: &Path, owner: u32) -> Result<Option<String>, PolicyError> {
    let unreadable = |error: io::Error| PolicyError::Unreadable(path.to_owned(), error);
    let absolute = std::path::absolute(path).map_err(unreadable)?;
    let file = match (Walk { owner, at: PathBuf::from("/"), links: 0 }).to(&absolute) {
        Ok(file) => file,
        Err(Stop::Distrust(distrust)) => {
            return Err(PolicyError::Untrusted { file: path.to_owned(), distrust });
        }
        Err(Stop::Io(Errno::NOENT)) => return Ok(None),
        Err(Stop::Io(error)) => return Err(unreadable(error.into())),
    };
    let mut text = String::new();
    let read = file.take(BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if read as u64 > BYTES_MAX {
        return Err(PolicyError::TooLarge(path.to_owned()));
    }
    Ok(Some(text))
}

enum Stop {
    Distrust(Distrust),
    Io(Errno),
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Self {
        Self::Io(error)
    }
}

/// The way to a file.
struct Walk {
    owner: u32,
    /// Where it has led to.
    at: PathBuf,
    links: usize,
}

impl Walk {
    /// Goes there and opens the file.
    fn to(mut self, path: &Path) -> Result<File, Stop> {
        let mut left = names(path);
        let mut directory = self.root()?;
        while let Some(name) = left.pop_front() {
            let path = self.at.join(&name);
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = openat(&directory, &name, flags, Mode::empty())?;
            let stat = fstat(&found)?;
            self.check(&path, &stat)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Symlink => {
                    let target = readlinkat(&found, "", Vec::new())?;
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    self.links += 1;
                    if self.links > LINKS_MAX {
                        return Err(Errno::LOOP.into());
                    }
                    if target.is_absolute() {
                        directory = self.root()?;
                    }
                    for name in names(&target).into_iter().rev() {
                        left.push_front(name);
                    }
                }
                FileType::Directory if !left.is_empty() => {
                    directory = found;
                    self.at = path;
                }
                FileType::RegularFile if left.is_empty() => {
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let file = openat(&directory, &name, flags, Mode::empty())?;
                    return Ok(file.into());
                }
                _ => return Err(Stop::Distrust(Distrust { path, reason: Reason::Kind })),
            }
        }
        Err(Errno::ISDIR.into())
    }

    fn root(&mut self) -> Result<OwnedFd, Stop> {
        self.at = PathBuf::from("/");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, "/", flags, Mode::empty())?;
        self.check(Path::new("/"), &fstat(&root)?)?;
        Ok(root)
    }

    /// Root owns it, and others may not write to it. In a directory like `/tmp`, which all may
    /// write to, nobody can replace what is root's. The mode of a link means nothing.
    fn check(&self, path: &Path, stat: &Stat) -> Result<(), Stop> {
        let distrust = |reason| Err(Stop::Distrust(Distrust { path: path.to_owned(), reason }));
        if stat.st_uid != self.owner && stat.st_uid != 0 {
            return distrust(Reason::Owner(stat.st_uid));
        }
        let kind = FileType::from_raw_mode(stat.st_mode);
        let sticky = kind == FileType::Directory && stat.st_mode & 0o1000 != 0;
        if kind != FileType::Symlink && stat.st_mode & 0o022 != 0 && !sticky {
            return distrust(Reason::Writable(stat.st_mode & 0o7777));
        }
        Ok(())
    }
}

/// The names of a path, one after the other.
fn names(path: &Path) -> VecDeque<OsString> {
    let names = path.iter().filter(|name| *name != OsStr::new("/"));
    names.map(OsStr::to_owned).collect()
}
