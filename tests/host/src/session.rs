//! The outer side: starts QEMU, sends the request, copies the streams, and returns the command's
//! exit status.
//!
//! Every stream is a socket pair, so nothing is left in a file system. However this process dies,
//! QEMU dies too.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_image::initramfs;
use guest_image::progress::say;
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::termios::tcgetwinsize;

use crate::Options;
use crate::kernel::{Kernel, Modules};
use crate::qemu::{Machine, Sockets};
use crate::request::{Answer, Request};

/// How much of the kernel's messages an error shows.
const CONSOLE_LINES: usize = 20;
const TIMED_OUT: u8 = 124;
const NOT_RUN: u8 = 127;
/// How often a host is started if it ends before its command has begun. QEMU's emulation with two
/// processors fails in one start of some hundreds: it ends before the kernel prints its first
/// message.
const STARTS: usize = 3;
/// The longest time that a host that has lost its timer sleeps.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// The time limit if none was given.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

enum Event {
    Answer(Answer),
    /// QEMU closed the console, so it has ended; with the console's output.
    Gone(String),
}

/// How a host ended.
enum End {
    /// With this exit status of the command.
    Told(u8),
    /// By itself, before the command could have had any effect; with what was seen of it.
    TooEarly(String),
}

/// Runs the command in the host and returns its exit status.
///
/// # Errors
/// When no kernel is available, QEMU cannot be started or ends by itself, or the kernel panics.
pub(crate) fn run(options: &Options) -> Result<u8> {
    let kernel = Kernel::prepare(options.kernel)?;
    if options.build_only {
        say(&kernel.image.display().to_string());
        return Ok(0);
    }
    let init = env::current_exe().context("find this program")?;
    let initramfs = kernel.modules.as_ref().map(|modules| initramfs(&init, modules)).transpose()?;
    let share = options.share.as_deref().map(Path::canonicalize).transpose();
    let share = share.context("--share")?;
    let accelerator = options.accelerator.resolve();
    let machine = Machine {
        kernel: &kernel.image,
        init: &init,
        initramfs: initramfs.as_ref().map(AsRawFd::as_raw_fd),
        accelerator,
        time: options.time,
        memory_mib: options.memory_mib,
        cpus: options.cpus.unwrap_or_else(|| accelerator.processors()),
        share: share.as_deref(),
        shell: options.command.is_empty(),
    };
    let request = request(options, &kernel)?;
    let mut why = String::new();
    for _ in 0..STARTS {
        let mut session = Session::start(&machine, &request, options.console)?;
        let end = session.end(options.timeout.unwrap_or(FOREVER));
        session.finish()?;
        match end? {
            End::Told(status) => return Ok(status),
            End::TooEarly(seen) => why = seen,
        }
        say(&format!("test-host: the host ended before the command began: {why}"));
    }
    bail!("the host did not come up in {STARTS} starts: {why}")
}

/// The initramfs of this start, in a memfd that QEMU inherits.
fn initramfs(init: &Path, modules: &Modules) -> Result<File> {
    let program = fs::read(init).with_context(|| init.display().to_string())?;
    let archive = initramfs::archive(&program, &modules.files()?)?;
    let file = memfd_create("initramfs", MemfdFlags::empty()).context("memfd_create")?;
    let mut file = File::from(file);
    file.write_all(&archive).context("write the initramfs")?;
    Ok(file)
}

fn request(options: &Options, kernel: &Kernel) -> Result<Request> {
    let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
    let window = tcgetwinsize(io::stdout()).map_or((24, 80), |size| (size.ws_row, size.ws_col));
    Ok(Request {
        command: options.command.clone(),
        environment: env::vars_os().map(|(name, value)| (text(name), text(value))).collect(),
        directory: text(env::current_dir().context("working directory")?.into_os_string()),
        merged: same_file().unwrap_or(false),
        share: options.share.is_some(),
        modules: kernel.modules.as_ref().map(|modules| modules.directory.clone()),
        hosted: options.hosted,
        window,
    })
}

/// Whether both output streams of this process are one file; their order must then be kept.
fn same_file() -> Result<bool> {
    let (stdout, stderr) = (fstat(io::stdout())?, fstat(io::stderr())?);
    Ok((stdout.st_dev, stdout.st_ino) == (stderr.st_dev, stderr.st_ino))
}

struct Session {
    qemu: Child,
    events: Receiver<Event>,
    copies: Vec<JoinHandle<io::Result<()>>>,
}

