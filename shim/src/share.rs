//! The share: the tree of files that a pod's file server shows to the guest.
//!
//! Its root is a small tmpfs that is never mounted on the host: it is made detached and becomes the
//! file server's root. What is shared is cloned from the host's mounts, detached too, and attached
//! inside the file server's mount namespace by a thread that joins it for a moment. So no mount of a
//! container ever appears on the host, and the kernel takes them all when the file server dies.

// UNSAFETY: mount_setattr(2) has no wrapper in rustix or nix.
#![expect(unsafe_code, reason = "mount_setattr is called directly")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use thiserror::Error;

use crate::bundle::{Kind, Shared};

/// The size of the tmpfs, which only ever holds mount points.
const SIZE: &str = "1m";

/// Why the share could not be made.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The tmpfs.
    #[error("root of the share")]
    Root(#[source] io::Error),
    /// A mount point in it.
    #[error("mount point {} in the share", .0.display())]
    MountPoint(PathBuf, #[source] io::Error),
    /// Something of the host.
    #[error("{} cannot be shared with the guest", .0.display())]
    Clone(PathBuf, #[source] io::Error),
    /// The file server's namespace.
    #[error("mount namespace of the file server")]
    Namespace(#[source] io::Error),
    /// Attaching in it.
    #[error("{} cannot be attached in the share", .0.display())]
    Attach(PathBuf, #[source] io::Error),
}

/// A share that nobody serves yet.
#[derive(Debug)]
pub struct Share {
    root: OwnedFd,
    clones: Vec<(PathBuf, OwnedFd)>,
}

impl Share {
    /// Makes the root with all mount points and clones what they will show.
    ///
    /// # Errors
    /// Names the path that failed.
    pub fn prepare(shared: &[Shared]) -> Result<Self, ShareError> {
        let root = make_root().map_err(ShareError::Root)?;
        let mut clones = Vec::with_capacity(shared.len());
        for entry in shared {
            mount_point(root.as_fd(), &entry.target, entry.kind)
                .map_err(|error| ShareError::MountPoint(entry.target.clone(), error))?;
            let clone = clone_mount(entry)
                .map_err(|error| ShareError::Clone(entry.source.clone(), error))?;
            clones.push((Path::new("/").join(&entry.target), clone));
        }
        set_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY, false).map_err(ShareError::Root)?;
        Ok(Self { root, clones })
    }

    /// The mount that becomes the file server's root.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Attaches everything inside the mount namespace of a file server that serves the root.
    ///
    /// # Errors
    /// Names the path that failed.
    pub fn attach(self, file_server: u32) -> Result<(), ShareError> {
        let namespace =
            File::open(format!("/proc/{file_server}/ns/mnt")).map_err(ShareError::Namespace)?;
        let joined = move || {
            join(namespace.as_fd()).map_err(ShareError::Namespace)?;
            for (path, clone) in &self.clones {
                move_mount(clone, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                    .map_err(|error| ShareError::Attach(path.clone(), error.into()))?;
            }
            Ok(())
        };
        let thread = thread::Builder::new().name("attach".into()).spawn(joined);
        let failed = || ShareError::Namespace(io::Error::other("thread failed"));
        thread.map_err(ShareError::Namespace)?.join().unwrap_or_else(|_| Err(failed()))
    }
}

/// Moves this thread, and only this one, into a mount namespace; its root becomes that one's.
fn join(namespace: BorrowedFd<'_>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    Ok(move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?)
}

fn make_root() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "mode", "0755")?;
    fsconfig_set_string(&context, "size", SIZE)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn mount_point(root: BorrowedFd<'_>, target: &Path, kind: Kind) -> io::Result<()> {
    let mut path = PathBuf::new();
    for part in target.parent().into_iter().flatten() {
        path.push(part);
        match mkdirat(root, &path, Mode::from_raw_mode(0o755)) {
            Err(error) if error != rustix::io::Errno::EXIST => return Err(error.into()),
            _ => {}
        }
    }
    match kind {
        Kind::Directory => mkdirat(root, target, Mode::from_raw_mode(0o755))?,
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            drop(openat(root, target, flags, Mode::from_raw_mode(0o644))?);
        }
    }
    Ok(())
}

fn clone_mount(entry: &Shared) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, entry.recursive);
    let clone = open_tree(CWD, &entry.source, flags)?;
    let attributes = if entry.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    set_attributes(clone.as_fd(), attributes, entry.recursive)?;
    Ok(clone)
}

/// Sets attributes of a detached mount, and cuts its mount propagation with the host.
fn set_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    let change = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    let flags = AtFlags::EMPTY_PATH.bits() | recursive.cast_unsigned();
    // SAFETY: the path is a terminated empty string, `change` is a whole mount_attr of the length
    // that is passed, both outlive the call, and the kernel writes to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of_val(&change),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, fstat};
    use std::fs;

    fn shared(source: &Path, target: &str, kind: Kind, read_only: bool) -> Shared {
        let (source, target) = (source.to_owned(), target.into());
        Shared { source, target, kind, read_only, recursive: true }
    }

    fn can_mount() -> bool {
        rustix::process::geteuid().is_root() && make_root().is_ok()
    }

    #[test]
    fn a_share_has_mount_points_that_cannot_be_changed_and_clones_of_the_host() {
        if !can_mount() {
            return;
        }
        let host = tempfile::tempdir().unwrap();
        fs::write(host.path().join("file"), "x").unwrap();
        let share = Share::prepare(&[
            shared(host.path(), "c/rootfs", Kind::Directory, false),
            shared(&host.path().join("file"), "c/mounts/0", Kind::File, true),
        ])
        .unwrap();
        let file = openat(share.root(), "c/mounts/0", OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(FileType::from_raw_mode(fstat(&file).unwrap().st_mode), FileType::RegularFile);
        let error = mkdirat(share.root(), "new", Mode::RWXU).unwrap_err();
        assert_eq!(error, rustix::io::Errno::ROFS);
        let create = |name: &str| {
            openat(&share.clones[0].1, name, OFlags::CREATE | OFlags::WRONLY, Mode::RWXU)
        };
        create("new").unwrap();
        assert!(host.path().join("new").exists());
        let error = openat(&share.clones[1].1, "", OFlags::WRONLY, Mode::empty());
        assert!(error.is_err());
    }

    #[test]
    fn a_read_only_clone_cannot_be_written() {
        if !can_mount() {
            return;
        }
        let host = tempfile::tempdir().unwrap();
        let clone = clone_mount(&shared(host.path(), "x", Kind::Directory, true)).unwrap();
        let error = mkdirat(&clone, "new", Mode::RWXU).unwrap_err();
        assert_eq!(error, rustix::io::Errno::ROFS);
        fs::create_dir(host.path().join("new")).unwrap();
    }

    #[test]
    fn a_source_that_is_missing_is_named() {
        if !can_mount() {
            return;
        }
        let entry = shared(Path::new("/nonexistent"), "c/rootfs", Kind::Directory, false);
        let error = Share::prepare(&[entry]).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent cannot be shared with the guest");
    }
}
