//! What an attacker who took the file server over could do with its capabilities, its descriptors
//! and its namespaces.

// UNSAFETY: file handles have no safe wrapper, and a thread enters namespaces.
#![expect(unsafe_code, reason = "open_by_handle_at(2), unshare(2)")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, StatVfsMountFlags, StatxFlags, Uid, fstatvfs, openat, statx,
};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags,
    move_into_link_name_space, set_capabilities, set_capabilities_secure_bits, set_thread_res_gid,
    set_thread_res_uid, unshare_unsafe,
};

use crate::pod::{JAIL, Pod};

/// A file handle (`struct file_handle`), which names a file whatever its path is.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; 128],
}

impl Handle {
    fn of(path: &Path) -> Self {
        let mut handle = Self { bytes: 128, kind: 0, handle: [0; 128] };
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        let (mut mount, place) = (0, (&raw mut handle).cast());
        // SAFETY: the structure has room for as many bytes as it says.
        let result = unsafe {
            libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), place, &raw mut mount, 0)
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        handle
    }

    /// Opens it in the file system that `directory` lies in.
    fn open(&mut self, directory: &OwnedFd) -> io::Result<File> {
        use std::os::fd::FromRawFd;
        let place = (&raw mut *self).cast();
        // SAFETY: the structure is as the kernel has made it.
        let fd = unsafe { libc::open_by_handle_at(directory.as_raw_fd(), place, libc::O_RDONLY) };
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new.
        Ok(unsafe { File::from_raw_fd(fd) })
    }
}

/// The capabilities of the file server.
fn capabilities(pod: &Pod) -> CapabilitySet {
    let status = fs::read_to_string(format!("/proc/{}/status", pod.server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    CapabilitySet::from_bits_retain(u64::from_str_radix(line, 16).unwrap())
}

/// Runs a function as the file server could: in its mount namespace, with its identity, and with
/// `more` added to its capabilities.
fn in_its_place<T: Send>(pod: &Pod, more: CapabilitySet, run: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/proc/{}/ns/mnt", pod.server.child.id())).unwrap();
    let set = capabilities(pod).union(more);
    let enter = || {
        // SAFETY: descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
        set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP).unwrap();
        let (uid, gid) = (Uid::from_raw(JAIL.uid), Gid::from_raw(JAIL.gid));
        set_thread_res_gid(gid, gid, gid).unwrap();
        set_thread_res_uid(uid, uid, uid).unwrap();
        let inheritable = CapabilitySet::empty();
        set_capabilities(None, CapabilitySets { effective: set, permitted: set, inheritable })
            .unwrap();
        run()
    };
    thread::scope(|scope| scope.spawn(enter).join().unwrap())
}

#[test]
fn a_file_beside_the_share_is_not_opened_by_its_handle() {
    let pod = Pod::new();
    let host = pod.other_host();
    fs::create_dir(host.join("shared")).unwrap();
    fs::write(host.join("secret"), b"of the host").unwrap();
    pod.attach(&host.join("shared"), "c/shared");
    let open = || {
        let directory = openat(CWD, "/c/shared", OFlags::RDONLY, Mode::empty()).unwrap();
        Handle::of(Path::new("/c/shared")).open(&directory)?;
        Ok(directory)
    };
    let mut secret = Handle::of(&host.join("secret"));
    let mut steal = |more| {
        in_its_place(&pod, more, || {
            let directory = openat(CWD, "/c/shared", OFlags::RDONLY, Mode::empty()).unwrap();
            secret.open(&directory).and_then(io::read_to_string)
        })
    };
    // With the capability that it must not have, the same attempt succeeds.
    assert_eq!(steal(CapabilitySet::DAC_READ_SEARCH).unwrap(), "of the host");
    let refused = steal(CapabilitySet::empty()).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    // A file of the share cannot be opened this way either.
    let refused: io::Result<OwnedFd> = in_its_place(&pod, CapabilitySet::empty(), open);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
}

/// The open descriptors of the process, as paths in `/proc`.
fn descriptors(pod: &Pod) -> Vec<PathBuf> {
    let directory = format!("/proc/{}/fd", pod.server.child.id());
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn open_path(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn its_procfs_is_its_own_descriptors_and_nothing_else() {
    const PROC_SUPER_MAGIC: libc::__fsword_t = 0x9fa0;
    let pod = Pod::new();
    let paths = descriptors(&pod);
    let of_procfs = paths
        .iter()
        .map(|path| open_path(path))
        .filter(|fd| rustix::fs::fstatfs(fd).is_ok_and(|stat| stat.f_type == PROC_SUPER_MAGIC));
    let of_procfs: Vec<_> = of_procfs.collect();
    let [directory] = &of_procfs[..] else { panic!("{} of a procfs", of_procfs.len()) };
    let open = |path| openat(directory, path, OFlags::PATH, Mode::empty());
    assert!(open("0").is_ok());
    // Out of reach: the program (a file of the host), other processes, the kernel's settings.
    for path in ["../exe", "../root", "../../1/root", "../../self", "../../sys", "exe"] {
        assert_eq!(open(path).unwrap_err(), Errno::NOENT, "{path}");
    }
    let inode = |fd: &OwnedFd| {
        statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::MNT_ID)
            .map(|stat| (stat.stx_ino, stat.stx_mnt_id))
            .unwrap()
    };
    assert_eq!(inode(&open("..").unwrap()), inode(directory), "there is nothing above");
    let flags = fstatvfs(directory).unwrap().f_flag;
    let wanted = StatVfsMountFlags::RDONLY
        | StatVfsMountFlags::NOSUID
        | StatVfsMountFlags::NODEV
        | StatVfsMountFlags::NOEXEC;
    assert!(flags.contains(wanted), "{flags:?}");
}

#[test]
fn it_holds_no_file_of_the_host_but_its_log() {
    let pod = Pod::new();
    // CAP_FOWNER lets a process change the mode of any file that it has open. For a device, that
    // would change it for all of the host.
    for path in descriptors(&pod).into_iter().filter(|path| !path.ends_with("2")) {
        let metadata = fs::metadata(&path).unwrap();
        let device =
            metadata.file_type().is_char_device() || metadata.file_type().is_block_device();
        assert!(!device, "{} is device {:#x}", path.display(), metadata.rdev());
    }
}
