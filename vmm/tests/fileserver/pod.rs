//! A pod without a virtual machine: a share, its file server, and a mount of it.

// UNSAFETY: a process starts with a descriptor under a fixed number; threads unshare namespaces.
#![expect(unsafe_code, reason = "fork and unshare")]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use bulkhead_vmm::config::JailConfig;
use bulkhead_vmm::fileserver::config::{FsAnswer, FsConfig, THREADS_MIN, VERSION};
use bulkhead_vmm::seqpacket;
use rustix::fs::{CWD, Gid, Mode, Uid, mkdirat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::net::sockopt::set_socket_send_buffer_size_force;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, UnshareFlags, move_into_link_name_space,
    remove_capability_from_bounding_set, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    unshare_unsafe,
};
use tempfile::TempDir;

/// The identity that the file server takes.
pub(crate) const JAIL: JailConfig = JailConfig { uid: 71_001, gid: 71_002 };
pub(crate) const THREADS: u8 = THREADS_MIN;
const PACKET_BYTES: usize = 1 << 20;
const SOCKET_BYTES: usize = 4 << 20;

/// A running file server, mounted.
pub(crate) struct Pod {
    /// The directory that is served, as the host sees it.
    pub(crate) host: PathBuf,
    /// The same directory through the file server.
    pub(crate) guest: PathBuf,
    /// The root of the share through the file server.
    pub(crate) root: PathBuf,
    pub(crate) server: Server,
    /// The writable side of the share's root.
    share: OwnedFd,
    directory: TempDir,
}

/// The process of the file server.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) control: Option<OwnedFd>,
}

impl Pod {
    /// Serves an empty directory. The calling thread gets a mount namespace of its own, so nothing
    /// is left behind when the test ends, however it ends.
    pub(crate) fn new() -> Self {
        Self::start(None)
    }

    /// The same with a file server that cannot have more descriptors than these.
    pub(crate) fn with_descriptors(limit: u64) -> Self {
        Self::start(Some(limit))
    }

    fn start(descriptors: Option<u64>) -> Self {
        // SAFETY: descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let directory = TempDir::new().unwrap();
        let (host, root) = (directory.path().join("host"), directory.path().join("guest"));
        for path in [&host, &root] {
            fs::create_dir(path).unwrap();
        }
        // A tmpfs: fast, and it has extended attributes, holes and access lists.
        mount("tmpfs", &host, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::set_permissions(&host, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let share = tmpfs();
        let (relay, ours) = relay_pair();
        let server = Server::start(share.as_fd(), relay.as_fd(), descriptors);
        drop(relay);
        bridge(ours, &root);
        let pod = Self { guest: root.join("c/rootfs"), host, root, server, share, directory };
        pod.attach(&pod.host, "c/rootfs");
        pod
    }

    /// Makes a directory visible in the share.
    pub(crate) fn attach(&self, source: &Path, target: &str) {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, source, flags).unwrap();
        self.server.attach(&self.share, &tree, target);
    }

    /// A second directory of the host, on a file system of its own.
    pub(crate) fn other_host(&self) -> PathBuf {
        let path = self.directory.path().join("other");
        fs::create_dir(&path).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        path
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // FORCE aborts the connection. A child that another test forks has the files of this one
        // open until it has executed its program, and without FORCE would wait for ever for the
        // server to acknowledge that it closes them.
        let _ = unmount(&self.root, UnmountFlags::FORCE | UnmountFlags::DETACH);
        let _ = unmount(&self.host, UnmountFlags::DETACH);
        let _ = unmount(self.directory.path().join("other"), UnmountFlags::DETACH);
    }
}

impl Server {
    /// Starts the process, configures it and waits until it serves.
    pub(crate) fn start(
        share: BorrowedFd<'_>,
        relay: BorrowedFd<'_>,
        descriptors: Option<u64>,
    ) -> Self {
        let server = Self::spawn(descriptors);
        let config = FsConfig { version: VERSION, jail: JAIL, threads: THREADS, sockets: true };
        let answer = server.configure(&serde_json::to_vec(&config).unwrap(), &[share, relay]);
        assert_eq!(answer, FsAnswer::Ready(true));
        server
    }

    /// Starts the process as the first of a new pid namespace.
    pub(crate) fn spawn(descriptors: Option<u64>) -> Self {
        let (theirs, control) = seqpacket::pair().unwrap();
        let child =
            thread::scope(|scope| scope.spawn(|| spawn(&theirs, descriptors)).join().unwrap());
        Self { child, control: Some(control) }
    }

