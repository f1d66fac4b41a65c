//! Mounts with the option `tmpcopyup`, which Podman gives its tmpfs mounts: they start with a copy
//! of what the root file system has in their place. libcontainer does not know the option, so such
//! a tmpfs is made and filled here, and is a bind mount to libcontainer.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chmodat, chownat,
    fchmod, fchown, fstat, mkdirat, mknodat, openat, openat2, readlinkat, statat, symlinkat,
};
use rustix::mount::MountFlags;

use crate::staged::{self, Staged};

pub(crate) const OPTION: &str = "tmpcopyup";
/// The deepest tree that is copied; a deeper one, which no honest root has, is an error.
const DEPTH_MAX: usize = 64;

/// Makes and fills what a specification asks for, below `directory`, and makes the specification
/// bind it.
///
/// # Errors
/// When there is no memory for it, or what is to be copied cannot be read.
pub(crate) fn prepare(spec: &mut Spec, directory: &Path, staged: &mut Staged) -> io::Result<()> {
    let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    for (number, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let mut options = mount.options().clone().unwrap_or_default();
        let before = options.len();
        options.retain(|option| option != OPTION);
        if options.len() == before {
            continue;
        }
        mount.set_options(Some(options));
        if mount.typ().as_deref() == Some("tmpfs")
            && let Some(below) = open_in(&root, mount.destination(), OFlags::empty())?
        {
            let target = directory.join(format!("copied-up-{number}"));
            fill(mount, &below, target, staged)?;
        }
    }
    Ok(())
}

fn fill(asked: &mut Mount, from: &OwnedFd, target: PathBuf, staged: &mut Staged) -> io::Result<()> {
    let options = asked.options().clone().unwrap_or_default();
    // Those with a value are the file system's, the others the mount's.
    let (parameters, flags): (Vec<_>, Vec<_>) =
        options.into_iter().partition(|option| option.contains('='));
    let has_mode = parameters.iter().any(|option| option.starts_with("mode="));
    staged.mount(("tmpfs".as_ref(), "tmpfs"), &target, MountFlags::empty(), &parameters)?;
    let to = openat(CWD, &target, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(from)?;
    if !has_mode {
        own(to.as_fd(), &stat)?;
    }
    copy_directory(from, &to, DEPTH_MAX)?;
    staged::bind(asked, target, flags);
    Ok(())
}

/// Returns the directory at a path inside the container's root, or `None` if there is none. It is
/// opened with the flags `further` as well.
pub(crate) fn open_in(root: &Path, path: &Path, further: OFlags) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, root, flags | OFlags::PATH, Mode::empty())?;
    Ok(openat2(&root, path, flags | further, Mode::empty(), ResolveFlags::IN_ROOT).ok())
}

/// Copies the contents of one directory into another that is empty. Symbolic links are copied,
/// never followed.
fn copy_directory(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let open = |at: &OwnedFd, flags| {
            openat(at, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::RWXU)
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory if depth == 0 => return Err(io::ErrorKind::InvalidInput.into()),
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let made = open(to, OFlags::DIRECTORY)?;
                copy_directory(&open(from, OFlags::DIRECTORY)?, &made, depth - 1)?;
                own(made.as_fd(), &stat)?;
            }
            FileType::RegularFile => {
                let made = open(to, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
                let mut made = File::from(made);
                io::copy(&mut File::from(open(from, OFlags::RDONLY)?), &mut made)?;
                own(made.as_fd(), &stat)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new())?, to, name)?;
                chownat(to, name, owner(&stat), group(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            kind => {
                let mode = Mode::from_raw_mode(stat.st_mode);
                mknodat(to, name, kind, mode, stat.st_rdev)?;
                chownat(to, name, owner(&stat), group(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
                chmodat(to, name, mode, AtFlags::empty())?;
            }
        }
    }
    Ok(())
}

/// Gives a file the owner and the mode of another.
fn own(file: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    fchown(file, owner(stat), group(stat))?;
    Ok(fchmod(file, Mode::from_raw_mode(stat.st_mode))?)
}

fn owner(stat: &Stat) -> Option<Uid> {
    Some(Uid::from_raw(stat.st_uid))
}

fn group(stat: &Stat) -> Option<Gid> {
    Some(Gid::from_raw(stat.st_gid))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn opened(path: &Path) -> OwnedFd {
        openat(CWD, path, OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    #[test]
    fn a_tree_is_copied_as_it_is_and_links_are_not_followed() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::write(from.path().join("a/b/file"), "text").unwrap();
        fs::set_permissions(from.path().join("a/b/file"), fs::Permissions::from_mode(0o640))
            .unwrap();
        fs::set_permissions(from.path().join("a"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("/etc", from.path().join("link")).unwrap();
        copy_directory(&opened(from.path()), &opened(to.path()), DEPTH_MAX).unwrap();
        let mode = |path: &str| fs::metadata(to.path().join(path)).unwrap().permissions().mode();
        assert_eq!(fs::read(to.path().join("a/b/file")).unwrap(), b"text");
        assert_eq!((mode("a") & 0o7777, mode("a/b/file") & 0o7777), (0o1777, 0o640));
        assert_eq!(fs::read_link(to.path().join("link")).unwrap(), Path::new("/etc"));
        let deep = copy_directory(&opened(from.path()), &opened(&from.path().join("a/b")), 1);
        assert_eq!(deep.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
