//! The inner side: the first process of the test host. It mounts an overlay over the machine's root
//! and the file systems of a container host, runs the command, copies its streams to the ports, and
//! sends back its exit status. Then it kills processes that the command has left running.
//!
//! Errors go to the kernel's console, where the outer side reads them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change,
    mount_move, move_mount, open_tree,
};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions};
use rustix::system::RebootCommand;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::request::{
    Answer, CONTROL_PORT, Hosted, Request, SHARE_DIRECTORY, SHARE_TAG, STDERR_PORT, STDOUT_PORT,
};
use crate::{cgroups, early, systemd};

/// How long the ports may take to appear, and the streams to end once everything is killed.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);
const TERMINAL: &str = "/dev/hvc0";

/// Never returns: when the first process ends, the kernel panics.
pub(crate) fn run() -> ! {
    until_the_end(host())
}

/// The same as [`run`] for the child beside systemd.
pub(crate) fn run_beside_systemd() -> ! {
    until_the_end(systemd::beside_it())
}

fn until_the_end(result: Result<()>) -> ! {
    if let Err(error) = result {
        complain(&format!("test-host (inside): {error:#}"));
    }
    loop {
        rustix::fs::sync();
        // With QEMU's -no-reboot this ends the machine.
        _ = rustix::system::reboot(RebootCommand::Restart);
        thread::sleep(PATIENCE);
    }
}

fn complain(message: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/ttyS0") {
        _ = writeln!(console, "{message}");
    }
}

fn host() -> Result<()> {
    early::reach_root().context("reach the machine's root")?;
    overlay_root().context("overlay over the root")?;
    let machine_tmp = File::open("/tmp").context("open the machine's /tmp")?;
    mount_all()?;
    settings()?;
    let control = ports()?.open(CONTROL_PORT)?;
    let mut line = String::new();
    BufReader::new(&control).read_line(&mut line).context("read the request")?;
    let request: Request = serde_json::from_str(&line).context("parse the request")?;
    let mounted = match request.hosted {
        Hosted::Alone | Hosted::BySystemd => cgroups::unified(),
        Hosted::OnCgroupV1 => cgroups::legacy(),
    };
    let ready = mounted
        .and_then(|()| show_checkout(&machine_tmp, Path::new(&request.directory)))
        .and_then(|()| request.modules.as_deref().map_or(Ok(()), early::load_modules));
    if ready.is_ok() && request.hosted == Hosted::BySystemd {
        match systemd::become_it(&request, control)? {}
    }
    answer(&request, ready, control)
}

/// Runs the command if the host is ready, and sends its exit status or the error.
pub(crate) fn answer(request: &Request, ready: Result<()>, mut control: File) -> Result<()> {
    let beats = control.try_clone().context("port for the answer")?;
    // The outer side's empty lines are read and ignored. The thread ends with the host.
    thread::spawn(move || io::copy(&mut &beats, &mut io::sink()));
    tell(&mut control, &Answer::Ready)?;
    let outcome = match ready.and_then(|()| ports()).and_then(|ports| serve(request, &ports)) {
        Ok(status) => Answer::Ended(status),
        Err(error) => Answer::NotRun(format!("{error:#}")),
    };
    rustix::fs::sync();
    tell(&mut control, &outcome)?;
    // The outer side ends QEMU as soon as it has read the outcome.
    thread::sleep(PATIENCE);
    Ok(())
}

fn tell(control: &mut File, answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    control.write_all(&line).context("answer")
}

/// Mounts an overlay, so that all writes below `/` go to memory and are lost with the host.
fn overlay_root() -> Result<()> {
    attach("tmpfs", "/run", "tmpfs", "mode=755")?;
    for directory in ["/run/upper", "/run/work", "/run/root"] {
        fs::create_dir(directory).with_context(|| format!("create {directory}"))?;
    }
    attach("overlay", "/run/root", "overlay", "lowerdir=/,upperdir=/run/upper,workdir=/run/work")?;
    rustix::process::chdir("/run/root").context("enter the overlay")?;
    mount_move(".", "/").context("move the overlay to the root")?;
    rustix::process::chroot(".").context("chroot")?;
    rustix::process::chdir("/").context("enter the root")?;
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("share the mounts below the root")
}

