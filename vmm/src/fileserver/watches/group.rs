//! A group of fanotify(7) marks.

// UNSAFETY: rustix has no wrapper of fanotify and of file handles.
#![expect(unsafe_code, reason = "fanotify_init(2), fanotify_mark(2), name_to_handle_at(2)")]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::fstatvfs;
use rustix::io::Errno;

use crate::fileserver::check;

/// Names a file in events: its file system, and the handle without its length.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) file_system: u64,
    pub(super) handle: Box<[u8]>,
}

/// `MAX_HANDLE_SZ`.
const HANDLE_MAX: usize = 128;
/// What precedes the bytes of a `struct file_handle`: their number, and their type.
const HANDLE_HEADER: usize = 8;

impl Key {
    /// The key of a file that is open, maybe only as a path.
    pub(super) fn of(file: impl AsFd) -> Result<Self, Errno> {
        let mut handle = [0_u8; HANDLE_HEADER + HANDLE_MAX];
        handle[0] = u8::try_from(HANDLE_MAX).unwrap_or(u8::MAX);
        let flags = libc::AT_HANDLE_FID | libc::AT_EMPTY_PATH;
        let mut mount = 0;
        // SAFETY: the name ends in NUL. The kernel reads how many bytes there are for the handle, and
        // writes as many at most; it fills no field that needs more than the alignment of bytes,
        // because it copies.
        let result = unsafe {
            libc::name_to_handle_at(
                file.as_fd().as_raw_fd(),
                c"".as_ptr(),
                handle.as_mut_ptr().cast(),
                &raw mut mount,
                flags,
            )
        };
        check(result)?;
        let length = usize::from(handle[0]).min(HANDLE_MAX);
        let handle = handle[4..HANDLE_HEADER + length].into();
        Ok(Self { file_system: fstatvfs(file)?.f_fsid, handle })
    }
}

/// The marks, and the queue of what happened to the files that have one.
#[derive(Debug)]
pub(super) struct Group(OwnedFd);

impl Group {
    pub(super) fn new() -> Result<Self, Errno> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DIR_FID
            | libc::FAN_REPORT_NAME;
        let access = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: no memory is passed.
        let group = unsafe { libc::fanotify_init(flags, access.cast_unsigned()) };
        check(group)?;
        // SAFETY: the descriptor is new, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(group) }))
    }

    /// Adds events to the mark of a file, which a link in a directory leads to.
    pub(super) fn add(
        &self,
        (directory, name): (BorrowedFd<'_>, &CStr),
        mask: u64,
    ) -> Result<(), Errno> {
        self.mark(libc::FAN_MARK_ADD, (directory, name), mask)
    }

    /// Removes the mark of a file.
    pub(super) fn remove(&self, place: (BorrowedFd<'_>, &CStr), mask: u64) -> Result<(), Errno> {
        self.mark(libc::FAN_MARK_REMOVE, place, mask)
    }

    fn mark(
        &self,
        flags: libc::c_uint,
        (directory, name): (BorrowedFd<'_>, &CStr),
        mask: u64,
    ) -> Result<(), Errno> {
        let (group, directory) = (self.0.as_raw_fd(), directory.as_raw_fd());
        // SAFETY: the name ends in NUL and outlives the call.
        check(unsafe { libc::fanotify_mark(group, flags, mask, directory, name.as_ptr()) })
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
