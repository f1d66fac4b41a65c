//! The inodes that the guest's kernel remembers: files by number, each held open with `O_PATH`.
//!
//! A file is identified by device, inode number and mount: the share crosses mount points, and one
//! file seen through two mounts is two, as on the host. While a descriptor is held the host cannot
//! give the inode number to another file, so a number never changes its meaning. Numbers are
//! counted up and never used again. An inode that the guest forgets is removed at once, so the
//! table is as large as the guest's inode cache and no larger.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Statx, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;

use super::places::Place;
use super::slots::{Kept, Slot, Slots};
use super::watches::Watch;

/// The number of the root directory, `FUSE_ROOT_ID`.
pub(super) const ROOT: u64 = 1;

/// A file as long as the guest remembers it.
#[derive(Debug)]
pub(super) struct Inode {
    /// Its number in the guest.
    pub(super) node: u64,
    /// What kind of file it is, which never changes.
    pub(super) kind: FileType,
    /// Where in the share it is.
    pub(super) place: Place,
    /// The change time that the guest's cached pages belong to; 0 when it is not known.
    pub(super) cached: AtomicU64,
    /// That the guest watches it. Dropped before `path`, which it needs.
    pub(super) watch: Mutex<Option<Box<Watch>>>,
    path: Kept,
    key: Key,
    lookups: AtomicU64,
}

impl Inode {
    /// Its attributes now.
    pub(super) fn stat(&self) -> Result<Statx, Errno> {
        stat(&self.path)
    }

    /// How long the guest may believe its name and its attributes.
    pub(super) fn valid(&self) -> Duration {
        self.place.valid(self.kind == FileType::Directory)
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.path.as_fd()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    inode: u64,
    mount: u64,
    device: u64,
}

#[derive(Debug, Default)]
struct Tables {
    by_node: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<Key, u64>,
    last_node: u64,
}

/// All inodes.
#[derive(Debug)]
pub(super) struct Inodes {
    tables: Mutex<Tables>,
    slots: Arc<Slots>,
    devices: Devices,
}

impl Inodes {
    /// A table with only the root, which is never forgotten.
    pub(super) fn new(root: OwnedFd, slots: Arc<Slots>) -> Result<Self, Errno> {
        let attributes = stat(&root)?;
        let mut tables = Tables { last_node: ROOT, ..Tables::default() };
        tables.insert(ROOT, slots.take()?.keep(root), Place::Root, &attributes);
        let devices = Devices::new(device(&attributes));
        Ok(Self { tables: Mutex::new(tables), slots, devices })
    }

    /// The file with this number.
    pub(super) fn get(&self, node: u64) -> Result<Arc<Inode>, Errno> {
        self.lock().by_node.get(&node).cloned().ok_or(Errno::STALE)
    }

    /// Counts one more lookup of an open file, which has this name in a directory, and adds the file
    /// if it is new. A new file is kept in `slot`, or in another slot if that is `None`.
    pub(super) fn remember(
        &self,
        (directory, name): (&Inode, &CStr),
        path: OwnedFd,
        slot: Option<Slot>,
    ) -> Result<(Arc<Inode>, Statx), Errno> {
        let attributes = stat(&path)?;
        let place = directory.place.below(name, is_mounted(&attributes), is_directory(&attributes));
        let mut tables = self.lock();
        let inode = match tables.by_key.get(&key(&attributes)).copied() {
            Some(node) => tables.by_node.get(&node).cloned().ok_or(Errno::IO)?,
            None => {
                let slot = slot.map_or_else(|| self.slots.take(), Ok)?;
                tables.last_node += 1;
                let node = tables.last_node;
                tables.insert(node, slot.keep(path), place, &attributes)
            }
        };
        // The counter changes only under the lock of the tables.
        inode.lookups.fetch_add(1, Ordering::Relaxed);
        Ok((inode, attributes))
    }

    /// Takes back `count` lookups; the last one lets go of the file.
    pub(super) fn forget(&self, node: u64, count: u64) {
        let mut tables = self.lock();
        let Some(inode) = tables.by_node.get(&node) else { return };
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        if left > 0 || node == ROOT {
            return;
        }
        let key = inode.key;
        tables.by_key.remove(&key);
        let inode = tables.by_node.remove(&node);
        drop(tables);
        // Dropped without the lock, because closing a file can take time.
        drop(inode);
    }

    /// Forgets everything but the root: the guest's file system is gone.
    pub(super) fn clear(&self) {
        let mut tables = self.lock();
        tables.by_node.retain(|node, _| *node == ROOT);
        tables.by_key.retain(|_, node| *node == ROOT);
        tables.by_node.shrink_to_fit();
        tables.by_key.shrink_to_fit();
    }

