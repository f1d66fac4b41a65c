//! The share: the tree of files that a pod's file server exports to the guest.
//!
//! Its root is a small tmpfs that is never mounted on the host: it is created detached and becomes
//! the file server's root. It contains only numbered directories. Each container of the pod has
//! one, on which a tmpfs with mount points is mounted. The shared files are detached clones of the
//! host's mounts. A thread that joins the file server's mount namespace for a moment attaches all
//! of them there. So no mount of a container ever appears on the host, and the kernel unmounts them
//! all when the file server dies.
//!
//! Beside these directories is a file with the modules of the guest's kernel, for its agent alone:
//! a container sees only mounts of its own directory. A further directory gets the interpreters of
//! the host's binary formats, if there are any.
//!
//! Every tmpfs of the share is made read-only before the guest can see it.

// UNSAFETY: mount_setattr(2) has no wrapper in rustix or nix.
#![expect(unsafe_code, reason = "mount_setattr is called directly")]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use bulkhead_protocol::{FORMATS_DIR, MODULES_FILE};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use thiserror::Error;

use crate::bundle::{FileKind, IdMap, Shared};
use crate::machine::{mount_points, user_namespace};

/// The size of a tmpfs that holds only mount points.
const SIZE: u64 = 1 << 20;
/// The most clones that are open at once: a container may have more mounts than a process may have
/// descriptors.
const CLONES: usize = 256;
/// What a file in a tmpfs takes is a multiple of this.
const PAGE: u64 = 4096;
/// The number of directories in a share.
const SHARE_DIRS: u32 = 64;