    /// Sends the first message and returns the answer.
    pub(crate) fn configure(&self, config: &[u8], descriptors: &[BorrowedFd<'_>]) -> FsAnswer {
        let control = self.control.as_ref().unwrap();
        seqpacket::send(control, config, descriptors).unwrap();
        let answer = seqpacket::receive(control).unwrap().expect("an answer");
        serde_json::from_slice(&answer.bytes).unwrap()
    }

    /// Attaches a detached mount in the share and nowhere else, as the supervisor does.
    pub(crate) fn attach(&self, share: &OwnedFd, tree: &OwnedFd, target: &str) {
        let mut path = PathBuf::new();
        for part in Path::new(target) {
            path.push(part);
            let _ = mkdirat(share, &path, Mode::from_raw_mode(0o755));
        }
        let namespace = File::open(format!("/proc/{}/ns/mnt", self.child.id())).unwrap();
        thread::scope(|scope| {
            let attach = || {
                // SAFETY: descriptors stay shared.
                unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
                let kind = Some(LinkNameSpaceType::Mount);
                move_into_link_name_space(namespace.as_fd(), kind).unwrap();
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                move_mount(tree, "", CWD, Path::new("/").join(target), flags).unwrap();
            };
            scope.spawn(attach).join().unwrap();
        });
    }

    /// Closes the control socket, which ends the process.
    pub(crate) fn hang_up(&mut self) {
        self.control = None;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(control: &OwnedFd, descriptors: Option<u64>) -> Child {
    // SAFETY: only children are affected.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.unwrap();
    // A number above 3: `dup2` of a descriptor onto itself would leave it close-on-exec.
    let control = rustix::io::fcntl_dupfd_cloexec(control, 4).unwrap();
    let number = control.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-fs"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let prepare = move || {
        inherit(number)?;
        descriptors.map_or(Ok(()), limit_descriptors)
    };
    // SAFETY: all that runs between fork and exec are system calls.
    unsafe { command.pre_exec(prepare) };
    command.spawn().unwrap()
}

/// Sets a limit that the process has no right to raise.
fn limit_descriptors(limit: u64) -> io::Result<()> {
    remove_capability_from_bounding_set(CapabilitySet::SYS_RESOURCE)?;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) })?)
}

/// Gives the descriptor the number under which the process expects it.
fn inherit(control: RawFd) -> io::Result<()> {
    // SAFETY: nothing in the new process owns descriptor 3.
    match unsafe { libc::dup2(control, 3) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A file system in memory, mounted nowhere.
pub(crate) fn tmpfs() -> OwnedFd {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(context.as_fd()).unwrap();
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap()
}

/// A socket pair with room for large packets.
pub(crate) fn relay_pair() -> (OwnedFd, OwnedFd) {
    let (theirs, ours) = seqpacket::pair().unwrap();
    for end in [&theirs, &ours] {
        set_socket_send_buffer_size_force(end, SOCKET_BYTES).unwrap();
    }
    (theirs, ours)
}

/// Mounts `/dev/fuse` and passes its messages to the relay socket and back.
fn bridge(relay: OwnedFd, target: &Path) {
    let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let options = std::ffi::CString::new(options).unwrap();
    mount("bulkhead", target, "fuse", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    let (device, relay) = (Arc::new(device), Arc::new(relay));
    let (from_device, to_relay) = (Arc::clone(&device), Arc::clone(&relay));
    thread::spawn(move || {
        let mut packet = vec![0; PACKET_BYTES];
        loop {
            match (&*from_device).read(&mut packet) {
                Ok(len) => {
                    if send(&to_relay, &packet[..len], SendFlags::NOSIGNAL).is_err() {
                        return;
                    }
                }
                // Interrupted before it was read: the kernel takes the request back.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Unmounted.
                Err(_) => return,
            }
        }
    });
    thread::spawn(move || {
        let mut packet = vec![0; PACKET_BYTES];
        while let Ok((len @ 1.., _)) = recv(&relay, packet.as_mut_slice(), RecvFlags::empty()) {
            match (&*device).write(&packet[..len]) {
                Ok(_) => {}
                // The request was given up meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return eprintln!("the kernel refused a reply: {error}"),
            }
        }
    });
}

/// Runs a function as another user, on a thread of its own.
pub(crate) fn as_user<T: Send>(
    uid: u32,
    gid: u32,
    groups: &[u32],
    run: impl FnOnce() -> T + Send,
) -> T {
    thread::scope(|scope| {
        let run = || {
            // SAFETY: descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
            let groups: Vec<_> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
            set_thread_groups(&groups).unwrap();
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            run()
        };
        scope.spawn(run).join().unwrap()
    })
}