fn mount_all() -> Result<()> {
    attach("proc", "/proc", "proc", "")?;
    attach("sysfs", "/sys", "sysfs", "")?;
    attach("devtmpfs", "/dev", "devtmpfs", "mode=755")?;
    for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        fs::create_dir_all(directory).with_context(|| format!("create {directory}"))?;
    }
    attach("devpts", "/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666")?;
    attach("tmpfs", "/dev/shm", "tmpfs", "mode=1777")?;
    attach("mqueue", "/dev/mqueue", "mqueue", "")?;
    attach("tmpfs", "/run", "tmpfs", "mode=755")?;
    attach("tmpfs", "/tmp", "tmpfs", "mode=1777")?;
    for (link, target) in [("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1")] {
        std::os::unix::fs::symlink(format!("/proc/{target}"), format!("/dev/{link}"))?;
    }
    Ok(std::os::unix::fs::symlink("/proc/self/fd/2", "/dev/stderr")?)
}

/// If the checkout is below the machine's /tmp, makes its top directory there visible in the host's
/// /tmp.
fn show_checkout(machine_tmp: &File, directory: &Path) -> Result<()> {
    let Ok(below) = directory.strip_prefix("/tmp") else { return Ok(()) };
    let Some(first) = below.components().next() else { return Ok(()) };
    let target = Path::new("/tmp").join(first);
    fs::create_dir(&target).with_context(|| format!("create {}", target.display()))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(machine_tmp, first.as_os_str(), flags).context("clone the checkout")?;
    move_mount(&tree, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("show the checkout")
}

pub(crate) fn attach(source: &str, target: &str, kind: &str, data: &str) -> Result<()> {
    let data = std::ffi::CString::new(data)?;
    mount(source, target, kind, MountFlags::empty(), data.as_c_str())
        .with_context(|| format!("mount {kind} on {target}"))
}

/// Applies settings that an init system makes on a container host.
fn settings() -> Result<()> {
    fs::write("/proc/sys/kernel/hostname", "testhost")?;
    let files = Rlimit { current: Some(1024), maximum: Some(1 << 20) };
    rustix::process::setrlimit(Resource::Nofile, files).context("set the limit of open files")?;
    loopback_up().context("bring the loopback interface up")
}

/// One RTM_NEWLINK request of rtnetlink(7): interface 1 gets IFF_UP.
fn loopback_up() -> Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const LOOPBACK: i32 = 1;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend_from_slice(&32_u32.to_ne_bytes());
    message.extend_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence number and port
    message.extend_from_slice(&[0; 4]); // family, padding, type
    message.extend_from_slice(&LOOPBACK.to_ne_bytes());
    message.extend_from_slice(&IFF_UP.to_ne_bytes());
    message.extend_from_slice(&IFF_UP.to_ne_bytes()); // which flags change
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None, // protocol 0 is NETLINK_ROUTE
    )?;
    let sent = send(&socket, &message, SendFlags::empty())?;
    ensure!(sent == message.len(), "rtnetlink took {sent} bytes");
    Ok(())
}

/// The virtio-serial ports by name.
struct Ports(BTreeMap<String, PathBuf>);

/// Waits until every port has its name and its device node.
fn ports() -> Result<Ports> {
    let started = Instant::now();
    loop {
        let ports = find_ports().unwrap_or_default();
        if [CONTROL_PORT, STDOUT_PORT, STDERR_PORT].iter().all(|name| ports.contains_key(*name)) {
            return Ok(Ports(ports));
        }
        ensure!(started.elapsed() < PATIENCE, "the virtio-serial ports do not appear: {ports:?}");
        thread::sleep(POLL);
    }
}

fn find_ports() -> io::Result<BTreeMap<String, PathBuf>> {
    let mut ports = BTreeMap::new();
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = Path::new("/dev").join(entry.file_name());
        if fs::metadata(&device).is_ok_and(|node| node.file_type().is_char_device()) {
            ports.insert(name.trim().to_owned(), device);
        }
    }
    Ok(ports)
}

