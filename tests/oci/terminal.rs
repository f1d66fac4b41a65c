//! Terminals, beside runc: a console socket, the caller's own terminal, sizes, keys and hang-up.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, finish};
use bulkhead_vmm::seqpacket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcgetwinsize, tcsetwinsize};
use serde_json::json;

/// How long a terminal may have no output.
const PATIENCE: Duration = Duration::from_secs(30);
/// Waits for a size, reads a line, prints a new size, and ends on Ctrl-C.
const TALK: &str = "until [ \"$(busybox stty size)\" = '33 77' ]; do sleep 0.1; done; \
    busybox tty; read line; echo \"got $line\"; \
    trap 'busybox stty size' WINCH; trap 'echo stopped; exit 3' INT; echo ready; \
    while :; do sleep 0.1; done";

/// The master of a terminal, and all output that was read from it.
pub(crate) struct Screen {
    master: File,
    pub(crate) seen: String,
}

impl Screen {
    fn new(master: OwnedFd) -> Self {
        Self { master: master.into(), seen: String::new() }
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.master, size)?)
    }

    pub(crate) fn type_in(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Reads until the output contains these words.
    fn wait_for(&mut self, words: &str) -> Result<()> {
        let from = self.seen.len();
        while !self.seen[from..].contains(words) {
            ensure!(self.read()?, "the terminal ended at {:?}", self.seen);
        }
        Ok(())
    }

    /// Reads to the end.
    pub(crate) fn wait_for_end(&mut self) -> Result<()> {
        while self.read()? {}
        Ok(())
    }

    fn read(&mut self) -> Result<bool> {
        let limit = Timespec::try_from(PATIENCE)?;
        let ready = poll(&mut [PollFd::new(&self.master, PollFlags::IN)], Some(&limit))?;
        ensure!(ready > 0, "silent for {PATIENCE:?} after {:?}", self.seen);
        let mut buffer = [0; 4096];
        match self.master.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
                Ok(true)
            }
            // The master returns EIO when no process has the slave open any more.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Receives the master that is sent to a console socket.
fn receive(listener: &UnixListener) -> Result<Screen> {
    let limit = Timespec::try_from(PATIENCE)?;
    ensure!(poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit))? > 0, "nobody came");
    let (connection, _) = listener.accept()?;
    let message = seqpacket::receive(&connection)?.context("the connection was closed")?;
    let master = message.descriptors.into_iter().next().context("no terminal was sent")?;
    Ok(Screen::new(master))
}

/// A new terminal, with the slave for a program.
pub(crate) fn own_terminal() -> Result<(Screen, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    Ok((Screen::new(master), slave))
}

pub(crate) fn with_terminal(script: &str) -> Result<Bundle> {
    Bundle::script(script)?.with(|spec| spec["process"]["terminal"] = json!(true))
}

/// Starts a command with a console socket; returns the terminal that it sends there.
pub(crate) fn detached(runtime: &Runtime, directory: &Path, words: &[&str]) -> Result<Screen> {
    let socket = directory.join("console.sock");
    let listener = UnixListener::bind(&socket)?;
    let (verb, rest) = words.split_first().context("no verb")?;
    let socket = socket.to_str().context("path")?;
    let line: Vec<&str> =
        [verb, "--console-socket", socket].into_iter().chain(rest.iter().copied()).collect();
    let mut command = runtime.command(&line);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let screen = receive(&listener)?;
    screen.resize(33, 77)?;
    let output = finish(child)?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_file(socket)?;
    Ok(screen)
}

/// Does the whole dialogue with [`TALK`].
fn talk(screen: &mut Screen) -> Result<()> {
    screen.wait_for("/dev/pts/")?;
    screen.type_in("a wordx\x7f\r")?;
    screen.wait_for("ready")?;
    screen.resize(44, 99)?;
    screen.wait_for("44 99")?;
    screen.type_in("\x03")?;
    screen.wait_for_end()
}

#[test]
fn a_console_socket_gets_a_terminal_as_from_runc() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let mut transcripts = Vec::new();
    for runtime in [&ours, &runc] {
        let bundle = with_terminal(&format!("ls -l /dev/console | cut -c1-4; {TALK}")).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = bundle.path().to_str().unwrap();
        let create = ["create", "--bundle", path, "screen"];
        let mut screen = detached(runtime, directory.path(), &create).unwrap();
        runtime.ok(&["start", "screen"]).unwrap();
        talk(&mut screen).unwrap();
        runtime.wait_for_status("screen", "stopped").unwrap();
        runtime.ok(&["delete", "screen"]).unwrap();
        transcripts.push(screen.seen);
    }
    assert_eq!(transcripts[0], transcripts[1]);
    assert!(transcripts[0].starts_with("crw-\r\n"), "{}", transcripts[0]);
    assert!(transcripts[0].contains("got a word\r\n"), "{}", transcripts[0]);
    ours.assert_clean().unwrap();
}

