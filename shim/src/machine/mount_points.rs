//! Makes the mount points in a container's root on the host, if the guest gets a read-only root and
//! cannot make them itself.
//!
//! A tenant may control the root's contents: every path and its symbolic links are resolved below
//! the root (openat2(2), `RESOLVE_IN_ROOT`), and nothing that exists is changed. A mount point
//! below an earlier one is made by the guest, in the file system that is mounted there.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;

use crate::bundle::FileKind;

/// Makes missing mount points and, as runc does, their parent directories.
///
/// # Errors
/// When another file is in the way, or a mount point cannot be made.
pub(super) fn make(root: BorrowedFd<'_>, wanted: &[(PathBuf, FileKind)]) -> io::Result<()> {
    let mut covered = HashSet::new();
    for (path, kind) in wanted {
        covered.extend(make_one(root, path, *kind, &covered)?);
    }
    Ok(())
}

/// Makes one mount point. Returns its path without symbolic links, or `None` if it is below an
/// earlier mount point.
fn make_one(
    root: BorrowedFd<'_>,
    path: &Path,
    kind: FileKind,
    covered: &HashSet<PathBuf>,
) -> io::Result<Option<PathBuf>> {
    let mut walked = PathBuf::from("/");
    let mut at = look(root, &walked)?;
    let mut parts = path.components().peekable();
    while let Some(part) = parts.next() {
        let name = match part {
            Component::RootDir | Component::CurDir => continue,
            Component::Normal(name) => name,
            // After a symbolic link, `..` would not mean the parent in `path`.
            Component::ParentDir | Component::Prefix(_) => return Err(Errno::INVAL.into()),
        };
        if covered.contains(&place(&at)?) {
            return Ok(None);
        }
        walked.push(name);
        at = match look(root, &walked) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match kind {
                    FileKind::File if parts.peek().is_none() => {
                        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                        let flags = new | OFlags::WRONLY | OFlags::CLOEXEC;
                        drop(openat(&at, name, flags, Mode::from_raw_mode(0o644))?);
                    }
                    _ => mkdirat(&at, name, Mode::from_raw_mode(0o755))?,
                }
                look(root, &walked)?
            }
            found => found?,
        };
    }
    place(&at).map(Some)
}

/// Opens the file at a path of the container.
fn look(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Returns the host's path of an open file.
fn place(at: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", at.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_missing_is_made_below_the_root_whatever_links_say() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        let inside = |path: &str| root.path().join(path);
        fs::create_dir_all(inside("real/etc")).unwrap();
        fs::write(inside("real/etc/hosts"), "kept").unwrap();
        symlink("/real/etc", inside("etc")).unwrap();
        symlink("/run", inside("var-run")).unwrap();
        symlink(outside.path(), inside("away")).unwrap();
        let fd = fs::File::open(root.path()).unwrap();
        let wanted = [
            ("/etc/hosts", FileKind::File),
            ("/etc/resolv.conf", FileKind::File),
            ("/var/lib/data", FileKind::Directory),
            ("proc", FileKind::Directory),
            ("/run", FileKind::Directory),
            // Below an earlier mount point.
            ("/run/secrets", FileKind::Directory),
            ("/var-run/lock", FileKind::File),
            ("/", FileKind::Directory),
        ];
        let wanted = wanted.map(|(path, kind)| (PathBuf::from(path), kind));
        make(fd.as_fd(), &wanted).unwrap();
        assert_eq!(fs::read_to_string(inside("real/etc/hosts")).unwrap(), "kept");
        assert!(inside("real/etc/resolv.conf").is_file());
        assert!(inside("var/lib/data").is_dir() && inside("proc").is_dir());
        assert_eq!(fs::read_dir(inside("run")).unwrap().count(), 0);
        // A link to the outside is resolved inside the root, where its target does not exist.
        for path in ["/away/file", "/etc/../../x", "/etc/hosts/below"] {
            assert!(make(fd.as_fd(), &[(path.into(), FileKind::File)]).is_err(), "{path}");
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