impl Ports {
    fn open(&self, name: &str) -> Result<File> {
        let device = self.0.get(name).with_context(|| format!("no port {name}"))?;
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(device)
            .with_context(|| format!("open the port {name}"))
    }
}

/// Runs the command to its end and returns its exit status.
fn serve(request: &Request, ports: &Ports) -> Result<u8> {
    if request.share {
        fs::create_dir(SHARE_DIRECTORY)?;
        let options = "trans=virtio,version=9p2000.L,msize=1048576,cache=none";
        attach(SHARE_TAG, SHARE_DIRECTORY, "9p", options)?;
    }
    ensure!(
        Path::new(&request.directory).is_dir(),
        "the working directory {} is not in the test host (its /tmp and /run are its own)",
        request.directory
    );
    let (mut child, copies) = if request.command.is_empty() {
        (shell(request)?, Vec::new())
    } else {
        command(request, ports)?
    };
    // Closed here, because otherwise the pipes would never reach end-of-file.
    drop((child.stdin.take(), child.stdout.take(), child.stderr.take()));
    let status = reap(&child)?;
    let started = Instant::now();
    while !copies.iter().all(JoinHandle::is_finished) && started.elapsed() < PATIENCE {
        kill_everything()?;
        thread::sleep(POLL);
    }
    Ok(status)
}

fn command(request: &Request, ports: &Ports) -> Result<(Child, Vec<JoinHandle<()>>)> {
    let (program, arguments) = request.command.split_first().context("no command")?;
    let mut command = prepared(program, request);
    command.args(arguments).stdin(Stdio::null());
    let (stdout, stdout_end) = io::pipe()?;
    let mut copies = vec![relay(stdout, ports.open(STDOUT_PORT)?)];
    if request.merged {
        command.stderr(stdout_end.try_clone()?);
    } else {
        let (stderr, stderr_end) = io::pipe()?;
        copies.push(relay(stderr, ports.open(STDERR_PORT)?));
        command.stderr(stderr_end);
    }
    command.stdout(stdout_end);
    let child = command.spawn().with_context(|| format!("run {program}"))?;
    Ok((child, copies))
}

fn shell(request: &Request) -> Result<Child> {
    let terminal = OpenOptions::new().read(true).write(true).open(TERMINAL).context(TERMINAL)?;
    let (rows, columns) = request.window;
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal, size).context("set the size of the terminal")?;
    let shell = request.environment.get("SHELL").map_or("/bin/bash", String::as_str);
    prepared("setsid", request)
        .args(["--ctty", shell])
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal)
        .spawn()
        .with_context(|| format!("run {shell}"))
}

fn prepared(program: impl AsRef<OsStr>, request: &Request) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs(&request.environment).env("BULKHEAD_TEST_HOST", "1");
    command.current_dir(&request.directory);
    command
}

fn relay(mut from: io::PipeReader, mut to: File) -> JoinHandle<()> {
    thread::spawn(move || {
        if let Err(error) = copy(&mut from, &mut to) {
            complain(&format!("test-host (inside): copy a stream: {error}"));
        }
    })
}

/// Copies with read and write: `io::copy` would use splice(2), which the ports' driver does not
/// support for every pipe.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length])?,
        }
    }
}

/// Waits for the command, and reaps orphans, which are children of the first process.
fn reap(child: &Child) -> Result<u8> {
    let wanted = i32::try_from(child.id())?;
    loop {
        let ended = rustix::process::wait(WaitOptions::empty()).context("wait for the command")?;
        let Some((pid, status)) = ended else { continue };
        if pid.as_raw_nonzero().get() != wanted {
            continue;
        }
        if let Some(code) = status.exit_status() {
            return Ok(u8::try_from(code & 0xff)?);
        }
        if let Some(signal) = status.terminating_signal() {
            return Ok(u8::try_from(128 + signal)?);
        }
    }
}

/// Kills all processes except the first one and this one; kernel threads ignore the signal.
fn kill_everything() -> Result<()> {
    let spared = |pid: Pid| pid.is_init() || pid == rustix::process::getpid();
    for entry in fs::read_dir("/proc")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(pid) = number.and_then(Pid::from_raw).filter(|pid| !spared(*pid)) {
            // The process may have ended since the directory was read.
            _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
    Ok(())
}