#[test]
fn a_further_process_gets_a_terminal_as_from_runc() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let mut transcripts = Vec::new();
    for runtime in [&ours, &runc] {
        let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        runtime.create("screen", &bundle).unwrap();
        runtime.ok(&["start", "screen"]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let exec = ["exec", "--detach", "--tty", "screen", "/bin/sh", "-c", TALK];
        let mut screen = detached(runtime, directory.path(), &exec).unwrap();
        talk(&mut screen).unwrap();
        transcripts.push(screen.seen);
        runtime.ok(&["delete", "--force", "screen"]).unwrap();
    }
    assert_eq!(transcripts[0], transcripts[1]);
    ours.assert_clean().unwrap();
}

#[test]
fn the_callers_own_terminal_is_raw_meanwhile_and_as_before_afterwards() {
    let runtime = Runtime::new().unwrap();
    let bundle = with_terminal(TALK).unwrap();
    let (mut screen, slave) = own_terminal().unwrap();
    screen.resize(33, 77).unwrap();
    let mut command = runtime.run_command("own", &bundle);
    let stream = || Stdio::from(slave.try_clone().unwrap());
    let mut child = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
    drop(command);
    screen.wait_for("/dev/pts/").unwrap();
    assert!(!tcgetattr(&slave).unwrap().local_modes.contains(LocalModes::ECHO), "not raw");
    screen.type_in("word\r").unwrap();
    screen.wait_for("ready").unwrap();
    // The kernel sends SIGWINCH only to a terminal's foreground processes, and `run` is none here.
    screen.resize(44, 99).unwrap();
    std::process::Command::new("kill").args(["-WINCH", &child.id().to_string()]).status().unwrap();
    screen.wait_for("44 99").unwrap();
    screen.type_in("\x03").unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "did not end: {:?}", screen.seen);
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(3));
    assert!(tcgetattr(&slave).unwrap().local_modes.contains(LocalModes::ECHO), "left raw");
    assert_eq!(tcgetwinsize(&slave).unwrap().ws_row, 44);
    runtime.assert_clean().unwrap();
}

#[test]
fn a_caller_who_hangs_up_is_a_signal() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    for runtime in [&ours, &runc] {
        let script =
            "trap 'echo gone > /root/gone; exit 0' HUP; echo up; while :; do sleep 0.1; done";
        let bundle = with_terminal(script).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = bundle.path().to_str().unwrap();
        let run = ["run", "--detach", "--bundle", path, "hang"];
        let mut screen = detached(runtime, directory.path(), &run).unwrap();
        screen.wait_for("up").unwrap();
        drop(screen);
        runtime.wait_for_status("hang", "stopped").unwrap();
        assert!(bundle.rootfs().join("root/gone").exists());
        runtime.ok(&["delete", "hang"]).unwrap();
    }
    ours.assert_clean().unwrap();
}

#[test]
fn a_terminal_without_anybody_at_its_end_is_refused_in_runcs_words() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let (with, without) = (with_terminal("true").unwrap(), Bundle::script("true").unwrap());
    for runtime in [&ours, &runc] {
        let refused = |words: &[&str], bundle: &Bundle, expected: &str| {
            let line: Vec<&str> = words
                .iter()
                .copied()
                .chain(["--bundle", bundle.path().to_str().unwrap(), "x"])
                .collect();
            let error = runtime.fails(&line).unwrap();
            assert!(error.contains(expected), "{error}");
        };
        refused(&["create"], &with, "cannot allocate tty if runc will detach");
        refused(&["run", "--detach"], &with, "cannot allocate tty if runc will detach");
        let needless = "cannot use console socket if runc will not detach or allocate tty";
        refused(&["create", "--console-socket", "/nowhere"], &without, needless);
    }
    let error = ours
        .fails(&[
            "create",
            "--console-socket",
            "/nowhere",
            "--bundle",
            with.path().to_str().unwrap(),
            "x",
        ])
        .unwrap();
    assert!(error.contains("console socket /nowhere: No such file or directory"), "{error}");
    // Standard input is the null device, not a terminal.
    let error = ours.fails(&["run", "--bundle", with.path().to_str().unwrap(), "x"]).unwrap();
    assert!(error.contains("no standard stream is one"), "{error}");
    ours.assert_clean().unwrap();
}