/// Why the share could not be made or changed.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The root's tmpfs.
    #[error("root of the share")]
    Root(#[source] io::Error),
    /// A mount point in the share.
    #[error("mount point {} in the share", .0.display())]
    MountPoint(PathBuf, #[source] io::Error),
    /// A mount of the host cannot be cloned.
    #[error("cannot share {} with the guest", .0.display())]
    Clone(PathBuf, #[source] io::Error),
    /// The owners of a mount cannot be mapped.
    #[error(
        "cannot map the owners of {}{}; leave uidMappings, gidMappings, idmap and ridmap out",
        .0.display(),
        unmappable(.1)
    )]
    IdMap(PathBuf, #[source] io::Error),
    /// The file server's mount namespace cannot be joined.
    #[error("mount namespace of the file server")]
    Namespace(#[source] io::Error),
    /// A mount cannot be attached to the share.
    #[error("cannot attach {} to the share", .0.display())]
    Attach(PathBuf, #[source] io::Error),
    /// A mount cannot be detached from the share.
    #[error("cannot take {} out of the share", .0.display())]
    Detach(PathBuf, #[source] io::Error),
    /// Every directory is taken.
    #[error("the pod has {SHARE_DIRS} containers already; create another pod")]
    Full,
}

/// The number of a container's directory in the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ShareDir(u32);

impl ShareDir {
    /// Its name, relative to the share's root.
    #[must_use]
    pub fn directory(self) -> PathBuf {
        self.0.to_string().into()
    }
}

/// Which directories are taken. A directory that was given back is the last to be taken again: for
/// a second the guest may have its old entries cached.
#[derive(Debug, Default)]
pub struct ShareDirs {
    taken: Vec<ShareDir>,
    next: u32,
}

impl ShareDirs {
    /// Takes a free directory; returns `None` if all are taken.
    pub fn take(&mut self) -> Option<ShareDir> {
        let mut candidates =
            (self.next..self.next + SHARE_DIRS).map(|number| ShareDir(number % SHARE_DIRS));
        let dir = candidates.find(|dir| !self.taken.contains(dir))?;
        self.next = (dir.0 + 1) % SHARE_DIRS;
        self.taken.push(dir);
        Some(dir)
    }

    /// Gives a directory back.
    pub fn leave(&mut self, dir: ShareDir) {
        self.taken.retain(|taken| *taken != dir);
    }
}

/// Makes a detached mount with empty directories, which becomes the file server's root.
///
/// # Errors
/// When the host's kernel refuses.
pub fn root() -> Result<OwnedFd, ShareError> {
    let made = || {
        let root = make_tmpfs(SIZE)?;
        for number in 0..SHARE_DIRS {
            mkdirat(&root, ShareDir(number).directory(), Mode::from_raw_mode(0o755))?;
        }
        mkdirat(&root, FORMATS_DIR, Mode::from_raw_mode(0o755))?;
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&root, MODULES_FILE, new, Mode::from_raw_mode(0o400))?;
        set_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
        Ok(root)
    };
    made().map_err(ShareError::Root)
}

/// The files of one container, not attached anywhere.
#[derive(Debug)]
pub struct Files {
    mount_points: OwnedFd,
    clones: Vec<(PathBuf, OwnedFd)>,
    /// Entries that are cloned later, because [`CLONES`] are open already.
    rest: Vec<Shared>,
}

impl Files {
    /// Makes all mount points and clones the mounts; if there are too many, the rest when
    /// attaching.
    ///
    /// # Errors
    /// Names the path that failed.
    pub fn prepare(shared: &[Shared]) -> Result<Self, ShareError> {
        let mount_points = make_tmpfs(SIZE).map_err(ShareError::Root)?;
        for entry in shared {
            mount_point(mount_points.as_fd(), &entry.target, entry.kind)
                .map_err(|error| ShareError::MountPoint(entry.target.clone(), error))?;
        }
        let read_only = set_attributes(mount_points.as_fd(), libc::MOUNT_ATTR_RDONLY, false);
        read_only.map_err(ShareError::Root)?;
        let (first, rest) = shared.split_at(shared.len().min(CLONES));
        let clones = first.iter().map(clone_mount).collect::<Result<_, _>>()?;
        Ok(Self { mount_points, clones, rest: rest.to_vec() })
    }

    /// The files of detached mounts ([`alone`]); each is named by its index in the list.
    ///
    /// # Errors
    /// When a mount point cannot be made.
    pub fn given(mounts: Vec<(FileKind, OwnedFd)>) -> Result<Self, ShareError> {
        let mount_points = make_tmpfs(SIZE).map_err(ShareError::Root)?;
        let mut clones = Vec::with_capacity(mounts.len());
        for (number, (kind, clone)) in mounts.into_iter().enumerate() {
            let target = PathBuf::from(number.to_string());
            mount_point(mount_points.as_fd(), &target, kind)
                .map_err(|error| ShareError::MountPoint(target.clone(), error))?;
            clones.push((target, clone));
        }
        let read_only = set_attributes(mount_points.as_fd(), libc::MOUNT_ATTR_RDONLY, false);
        read_only.map_err(ShareError::Root)?;
        Ok(Self { mount_points, clones, rest: Vec::new() })
    }

    /// Attaches everything to a free directory, inside the mount namespace of a file server that
    /// serves [`root`].
    ///
    /// # Errors
    /// Names the path that failed; what was attached before stays.
    pub fn attach(self, file_server: u32, dir: ShareDir) -> Result<(), ShareError> {
        let Self { mount_points, clones, rest } = self;
        let base = Path::new("/").join(dir.directory());
        // Mounts have to be cloned in this mount namespace and attached in the other.
        let (sender, more) = mpsc::sync_channel(CLONES);
        let attaching = start_inside(file_server, move || {
            attach(&mount_points, &base)?;
            for (target, clone) in clones.into_iter().chain(more) {
                attach(&clone, &base.join(target))?;
            }
            Ok(())
        })?;
        let cloned = rest.iter().try_for_each(|entry| {
            // Sending fails only if attaching has failed, and that error is returned.
            clone_mount(entry).map(|clone| drop(sender.send(clone)))
        });
        drop(sender);
        end(attaching).and(cloned)
    }
}

/// Attaches the file with the modules of the guest's kernel, read-only.
///
/// # Errors
/// When the file is not on a mount of this mount namespace, or cannot be attached.
pub fn attach_modules(file_server: u32, modules: &File) -> Result<(), ShareError> {
    let path = Path::new("/").join(MODULES_FILE);
    let clone = alone(modules.as_fd(), true, false);
    let clone = clone.map_err(|error| ShareError::Clone(path.clone(), error))?;
    end(start_inside(file_server, move || attach(&clone, &path))?)
}

/// An interpreter of a binary format.
#[derive(Debug)]
pub enum Interpreter {
    /// A detached mount of its file.
    Mount(OwnedFd),
    /// Its file, which is on no mount of this mount namespace, and its size. It is copied.
    Copy(File, u64),
}

/// Attaches the interpreters of binary formats; each is named by its index.
///
/// # Errors
/// Names the first that failed; the others are there all the same.
pub fn attach_interpreters(file_server: u32, files: Vec<Interpreter>) -> Result<(), ShareError> {
    let base = Path::new("/").join(FORMATS_DIR);
    let failed = |error| ShareError::Attach(FORMATS_DIR.into(), error);
    let copied = files.iter().map(|file| match file {
        Interpreter::Mount(_) => 0,
        Interpreter::Copy(_, size) => size.next_multiple_of(PAGE),
    });
    let directory = make_tmpfs(SIZE + copied.sum::<u64>()).map_err(failed)?;
    let mut mounts = Vec::new();
    for (number, file) in files.into_iter().enumerate() {
        let name = number.to_string();
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let place = openat(&directory, &name, new, Mode::from_raw_mode(0o755));
        let mut place = place.map(File::from).map_err(|error| failed(error.into()))?;
        match file {
            Interpreter::Mount(mount) => mounts.push((base.join(name), mount)),
            Interpreter::Copy(file, size) => {
                io::copy(&mut file.take(size), &mut place).map_err(failed)?;
            }
        }
    }
    set_attributes(directory.as_fd(), libc::MOUNT_ATTR_RDONLY, false).map_err(failed)?;
    end(start_inside(file_server, move || {
        attach(&directory, &base)?;
        mounts.iter().map(|(path, mount)| attach(mount, path)).fold(Ok(()), Result::and)
    })?)
}

/// Detaches the mounts at a directory.
///
/// # Errors
/// When nothing is attached there.
pub fn detach(file_server: u32, dir: ShareDir) -> Result<(), ShareError> {
    let base = Path::new("/").join(dir.directory());
    end(start_inside(file_server, move || {
        unmount(&base, UnmountFlags::DETACH).map_err(|error| ShareError::Detach(base, error.into()))
    })?)
}

fn attach(mount: &OwnedFd, path: &Path) -> Result<(), ShareError> {
    move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|error| ShareError::Attach(path.to_owned(), error.into()))
}

/// A thread in another mount namespace.
type Inside = JoinHandle<Result<(), ShareError>>;

/// Starts a thread in the mount namespace of a file server.
fn start_inside(
    file_server: u32,
    work: impl FnOnce() -> Result<(), ShareError> + Send + 'static,
) -> Result<Inside, ShareError> {
    let namespace =
        File::open(format!("/proc/{file_server}/ns/mnt")).map_err(ShareError::Namespace)?;
    let joined = move || {
        join(namespace.as_fd()).map_err(ShareError::Namespace)?;
        work()
    };
    let thread = thread::Builder::new().name("attach".into()).spawn(joined);
    thread.map_err(ShareError::Namespace)
}

/// Waits for the end of the thread.
fn end(inside: Inside) -> Result<(), ShareError> {
    let failed = || ShareError::Namespace(io::Error::other("thread failed"));
    inside.join().unwrap_or_else(|_| Err(failed()))
}

/// Moves only this thread into a mount namespace; its root becomes the root of that namespace.
fn join(namespace: BorrowedFd<'_>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    Ok(move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?)
}

fn make_tmpfs(size: u64) -> io::Result<OwnedFd> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    mount_nowhere("tmpfs", &[("mode", "0755"), ("size", &size.to_string())], attributes)
}

/// Mounts a file system that has no device, and attaches it nowhere.
///
/// # Errors
/// When the kernel does not know it, or refuses a parameter.
pub(super) fn mount_nowhere(
    kind: &str,
    parameters: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in parameters {
        fsconfig_set_string(&context, *name, *value)?;
    }
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn mount_point(root: BorrowedFd<'_>, target: &Path, kind: FileKind) -> io::Result<()> {
    let mut path = PathBuf::new();
    for part in target.parent().into_iter().flatten() {
        path.push(part);
        match mkdirat(root, &path, Mode::from_raw_mode(0o755)) {
            Err(error) if error != rustix::io::Errno::EXIST => return Err(error.into()),
            _ => {}
        }
    }
    match kind {
        FileKind::Directory => mkdirat(root, target, Mode::from_raw_mode(0o755))?,
        FileKind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            drop(openat(root, target, flags, Mode::from_raw_mode(0o644))?);
        }
    }
    Ok(())
}

/// Clones a shared mount and maps its owners; returns the clone and its target.
fn clone_mount(entry: &Shared) -> Result<(PathBuf, OwnedFd), ShareError> {
    let clone = clone_tree(entry);
    let clone = clone.map_err(|error| ShareError::Clone(entry.source.clone(), error))?;
    if let Some(id_map) = &entry.id_map {
        map_owners(clone.as_fd(), id_map)
            .map_err(|error| ShareError::IdMap(entry.source.clone(), error))?;
    }
    Ok((entry.target.clone(), clone))
}

fn clone_tree(entry: &Shared) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, entry.recursive);
    let clone = open_tree(CWD, &entry.source, flags)?;
    harden(clone.as_fd(), entry.read_only_below, entry.recursive)?;
    if entry.read_only && make_mount_points(entry) {
        set_attributes(clone.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
    }
    Ok(clone)
}

