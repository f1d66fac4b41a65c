//! Files and directories that processes of the guest have open.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::slots::Kept;

/// An open file description of the guest, and the host's one for it.
#[derive(Debug)]
pub(super) struct Handle {
    /// The inode that it was opened for.
    pub(super) node: u64,
    /// What kind of file it is.
    pub(super) kind: FileType,
    /// Held while the position of a directory is in use.
    pub(super) position: Mutex<()>,
    /// Some owner of range locks took its first lock through this handle.
    pub(super) locked_ranges: AtomicBool,
    file: Kept,
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Debug, Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// All handles, by the number that the guest uses.
#[derive(Debug, Default)]
pub(super) struct Handles {
    table: Mutex<Table>,
}

impl Handles {
    /// Keeps an open file; the number is never used again.
    pub(super) fn insert(&self, node: u64, kind: FileType, file: Kept) -> u64 {
        let (position, locked_ranges) = (Mutex::default(), AtomicBool::new(false));
        let handle = Arc::new(Handle { node, kind, position, locked_ranges, file });
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.last += 1;
        let number = table.last;
        table.open.insert(number, handle);
        number
    }

    /// The open file of this number, which must belong to `node`.
    pub(super) fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.open.get(&number).filter(|handle| handle.node == node).cloned().ok_or(Errno::BADF)
    }

    /// Removes the handle; the file is closed once nobody uses it any more.
    pub(super) fn remove(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.open.get(&number).is_none_or(|handle| handle.node != node) {
            return Err(Errno::BADF);
        }
        table.open.remove(&number).ok_or(Errno::BADF)
    }

    /// Closes all files.
    pub(super) fn clear(&self) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.open = HashMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fileserver::slots::Slots;

    #[test]
    fn a_handle_belongs_to_its_inode() {
        let handles = Handles::default();
        let slots = Slots::new(100, 1);
        let open = || std::fs::File::open("/dev/null").unwrap().into();
        let file = || slots.take().unwrap().keep(open());
        let first = handles.insert(5, FileType::RegularFile, file());
        let second = handles.insert(5, FileType::RegularFile, file());
        assert_ne!(first, second);
        assert!(handles.get(first, 5).is_ok());
        assert_eq!(handles.get(first, 6).unwrap_err(), Errno::BADF);
        assert_eq!(handles.remove(first, 6).unwrap_err(), Errno::BADF);
        assert_eq!(handles.remove(first, 5).unwrap().node, 5);
        assert_eq!(handles.remove(first, 5).unwrap_err(), Errno::BADF);
        assert!(handles.get(second, 5).is_ok());
    }
}
