//! Acting with the ids of the caller, `credentials(7)`, `umask(2)`.
//!
//! A new file belongs to the caller, so the creating thread takes the caller's ids for the time of
//! one system call. It keeps its capabilities meanwhile (see [`super::jail`]): the guest's kernel
//! has checked permissions already, with groups and file modes that only it knows. The same goes
//! for a new name of a file: on an ID-mapped mount, the kernel refuses one from a user who is not
//! in the mapping.

// UNSAFETY: `unshare` can separate the descriptors of threads; here it separates the umask.
#![expect(unsafe_code, reason = "unshare(2)")]

use std::os::fd::AsFd;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Gid, Uid, fchdir, getegid, geteuid, umask};
use rustix::thread::{
    CapabilitySet, UnshareFlags, capabilities, set_capabilities, set_thread_res_gid,
    set_thread_res_uid, unshare_unsafe,
};

/// Gives the calling thread a umask and a working directory of its own. The latter is set to
/// `directory`, relative to which some system calls have to be made.
pub(super) fn detach_thread(directory: impl AsFd) -> Result<(), Errno> {
    // SAFETY: only FS is unshared; descriptors stay common to all threads.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    fchdir(directory)
}

/// The ids of the caller, and its umask.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) umask: u32,
}

impl Caller {
    /// Runs a system call that creates a file, or a name of a file.
    pub(super) fn run<T>(self, create: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        let _restored = Restore { uid: geteuid(), gid: getegid() };
        set_thread_res_gid(None, Gid::from_raw(self.gid), None)?;
        set_thread_res_uid(None, Uid::from_raw(self.uid), None)?;
        // The guest does not apply it: the host's kernel knows when a default ACL overrides it.
        umask(Mode::from_raw_mode(self.umask & 0o777));
        create()
    }
}

struct Restore {
    uid: Uid,
    gid: Gid,
}

impl Drop for Restore {
    fn drop(&mut self) {
        umask(Mode::empty());
        let restored = set_thread_res_uid(None, self.uid, None)
            .and_then(|()| set_thread_res_gid(None, self.gid, None));
        if restored.is_err() {
            // The next request would run with the wrong ids.
            std::process::abort();
        }
    }
}

/// Runs a system call without CAP_FSETID if `strip`, so that the host's kernel takes set-id bits
/// away as it would for an unprivileged writer.
pub(super) fn stripping_set_id<T>(
    strip: bool,
    change: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    if !strip {
        return change();
    }
    let sets = capabilities(None)?;
    let mut without = sets;
    without.effective.remove(CapabilitySet::FSETID);
    set_capabilities(None, without)?;
    let result = change();
    set_capabilities(None, sets)?;
    result
}
