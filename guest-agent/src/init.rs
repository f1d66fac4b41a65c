//! PID 1: prepares the guest, then serves until the machine ends.
//!
//! Only what containers or calls need is done, and in the order in which it is needed: the calls'
//! port listens as early as possible, and the share is mounted while the host connects. Whatever is
//! fatal is logged and the machine restarts, which the monitor reports as a reset.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use bulkhead_protocol::{AGENT_PORT, STREAM_PORT};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind_recursive, mount_move};
use rustix::net::{self, AddressFamily, SendFlags, SocketFlags, SocketType, netlink};
use rustix::process::{Resource, Rlimit, chdir, chroot, getpid, getrlimit, setrlimit};
use rustix::system::{RebootCommand, reboot};
use tokio_vsock::{
    VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL, VsockAddr, VsockListener, VsockStream,
};

use crate::container::Containers;
use crate::io::Meeting;
use crate::process::Reaper;
use crate::share::Share;
use crate::shared_sockets::SharedSockets;
use crate::{cgroup, fault, io as streams, logging, rpc};

/// The guest could not be prepared or can no longer be served.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("cannot make the root a mount that containers can pivot away from")]
    Root(#[source] io::Error),
    #[error("cannot mount {target}")]
    Mount { target: &'static str, source: io::Error },
    #[error("cannot prepare {path}")]
    Prepare { path: &'static str, source: io::Error },
    #[error("cannot bring up the loopback interface")]
    Loopback(#[source] io::Error),
    #[error("cannot raise limits")]
    Limit(#[source] io::Error),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot listen on vsock port {port}")]
    Listen { port: u32, source: io::Error },
    #[error("cannot serve calls any more")]
    Calls(#[source] tonic::transport::Error),
    #[error("cannot accept streams any more")]
    Streams(#[source] io::Error),
    #[error("cannot collect processes any more")]
    Reaper(#[source] io::Error),
}

/// One file system that every guest has.
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static std::ffi::CStr,
}

const MOUNTS: [Mount; 9] = {
    const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
    const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
    const fn new(
        kind: &'static str,
        target: &'static str,
        flags: MountFlags,
        options: &'static std::ffi::CStr,
    ) -> Mount {
        Mount { kind, target, flags, options }
    }
    [
        new("proc", "/proc", SAFE, c""),
        new("sysfs", "/sys", SAFE, c""),
        new("devtmpfs", "/dev", QUIET, c"mode=0755"),
        new("devpts", "/dev/pts", QUIET, c"newinstance,ptmxmode=0666,mode=0620,gid=5"),
        new("tmpfs", "/dev/shm", SAFE, c"mode=1777"),
        new("mqueue", "/dev/mqueue", SAFE, c""),
        new("tmpfs", "/run", PLAIN, c"mode=0755"),
        new("tmpfs", "/tmp", PLAIN, c"mode=1777"),
        new("cgroup2", cgroup::ROOT, SAFE, c"nsdelegate,memory_recursiveprot,favordynmods"),
    ]
};

/// Open files that a container's processes may raise their own limit to.
const OPEN_FILES: u64 = 1 << 20;

/// Other resources of which PID 1 has a limit. That of locked memory stays (`crate::spec`).
const UNLIMITED: [Resource; 6] = [
    Resource::Nproc,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Core,
];

/// Prepares the guest and serves it. Returns only if this is not PID 1.
pub(crate) fn main() -> ExitCode {
    logging::install();
    fault::watch_init();
    if getpid().as_raw_nonzero().get() != 1 {
        tracing::error!("bulkhead-agent is PID 1 of a guest and nothing else");
        return ExitCode::FAILURE;
    }
    std::panic::set_hook(Box::new(|panic| {
        logging::last(&format!("agent panicked: {panic}"));
        restart();
    }));
    if let Err(error) = prepare().and_then(|()| serve()) {
        tracing::error!(error = logging::chain(&error), "guest failed");
    }
    restart()
}

/// Restarts the machine. Nothing is written back: what that would wait for may be what failed.
fn restart() -> ! {
    let refused = reboot(RebootCommand::Restart);
    tracing::error!(?refused, "cannot restart the machine");
    // PID 1 must not end by itself; the kernel panics if it does, which the monitor reports too.
    std::process::exit(1)
}

fn prepare() -> Result<(), InitError> {
    leave_initial_root().map_err(|error| InitError::Root(error.into()))?;
    for Mount { kind, target, flags, options } in MOUNTS {
        let failed = |source| InitError::Mount { target, source };
        match fs::create_dir(target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(error));
            }
            Ok(()) | Err(_) => {}
        }
        match mount(kind, target, kind, flags, options) {
            // In a PID namespace of a running system some of it is there already.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    let prepared = |path| move |source| InitError::Prepare { path, source };
    prepare_cgroups().map_err(prepared(cgroup::ROOT))?;
    raise_loopback().map_err(|error| InitError::Loopback(error.into()))?;
    raise_limits().map_err(|error| InitError::Limit(error.into()))
}

/// Raises the hard limits of this process and of all that it starts, so that a container can have
/// any limits. A container's init sets them, and could not raise them in a user namespace of its
/// own.
fn raise_limits() -> rustix::io::Result<()> {
    setrlimit(Resource::Nofile, Rlimit { current: Some(1024), maximum: Some(OPEN_FILES) })?;
    for resource in UNLIMITED {
        setrlimit(resource, Rlimit { maximum: None, ..getrlimit(resource) })?;
    }
    Ok(())
}

/// Moves from the initial ramfs, which no process can leave by `pivot_root` (it is attached
/// nowhere), to a mount of the same files on top of it, which containers can leave.
fn leave_initial_root() -> rustix::io::Result<()> {
    mount_bind_recursive("/", "/run")?;
    chdir("/run")?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")
}

/// Makes the cgroup of all containers, and enables every controller that the kernel has for cgroups
/// below it.
fn prepare_cgroups() -> io::Result<()> {
    let root = Path::new(cgroup::ROOT);
    let containers = root.join(cgroup::CONTAINERS);
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    enable(&controllers, root);
    match fs::create_dir(&containers) {
        // In a PID namespace of a running system it may be there already.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    enable(&controllers, &containers);
    Ok(())
}

/// Enables controllers for the cgroups below `cgroup`: all at once, for each change takes the kernel
/// a while.
fn enable(controllers: &str, cgroup: &Path) {
    let control = cgroup.join("cgroup.subtree_control");
    let each = || controllers.split_whitespace().map(|controller| format!("+{controller}"));
    if fs::write(&control, each().collect::<Vec<_>>().join(" ")).is_ok() {
        return;
    }
    for controller in each() {
        // A controller may be bound to a v1 hierarchy where the agent is tested; a container that
        // needs it then fails with its name.
        if let Err(error) = fs::write(&control, &controller) {
            tracing::warn!(controller, %error, "cannot enable a cgroup controller");
        }
    }
}

/// Brings up the loopback of the network namespace that the caller is in: one `RTM_NEWLINK` of
/// rtnetlink(7), interface 1, which is always the loopback.
///
/// # Errors
/// The kernel refuses the message.
pub(crate) fn raise_loopback() -> rustix::io::Result<()> {
    const LENGTH: u32 = 32;
    const UP: u32 = 1; // IFF_UP
    let mut message = [0_u8; LENGTH as usize];
    // struct nlmsghdr: length, type RTM_NEWLINK, flags NLM_F_REQUEST | NLM_F_ACK, sequence, port
    message[0..4].copy_from_slice(&LENGTH.to_ne_bytes());
    message[4..6].copy_from_slice(&16_u16.to_ne_bytes());
    message[6..8].copy_from_slice(&5_u16.to_ne_bytes());
    // struct ifinfomsg: family, padding, type, index, flags, mask of flags
    message[20..24].copy_from_slice(&1_u32.to_ne_bytes());
    message[24..28].copy_from_slice(&UP.to_ne_bytes());
    message[28..32].copy_from_slice(&UP.to_ne_bytes());
    // Without a protocol it is NETLINK_ROUTE, which is number 0.
    let socket =
        net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let kernel = netlink::SocketAddrNetlink::new(0, 0);
    net::sendto(&socket, &message, SendFlags::empty(), &kernel)?;
    let mut answer = [0_u8; 128];
    let (length, _) = net::recv(&socket, &mut answer[..], net::RecvFlags::empty())?;
    // struct nlmsgerr: the header, then the negative error number, 0 if it was done
    match answer.get(16..20).and_then(|number| number.try_into().ok()).map(i32::from_ne_bytes) {
        Some(0) if length >= 20 => Ok(()),
        Some(number) if length >= 20 => Err(Errno::from_raw_os_error(number.wrapping_neg())),
        _ => Err(Errno::PROTO),
    }
}

/// Serves calls and streams and collects processes, for ever.
fn serve() -> Result<(), InitError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(InitError::Runtime)?;
    runtime.block_on(async {
        // In this order: a host whose call is accepted may open streams at once.
        let streams = listen(STREAM_PORT)?;
        let calls = listen(AGENT_PORT)?;
        tokio::spawn(knock());
        let (reaper, meeting, share) = (Reaper::default(), Meeting::default(), Share::default());
        let early = share.clone();
        tokio::spawn(async move {
            if let Err(error) = early.mount().await {
                tracing::warn!(%error, "cannot mount the share");
            }
        });
        let sockets = SharedSockets::serve(meeting.clone());
        let waits = (meeting.clone(), sockets.clone());
        let containers = Containers::new(reaper.clone(), waits, share.clone());
        let host = host_address();
        tokio::select! {
            ended = reaper.run() => ended.map_err(InitError::Reaper),
            ended = streams::serve(streams, meeting, host) => ended.map_err(InitError::Streams),
            ended = rpc::serve(calls, host, containers, (share, sockets)) => ended.map_err(InitError::Calls),
        }
    })
}

/// The only vsock address whose connections are served: the host's, so that no container reaches
/// the agent. In a PID namespace there is no host, and the test that acts as the host is local.
fn host_address() -> u32 {
    // PROC_PID_INIT_INO names the namespace that the kernel starts with.
    let first = Path::new("pid:[4026531836]");
    match fs::read_link("/proc/self/ns/pid") {
        Ok(namespace) if namespace != first => VMADDR_CID_LOCAL,
        Ok(_) | Err(_) => VMADDR_CID_HOST,
    }
}

fn listen(port: u32) -> Result<VsockListener, InitError> {
    let failed = |source| InitError::Listen { port, source };
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map_err(failed)?;
    // The crate's backlog is 128, and the kernel resets a connection that finds it full: also one
    // that there is room for, when many come at once.
    let backlog = i32::try_from(streams::UNCLAIMED).unwrap_or(i32::MAX);
    net::listen(&listener, backlog).map_err(|error| failed(error.into()))?;
    Ok(listener)
}

/// Tells the host that this listens. The host refuses each connection, and repeats its own requests
/// when it sees one.
async fn knock() {
    let _refused = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, AGENT_PORT)).await;
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};

    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    #[test]
    #[ignore = "needs the test host"]
    #[expect(unsafe_code, reason = "unshare(2) in a thread of its own")]
    fn a_new_networks_loopback_is_brought_up() {
        let answers = || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.send_to(b"x", (Ipv4Addr::LOCALHOST, socket.local_addr().unwrap().port()))
        };
        let tried = std::thread::spawn(move || {
            // SAFETY: this thread shares no network with others from here on, and opens no sockets
            // before.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            let before = answers().unwrap_err();
            assert_eq!(before.kind(), io::ErrorKind::NetworkUnreachable);
            raise_loopback().unwrap();
            assert_eq!(answers().unwrap(), 1);
            // It can be up already.
            raise_loopback().unwrap();
        });
        tried.join().unwrap();
    }
}
