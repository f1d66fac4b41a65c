//! What the file server gives up before it looks at a request.
//!
//! Its root is the pod's share and nothing else. It keeps the capabilities that serving files
//! needs. SYS_ADMIN is not among them, so `trusted.*` attributes cannot be written. Neither is
//! DAC_READ_SEARCH: with it, `open_by_handle_at(2)` would open any file of a file system of which
//! only a part is shared. An attacker who takes the process over has FOWNER and CHOWN, and could
//! change the mode and the owner of any host file that the process can reach. So it can reach none.
//! There is no seccomp filter yet.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_remount, move_mount,
    open_tree, unmount,
};
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit, umask};
use rustix::stdio::{dup2_stdin, dup2_stdout};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    set_capabilities, set_capabilities_secure_bits, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::config::JailConfig;
use crate::jail::{self, JailError, descriptors};

/// What serving files needs.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// The kernel's default limit of a process's descriptors.
const DESCRIPTORS_MAX: u64 = 1 << 20;

/// Enters the jail. `kept` and the standard streams stay open. Returns `/proc/self/fd`, which is
/// not reachable by a path and is the only way to reopen an `O_PATH` descriptor, and the limit of
/// descriptors.
pub(super) fn enter(
    identity: JailConfig,
    share: OwnedFd,
    kept: &[BorrowedFd<'_>],
) -> Result<(OwnedFd, u64), JailError> {
    umask(Mode::empty());
    let descriptors = raise_descriptor_limit()?;
    jail::unshare_all()?;
    let proc_self_fd = private_procfs().map_err(failed("private procfs"))?;
    jail::pivot_into(share.as_fd())?;
    drop(share);
    enter_read_only_view()?;
    replace_standard_streams().map_err(failed("standard streams"))?;
    let mut open = vec![0, 1, 2, proc_self_fd.as_raw_fd()];
    open.extend(kept.iter().map(AsRawFd::as_raw_fd));
    descriptors::close_all_but(&open).map_err(failed("descriptors"))?;
    jail::limit(descriptors, u64::from(super::config::THREADS_MAX) + 4)?;
    become_unprivileged(identity).map_err(failed("identity"))?;
    jail::seal()?;
    Ok((proc_self_fd, descriptors))
}

/// Forbids further threads; to be called when all have started.
pub(super) fn seal() -> Result<(), JailError> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Nproc, none).map_err(failed("thread limit"))
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError { step, source: error.into() }
}

/// Raises the limit, because each inode that the guest remembers is a descriptor. Returns it.
fn raise_descriptor_limit() -> Result<u64, JailError> {
    let limit = |value| Rlimit { current: Some(value), maximum: Some(value) };
    if setrlimit(Resource::Nofile, limit(DESCRIPTORS_MAX)).is_ok() {
        return Ok(DESCRIPTORS_MAX);
    }
    // Without CAP_SYS_RESOURCE the hard limit is the bound.
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(DESCRIPTORS_MAX);
    setrlimit(Resource::Nofile, limit(hard)).map_err(failed("descriptor limit"))?;
    Ok(hard)
}

/// Changes to another mount of the same root, which is read-only: the supervisor, which passed the
/// root, can still create mount points through its own mount. Before Linux 6.15 a mount can be
/// cloned only while it is attached, which it is here.
fn enter_read_only_view() -> Result<(), JailError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let view = open_tree(CWD, "/", flags).map_err(failed("view of the share"))?;
    jail::pivot_into(view.as_fd())?;
    let attributes = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    mount_remount("/", attributes, "").map_err(failed("read-only view of the share"))
}

/// Replaces `/dev/null`, which is the host's own and shared by everybody on it, with the root of
/// the share. The numbers stay in use, so that nothing opened later gets them.
fn replace_standard_streams() -> io::Result<()> {
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    dup2_stdin(&root)?;
    Ok(dup2_stdout(&root)?)
}

/// Returns `/proc/self/fd` of a new procfs, and nothing above it: there are the program, which is a
/// file of the host, and settings of the kernel. So the result is a mount whose root is that
/// directory and which is attached nowhere.
fn private_procfs() -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "subset", "pid")?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let procfs = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // Before Linux 6.15 a part of a mount can be cloned only while the mount is attached: here to
    // the root that this process is about to leave.
    move_mount(&procfs, "", CWD, "/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = open_tree(&procfs, "self/fd", flags)?;
    unmount("/proc", UnmountFlags::DETACH)?;
    Ok(descriptors)
}

/// Takes the pod's identity and keeps [`CAPABILITIES`], whichever uid a thread takes later.
///
/// Threads change their uid to create files as the caller. By default they would lose their
/// capabilities then, and with them a caller's right to write through a supplementary group, which
/// only the guest knows: the guest's kernel has checked permissions already.
fn become_unprivileged(identity: JailConfig) -> io::Result<()> {
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )?;
    clear_ambient_capability_set()?;
    jail::clear_bounding_set(CAPABILITIES).map_err(|error| error.source)?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    let sets = CapabilitySets {
        effective: CAPABILITIES,
        permitted: CAPABILITIES,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}
