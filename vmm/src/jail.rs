//! The jail that a process of the pod enters before it handles anything from the guest.
//!
//! The supervisor has already given it a pid namespace of its own. What remains is done here, in an
//! order in which each step still has the rights that it needs: namespaces, an empty root, limits,
//! the bounding set, the identity, and last `no_new_privs`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, fchdir, pivot_root, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitySet, Gid, Uid, UnshareFlags, remove_capability_from_bounding_set, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use thiserror::Error;

use crate::config::JailConfig;

pub(crate) mod descriptors;

/// The monitor's descriptors: memory and vCPUs, eventfds, two for each stream.
const DESCRIPTORS_MAX: u64 = 4096;
/// Processes and threads of the jailed identity.
const THREADS_MAX: u64 = 256;

/// A step that failed; the process must not go on.
#[derive(Debug, Error)]
#[error("jail: {step}")]
pub struct JailError {
    /// What was attempted.
    pub step: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// Names the step in the error.
fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, JailError> {
    result.map_err(|error| JailError { step, source: error.into() })
}

/// Jails the monitor: after this it has its descriptors and nothing else.
///
/// # Errors
/// Names the step that failed.
pub fn enter(identity: JailConfig) -> Result<(), JailError> {
    unshare_all()?;
    enter_empty_root()?;
    limit(DESCRIPTORS_MAX, THREADS_MAX)?;
    clear_bounding_set(CapabilitySet::empty())?;
    step("group list", set_thread_groups(&[]))?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    step("group id", set_thread_res_gid(gid, gid, gid))?;
    // Leaving uid 0 also empties the permitted, effective and ambient sets, capabilities(7).
    step("user id", set_thread_res_uid(uid, uid, uid))?;
    seal()
}

/// Moves the calling thread, and those that it starts later, out of the host's mount, IPC and UTS
/// namespaces. This is for a process that needs its rights and its network, but nothing that has a
/// path. If the caller is the main thread, a process that enters its namespaces finds an empty
/// read-only root.
///
/// # Errors
/// Names the step that failed.
pub fn hide() -> Result<(), JailError> {
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)?;
    privatize_mounts()?;
    enter_empty_root()
}

/// Enters new mount, network, IPC, UTS and cgroup namespaces.
pub(crate) fn unshare_all() -> Result<(), JailError> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    unshare(flags)?;
    privatize_mounts()
}

fn privatize_mounts() -> Result<(), JailError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    step("private mounts", mount_change("/", private))
}

// UNSAFETY: unsharing is unsafe in rustix because other threads may rely on what is shared.
#[expect(unsafe_code, reason = "unshare(2)")]
fn unshare(flags: UnshareFlags) -> Result<(), JailError> {
    // SAFETY: CLONE_FILES is not asked for, so that descriptors stay shared by all threads; other
    // threads keep the root and the namespaces that they have.
    step("namespaces", unsafe { rustix::thread::unshare_unsafe(flags) })
}

/// Makes an empty read-only tmpfs the root, and detaches everything else.
pub(crate) fn enter_empty_root() -> Result<(), JailError> {
    let context = step("empty root: fsopen", fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC))?;
    for (key, value) in [("size", "4k"), ("nr_inodes", "2"), ("mode", "0555")] {
        step("empty root: options", fsconfig_set_string(context.as_fd(), key, value))?;
    }
    step("empty root: create", fsconfig_create(context.as_fd()))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mounted = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes);
    pivot_into(step("empty root: fsmount", mounted)?.as_fd())
}

/// Makes a detached mount the root; the old root is gone afterwards.
pub(crate) fn pivot_into(root: BorrowedFd<'_>) -> Result<(), JailError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    step("new root: attach", move_mount(root, "", CWD, "/", flags))?;
    step("new root: enter", fchdir(root))?;
    // This stacks the old root on top of the new one; the next step detaches it.
    step("new root: pivot", pivot_root(".", "."))?;
    step("old root: detach", unmount(".", UnmountFlags::DETACH))?;
    step("new root: working directory", rustix::process::chdir("/"))
}

/// Bounds what the process can hold, whatever the guest makes it do.
pub(crate) fn limit(descriptors: u64, threads: u64) -> Result<(), JailError> {
    let limits = [
        (Resource::Nofile, descriptors),
        (Resource::Nproc, threads),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ];
    for (resource, value) in limits {
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        step("resource limits", setrlimit(resource, limit))?;
    }
    Ok(())
}

/// Limits what a program could get, if the process executed one, to `keep`.
pub(crate) fn clear_bounding_set(keep: CapabilitySet) -> Result<(), JailError> {
    // The kernel refuses a capability that it does not know; there is nothing to remove then.
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if keep.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return step("bounding set", Err(error)),
        }
    }
    Ok(())
}

/// The last step: the process can gain no privileges, and no unprivileged one can trace it.
pub(crate) fn seal() -> Result<(), JailError> {
    step("no_new_privs", set_no_new_privs(true))?;
    step("dumpable", set_dumpable_behavior(DumpableBehavior::NotDumpable))
}