impl Session {
    fn start(machine: &Machine<'_>, request: &Request, show_console: bool) -> Result<Self> {
        let (console, console_theirs) = pair()?;
        let (control, control_theirs) = pair()?;
        let (stdout, stdout_theirs) = pair()?;
        let (stderr, stderr_theirs) = pair()?;
        let mut command = machine.command(&Sockets {
            console: console_theirs.as_raw_fd(),
            control: control_theirs.as_raw_fd(),
            stdout: stdout_theirs.as_raw_fd(),
            stderr: stderr_theirs.as_raw_fd(),
        })?;
        if !machine.shell {
            command.stdin(Stdio::null());
        }
        let qemu = command.spawn().context("run setpriv (package util-linux)")?;
        drop([console_theirs, control_theirs, stdout_theirs, stderr_theirs]);

        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        (&control).write_all(&line).context("send the request to QEMU")?;
        let heart = control.try_clone().context("control port")?;
        let (tell, events) = mpsc::channel();
        let copies = vec![
            thread::spawn(move || copy(&stdout, &mut io::stdout())),
            thread::spawn(move || copy(&stderr, &mut io::stderr())),
            thread::spawn({
                let tell = tell.clone();
                move || read_answers(control, &tell)
            }),
            thread::spawn(move || read_console(&console, show_console, &tell)),
        ];
        // Detached: it ends with the socket, or with this process.
        thread::spawn(move || beat(heart));
        Ok(Self { qemu, events, copies })
    }

    /// Waits until the command has ended, or the host.
    fn end(&mut self, timeout: Duration) -> Result<End> {
        let started = Instant::now();
        let mut began = false;
        loop {
            match self.events.recv_timeout(timeout.saturating_sub(started.elapsed())) {
                Ok(Event::Answer(Answer::Ready)) => began = true,
                Ok(Event::Answer(Answer::Ended(status))) => return Ok(End::Told(status)),
                Ok(Event::Answer(Answer::NotRun(reason))) => {
                    say(&format!("test-host: {reason}"));
                    return Ok(End::Told(NOT_RUN));
                }
                Ok(Event::Gone(console)) => {
                    let status = self.qemu.wait().context("wait for QEMU")?;
                    let seen = format!("QEMU {status}\n{}", tail(&console));
                    if !began {
                        return Ok(End::TooEarly(seen));
                    }
                    bail!("the host ended by itself: {seen}");
                }
                Err(RecvTimeoutError::Timeout) => {
                    say(&format!("test-host: not done after {} s, ended", timeout.as_secs()));
                    return Ok(End::Told(TIMED_OUT));
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the host's ports closed"),
            }
        }
    }

    /// Ends QEMU, and copies the rest of its output.
    fn finish(mut self) -> Result<()> {
        // Fails if QEMU has ended already.
        _ = self.qemu.kill();
        self.qemu.wait().context("wait for QEMU")?;
        for copy in self.copies {
            match copy.join() {
                Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => {
                    return Err(error).context("copy a stream of the host");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Sends the host an interrupt now and then, until QEMU is gone. Under TCG a host that runs nested
/// machines loses its timer once in hours: it sleeps, and nothing wakes it. Any interrupt does, and
/// the host then finds that its timers have expired.
fn beat(mut control: UnixStream) {
    while control.write_all(b"\n").is_ok() {
        thread::sleep(HEARTBEAT);
    }
}

/// A socket pair: our end is closed on exec, QEMU's is inherited.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)
            .context("socketpair")?;
    fcntl_setfd(&ours, FdFlags::CLOEXEC).context("close on exec")?;
    Ok((ours.into(), theirs))
}

fn copy(mut from: &UnixStream, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // QEMU was killed with data unread on its side.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        };
        to.write_all(&buffer[..length])?;
        to.flush()?;
    }
}

fn read_answers(control: UnixStream, tell: &Sender<Event>) -> io::Result<()> {
    // If the port closes without an answer, the console reports the end.
    for line in BufReader::new(control).lines().map_while(Result::ok) {
        if let Ok(answer) = serde_json::from_str(&line) {
            // Fails if the receiver has gone after a timeout.
            _ = tell.send(Event::Answer(answer));
        }
    }
    Ok(())
}

fn read_console(mut console: &UnixStream, show: bool, tell: &Sender<Event>) -> io::Result<()> {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length) = console.read(&mut buffer) {
        if length == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..length]);
        if show {
            io::stderr().write_all(&buffer[..length])?;
        }
    }
    _ = tell.send(Event::Gone(String::from_utf8_lossy(&text).into_owned()));
    Ok(())
}

fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().map(str::trim_end).collect();
    match lines[lines.len().saturating_sub(CONSOLE_LINES)..] {
        [] => "(its kernel showed nothing; QEMU's own message, if any, is above)".to_owned(),
        ref shown => shown.join("\n"),
    }
}