    /// The inode number that the guest sees.
    pub(super) fn number(&self, device: u64, inode: u64) -> u64 {
        self.devices.number(device, inode)
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn insert(&mut self, node: u64, path: Kept, place: Place, attributes: &Statx) -> Arc<Inode> {
        let key = key(attributes);
        let inode = Arc::new(Inode {
            node,
            kind: kind(attributes),
            place,
            cached: AtomicU64::new(0),
            watch: Mutex::default(),
            path,
            key,
            lookups: AtomicU64::new(0),
        });
        self.by_node.insert(node, Arc::clone(&inode));
        self.by_key.insert(key, node);
        inode
    }
}

/// Keeps inode numbers of different file systems apart.
///
/// To the guest the whole share is one file system, and programs take two files of one file system
/// with one inode number for the same file. So each device of the host gets a number that is mixed
/// into the high bits. The first device met is that of a container's root file system and gets 0,
/// so its inode numbers are those of the host. The device of the share's own root gets the highest
/// number.
#[derive(Debug)]
struct Devices {
    share: u64,
    others: RwLock<Vec<u64>>,
}

/// The lowest bit of the device's number; inode numbers below it never collide.
const DEVICE_SHIFT: u32 = 52;

impl Devices {
    fn new(share: u64) -> Self {
        Self { share, others: RwLock::default() }
    }

    fn number(&self, device: u64, inode: u64) -> u64 {
        inode ^ (self.index(device) << DEVICE_SHIFT)
    }

    fn index(&self, device: u64) -> u64 {
        if device == self.share {
            return (1 << (u64::BITS - DEVICE_SHIFT)) - 1;
        }
        let known = self.others.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = known.iter().position(|other| *other == device) {
            return index as u64;
        }
        drop(known);
        let mut others = self.others.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = others.iter().position(|other| *other == device) {
            return index as u64;
        }
        others.push(device);
        others.len() as u64 - 1
    }
}

/// Every attribute that FUSE can carry, and the mount.
pub(super) fn stat(file: impl AsFd) -> Result<Statx, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    statx(file, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, mask)
}

/// The host's device number of a file.
pub(super) fn device(attributes: &Statx) -> u64 {
    u64::from(attributes.stx_dev_major) << 32 | u64::from(attributes.stx_dev_minor)
}

/// Whether a file is the root of a mount.
pub(super) fn is_mounted(attributes: &Statx) -> bool {
    attributes.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
}

/// Whether a file is a directory.
pub(super) fn is_directory(attributes: &Statx) -> bool {
    kind(attributes) == FileType::Directory
}

fn kind(attributes: &Statx) -> FileType {
    FileType::from_raw_mode(attributes.stx_mode.into())
}

fn key(attributes: &Statx) -> Key {
    let (inode, mount) = (attributes.stx_ino, attributes.stx_mnt_id);
    Key { inode, mount, device: device(attributes) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{CWD, Mode, OFlags, openat};
    use tempfile::TempDir;

    use super::*;

    fn open(path: &std::path::Path) -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    fn directory() -> (TempDir, Inodes) {
        let directory = TempDir::new().unwrap();
        let inodes = Inodes::new(open(directory.path()), Slots::new(100, 1)).unwrap();
        (directory, inodes)
    }

    fn look_up(inodes: &Inodes, path: &std::path::Path) -> Result<(Arc<Inode>, Statx), Errno> {
        inodes.remember((&*inodes.get(ROOT)?, c"file"), open(path), None)
    }

    #[test]
    fn one_file_has_one_number_until_it_is_forgotten() {
        let (directory, inodes) = directory();
        let path = directory.path().join("file");
        File::create(&path).unwrap();
        let node = look_up(&inodes, &path).unwrap().0.node;
        assert_eq!(look_up(&inodes, &path).unwrap().0.node, node);
        inodes.forget(node, 1);
        assert_eq!(inodes.get(node).unwrap().node, node);
        inodes.forget(node, 1);
        assert_eq!(inodes.get(node).unwrap_err(), Errno::STALE);
        assert!(look_up(&inodes, &path).unwrap().0.node > node, "numbers are not used again");
    }

    #[test]
    fn forgetting_too_much_or_too_often_does_no_harm() {
        let (directory, inodes) = directory();
        inodes.forget(ROOT, u64::MAX);
        inodes.forget(77, 1);
        assert_eq!(inodes.get(ROOT).unwrap().kind, FileType::Directory);
        assert_eq!(look_up(&inodes, directory.path()).unwrap().0.node, ROOT);
    }

    #[test]
    fn clearing_leaves_the_root() {
        let (directory, inodes) = directory();
        let path = directory.path().join("file");
        File::create(&path).unwrap();
        let node = look_up(&inodes, &path).unwrap().0.node;
        inodes.clear();
        assert!(inodes.get(node).is_err());
        assert!(inodes.get(ROOT).is_ok());
        assert_eq!(inodes.lock().by_key.len(), 1);
    }

    #[test]
    fn equal_inode_numbers_of_two_devices_differ_in_the_guest() {
        let devices = Devices::new(7);
        assert_eq!(devices.number(100, 12), 12, "the first device keeps its numbers");
        assert_ne!(devices.number(200, 12), 12);
        assert_ne!(devices.number(7, 12), devices.number(200, 12));
        assert_eq!(devices.number(100, 12), 12);
        assert_eq!(devices.number(200, 12), devices.number(200, 12));
    }
}