/// Makes the mount points in a read-only entry; returns whether all of them exist.
fn make_mount_points(entry: &Shared) -> bool {
    if entry.mount_points.is_empty() {
        return true;
    }
    let root = openat(CWD, &entry.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let made = root.map_err(io::Error::from);
    let made = made.and_then(|root| mount_points::make(root.as_fd(), &entry.mount_points));
    if let Err(error) = &made {
        let source = entry.source.display();
        tracing::debug!(%error, "{source} is read-only in the guest, and not on the host");
    }
    made.is_ok()
}

/// Sets nosuid, nodev and noexec on a mount, and read-only if asked. Even if the file server is
/// compromised, no file that a guest has left there acts as a device, can be executed, or changes
/// the identity of a process.
fn harden(mount: BorrowedFd<'_>, read_only: bool, recursive: bool) -> io::Result<()> {
    let harmless = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let write = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    set_attributes(mount, harmless | write, recursive)
}

/// Returns a detached mount of the file that a descriptor refers to.
///
/// # Errors
/// When the file is not on a mount of this mount namespace.
pub fn alone(fd: BorrowedFd<'_>, read_only: bool, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let clone = open_tree(fd, "", flags | OpenTreeFlags::AT_EMPTY_PATH)?;
    harden(clone.as_fd(), read_only, recursive)?;
    Ok(clone)
}

/// Returns a detached mount of one entry, which is not in the share.
///
/// # Errors
/// Names the path that failed.
pub fn alone_as(entry: &Shared) -> Result<OwnedFd, ShareError> {
    clone_mount(entry).map(|(_, clone)| clone)
}

/// Sets attributes of a detached mount, and makes it private, so that no mounts propagate between
/// it and the host.
fn set_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    let change = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    change_mount(mount, change, recursive)
}

/// Maps the owners of a detached mount, which the kernel allows only once.
fn map_owners(mount: BorrowedFd<'_>, id_map: &IdMap) -> io::Result<()> {
    let namespace = user_namespace::with_mappings(&id_map.uids, &id_map.gids)?;
    let number = u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    let change = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: number,
    };
    change_mount(mount, change, id_map.recursive)
}

/// Explains the errno of mount_setattr(2).
fn unmappable(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EINVAL) => ", its file system or the mapping does not allow it",
        Some(libc::EPERM) => ", they are mapped already",
        _ => "",
    }
}

fn change_mount(
    mount: BorrowedFd<'_>,
    change: libc::mount_attr,
    recursive: bool,
) -> io::Result<()> {
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
    use rustix::fs::{FileType, StatVfsMountFlags, fstat, fstatvfs};
    use std::fs;

    fn shared(source: &Path, target: &str, kind: FileKind, read_only: bool) -> Shared {
        Shared {
            read_only,
            read_only_below: read_only,
            recursive: true,
            ..Shared::new(source.to_owned(), target.into(), kind)
        }
    }

    #[test]
    fn a_directory_that_was_left_is_the_last_to_be_taken_again() {
        let mut dirs = ShareDirs::default();
        let first = dirs.take().unwrap();
        assert_eq!(first.directory(), Path::new("0"));
        dirs.leave(first);
        for number in 1..SHARE_DIRS {
            assert_eq!(dirs.take(), Some(ShareDir(number)));
        }
        assert_eq!(dirs.take(), Some(first));
        assert_eq!(dirs.take(), None);
        dirs.leave(ShareDir(7));
        assert_eq!(dirs.take(), Some(ShareDir(7)));
    }

    #[test]
    #[ignore = "needs the test host"]
    fn a_share_has_mount_points_that_cannot_be_changed_and_clones_of_the_host() {
        let host = tempfile::tempdir().unwrap();
        fs::write(host.path().join("file"), "x").unwrap();
        let files = Files::prepare(&[
            shared(host.path(), "rootfs", FileKind::Directory, false),
            shared(&host.path().join("file"), "mounts/0", FileKind::File, true),
        ])
        .unwrap();
        let file = openat(&files.mount_points, "mounts/0", OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(FileType::from_raw_mode(fstat(&file).unwrap().st_mode), FileType::RegularFile);
        for root in [&files.mount_points, &root().unwrap()] {
            let error = mkdirat(root, "new", Mode::RWXU).unwrap_err();
            assert_eq!(error, rustix::io::Errno::ROFS);
        }
        let create = |name: &str| {
            openat(&files.clones[0].1, name, OFlags::CREATE | OFlags::WRONLY, Mode::RWXU)
        };
        create("new").unwrap();
        assert!(host.path().join("new").exists());
        let error = openat(&files.clones[1].1, "", OFlags::WRONLY, Mode::empty());
        assert!(error.is_err());
    }

    #[test]
    #[ignore = "needs the test host"]
    fn nothing_that_is_shared_is_a_device_runs_or_changes_identities() {
        let host = tempfile::tempdir().unwrap();
        fs::create_dir(host.path().join("below")).unwrap();
        let below = make_plain_tmpfs();
        move_mount(
            &below,
            "",
            CWD,
            host.path().join("below"),
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .unwrap();
        let harmless =
            StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
        let flags = |fd: &OwnedFd| fstatvfs(fd).unwrap().f_flag;
        assert!(!flags(&below).intersects(harmless));
        let clone = clone_tree(&shared(host.path(), "x", FileKind::Directory, false)).unwrap();
        let inside = openat(&clone, "below", OFlags::PATH, Mode::empty()).unwrap();
        for fd in [&clone, &inside] {
            assert!(flags(fd).contains(harmless), "{:?}", flags(fd));
            assert!(!flags(fd).contains(StatVfsMountFlags::RDONLY));
        }
        let opened = File::open(host.path()).unwrap();
        let alone = alone(opened.as_fd(), true, true).unwrap();
        assert!(flags(&alone).contains(harmless | StatVfsMountFlags::RDONLY));
        unmount(host.path().join("below"), UnmountFlags::DETACH).unwrap();
    }

    /// A tmpfs without any flags.
    fn make_plain_tmpfs() -> OwnedFd {
        mount_nowhere("tmpfs", &[], MountAttrFlags::empty()).unwrap()
    }

    #[test]
    #[ignore = "needs the test host"]
    fn a_read_only_clone_cannot_be_written() {
        let host = tempfile::tempdir().unwrap();
        let clone = clone_tree(&shared(host.path(), "x", FileKind::Directory, true)).unwrap();
        let error = mkdirat(&clone, "new", Mode::RWXU).unwrap_err();
        assert_eq!(error, rustix::io::Errno::ROFS);
        fs::create_dir(host.path().join("new")).unwrap();
    }

    #[test]
    #[ignore = "needs the test host"]
    fn a_file_system_without_mapped_owners_is_named() {
        let map = r#"[{"containerID": 0, "hostID": 100000, "size": 10}]"#;
        let map: Vec<_> = serde_json::from_str(map).unwrap();
        let id_map = Some(IdMap { uids: map.clone(), gids: map, recursive: false });
        let entry =
            Shared { id_map, ..shared(Path::new("/proc"), "c/m", FileKind::Directory, false) };
        let words = Files::prepare(&[entry]).unwrap_err().to_string();
        assert!(words.starts_with("cannot map the owners of /proc, its file system"), "{words}");
    }

    #[test]
    #[ignore = "needs the test host"]
    fn a_source_that_is_missing_is_named() {
        let entry = shared(Path::new("/nonexistent"), "rootfs", FileKind::Directory, false);
        let error = Files::prepare(&[entry]).unwrap_err();
        assert_eq!(error.to_string(), "cannot share /nonexistent with the guest");
    }
}
