//! Runs the `bulkhead` command as a user or Docker would, and checks that it leaves nothing behind.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::bundle::Bundle;
use crate::vm::dist;

/// A timeout for hangs; generous because of emulation.
const PATIENCE: Duration = Duration::from_secs(300);
/// The program of stand-ins.
const STAND_IN: &str = "bulkhead-stand-in";

/// A runtime with a state directory of its own: Bulkhead, or one to compare it with.
#[derive(Debug)]
pub struct Runtime {
    root: TempDir,
    /// The host's cgroups before anything was run.
    cgroups: BTreeSet<PathBuf>,
    program: PathBuf,
    environment: Vec<(&'static str, String)>,
}

impl Runtime {
    /// Bulkhead with an empty state directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        Self::of(dist().join("bin/bulkhead"))
    }

    /// Debian's runc with an empty state directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn runc() -> Result<Self> {
        Self::of("/usr/sbin/runc".into())
    }

    /// Debian's crun with an empty state directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn crun() -> Result<Self> {
        Self::of("/usr/bin/crun".into())
    }

    /// A runtime at a path, such as a link to Bulkhead, with an empty state directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn of(program: PathBuf) -> Result<Self> {
        let (root, cgroups) = (TempDir::with_prefix("root-")?, cgroups()?);
        Ok(Self { root, cgroups, program, environment: Vec::new() })
    }

    /// The process ID of the only supervisor.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn supervisor(&self) -> Result<u32> {
        let found = self.processes(" supervise")?;
        let [supervisor] = found[..] else { bail!("supervisors: {found:?}") };
        Ok(supervisor)
    }

    /// The mount options, proc_pid_mountinfo(5), of a mount in the only pod's file server. The path
    /// of the mount point contains `kind` and ends with `end`.
    ///
    /// # Errors
    /// When there is no such mount, or not exactly one file server.
    pub fn shared_with(&self, kind: &str, end: &str) -> Result<Vec<String>> {
        let found = self.processes("bulkhead-fs")?;
        let [server] = found[..] else { bail!("file servers: {found:?}") };
        let table = fs::read_to_string(format!("/proc/{server}/mountinfo"))?;
        let mut lines = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let line = lines.find(|words| words[4].contains(kind) && words[4].ends_with(end));
        let line = line.with_context(|| format!("{kind} {end}: {table}"))?;
        Ok(line[5].split(',').map(str::to_owned).collect())
    }

    /// Whether this is Debian's runc.
    #[must_use]
    pub fn is_runc(&self) -> bool {
        self.program.ends_with("runc")
    }

    /// The name of the program.
    #[must_use]
    pub fn name(&self) -> String {
        self.program.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Sets an environment variable for each command.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// The state directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// A command with the state directory set and an empty standard input.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.arg("--root").arg(self.root()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn call(&self, args: &[&str]) -> Result<Output> {
        output(&mut self.command(args))
    }

    /// Runs a command that must succeed; returns its standard output.
    ///
    /// # Errors
    /// With its standard error when it fails.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.call(args)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{args:?}: {}: {text}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs a command that must fail; returns its standard error.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn fails(&self, args: &[&str]) -> Result<String> {
        let output = self.call(args)?;
        ensure!(!output.status.success(), "{args:?} succeeded");
        Ok(String::from_utf8(output.stderr)?)
    }

    /// `bulkhead run`, not started yet.
    #[must_use]
    pub fn run_command(&self, id: &str, bundle: &Bundle) -> Command {
        let mut command = self.command(&["run", "--bundle"]);
        command.arg(bundle.path()).arg(id);
        command
    }

    /// Runs `bulkhead run` to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run(&self, id: &str, bundle: &Bundle) -> Result<Output> {
        self.run_with_input(id, bundle, b"")
    }

    /// Runs `bulkhead run` with this standard input.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run_with_input(&self, id: &str, bundle: &Bundle, input: &[u8]) -> Result<Output> {
        let mut child = self.spawn_run(id, bundle)?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        let input = input.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = finish(child)?;
        // A container need not read its input.
        let _ = writer.join();
        Ok(output)
    }

    /// Starts `bulkhead run` with pipes for its streams.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn_run(&self, id: &str, bundle: &Bundle) -> Result<Child> {
        let mut command = self.run_command(id, bundle);
        Ok(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// Runs `bulkhead create` with its streams connected to the null device.
    ///
    /// # Errors
    /// With its standard error when it fails.
    pub fn create(&self, id: &str, bundle: &Bundle) -> Result<()> {
        let mut command = self.command(&["create", "--bundle"]);
        let errors = tempfile::NamedTempFile::new()?;
        command.arg(bundle.path()).arg(id).stdout(Stdio::null()).stderr(errors.reopen()?);
        let status = finish(command.spawn()?)?.status;
        ensure!(status.success(), "create: {status}: {}", fs::read_to_string(errors.path())?);
        Ok(())
    }

    /// The container's state.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn state(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["state", id])?)?)
    }

    /// Waits until the container has a status.
    ///
    /// # Errors
    /// When it does not get there in time.
    pub fn wait_for_status(&self, id: &str, status: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.state(id)?;
            if state["status"] == status {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{id} is still {}", state["status"]);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The processes of this runtime whose command line has `name` in it. Every process of a pod
    /// shows the pod's state directory as an argument, but for stand-ins: their command lines are
    /// the containers', so they count as `bulkhead-stand-in` with what they have open.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn processes(&self, name: &str) -> Result<Vec<u32>> {
        let root = self.root().to_string_lossy().into_owned();
        let table = process_table()?.into_iter();
        let ours = table.filter(|process| {
            process.command_line.contains(&root) && process.command_line.contains(name)
        });
        Ok(ours.map(|process| process.pid).collect())
    }

    /// Fails when a process, mount, cgroup or file of this runtime is left.
    ///
    /// # Errors
    /// Names what is left.
    pub fn assert_clean(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let left = loop {
            let left = self.leftovers()?;
            if left.is_empty() || Instant::now() > deadline {
                break left;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        if left.is_empty() { Ok(()) } else { bail!("left behind: {left:#?}") }
    }

    fn leftovers(&self) -> Result<Vec<String>> {
        let root = self.root().to_string_lossy().into_owned();
        let mut left: Vec<String> = process_table()?
            .into_iter()
            .filter(|process| process.command_line.contains(&root))
            .map(|process| format!("process {} {}", process.pid, process.command_line))
            .collect();
        for entry in fs::read_dir(self.root())? {
            left.push(format!("file {}", entry?.path().display()));
        }
        let cgroups = cgroups()?;
        left.extend(cgroups.difference(&self.cgroups).map(|it| format!("cgroup {}", it.display())));
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            if line.contains(&root) {
                left.push(format!("mount {line}"));
            }
        }
        Ok(left)
    }
}

/// The cgroups of the host.
///
/// # Errors
/// When they cannot be listed.
pub fn cgroups() -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut next = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = next.pop() {
        // A directory may be removed meanwhile.
        for entry in fs::read_dir(&directory).into_iter().flatten() {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                next.push(entry.path());
            }
        }
        found.insert(directory);
    }
    Ok(found)
}

/// Sends a signal to a process.
///
/// # Errors
/// When there is no such process.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let process = Pid::from_raw(pid.cast_signed()).context("no process has number 0")?;
    kill_process(process, signal).with_context(|| format!("{signal:?} for {pid}"))
}

/// Kills a process with SIGKILL.
///
/// # Errors
/// When there is no such process.
pub fn kill_9(pid: u32) -> Result<()> {
    signal(pid, Signal::KILL)
}

pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) command_line: String,
}

pub(crate) fn process_table() -> Result<Vec<Process>> {
    let mut table = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end while it is examined.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        if stat.rsplit_once(')').is_some_and(|(_, tail)| tail.trim_start().starts_with('Z')) {
            continue;
        }
        let command_line = match program.to_string_lossy().contains(STAND_IN) {
            true => format!("{STAND_IN} {}", open_files(pid)),
            false => String::from_utf8_lossy(&line).replace('\0', " "),
        };
        table.push(Process { pid, command_line });
    }
    Ok(table)
}

/// What a process has open.
fn open_files(pid: u32) -> String {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let paths = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
    paths.map(|path| path.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Waits for the first bytes of a child's output, and checks that they are `first`.
///
/// # Errors
/// When they differ, or do not come in time.
pub fn expect_output(child: &mut Child, first: &str) -> Result<()> {
    let output = child.stdout.as_mut().context("no standard output")?;
    let deadline = Instant::now() + PATIENCE;
    let mut read = vec![0; first.len()];
    let mut length = 0;
    while length < first.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut watched = [PollFd::new(output, PollFlags::IN)];
        let ready = poll(&mut watched, Some(&Timespec::try_from(left)?))?;
        ensure!(ready > 0, "{first:?} was not written within {PATIENCE:?}");
        let count = output.read(&mut read[length..])?;
        ensure!(count > 0, "output ended before {first:?}");
        length += count;
    }
    ensure!(read == first.as_bytes(), "{:?} was written", String::from_utf8_lossy(&read));
    Ok(())
}

/// Exit status, standard output and standard error of a command.
#[must_use]
pub fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// The message of the last line that a runtime has logged on standard error, or a text that says
/// that this is not a log line.
#[must_use]
pub fn message(errors: &str) -> String {
    let line = errors.trim_end().lines().next_back().unwrap_or_default();
    let quoted = line.split_once(" msg=").map(|(_, quoted)| quoted);
    let message = quoted.and_then(|quoted| serde_json::from_str(quoted).ok());
    message.unwrap_or_else(|| format!("no message in {errors:?}"))
}

/// Polls until the condition holds; returns false if it does not in time.
pub fn comes_true(patience: Duration, mut so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !so() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Sends SIGTERM to a daemon, and kills it when it does not end in time.
pub fn end(daemon: &mut Child, patience: Duration) {
    let asked = Pid::from_raw(daemon.id().cast_signed())
        .is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok());
    let gone = || daemon.try_wait().is_ok_and(|status| status.is_some());
    if !(asked && comes_true(patience, gone)) {
        // Both fail only when the daemon was already waited for.
        let _ = daemon.kill();
        let _ = daemon.wait();
    }
}

/// Runs a command to its end and collects what it wrote.
///
/// # Errors
/// When it cannot be started, or does not end in time.
pub fn output(command: &mut Command) -> Result<Output> {
    finish(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Waits for a child to end and collects its output.
///
/// # Errors
/// When it does not end in time; it is killed then.
pub fn finish(child: Child) -> Result<Output> {
    finish_within(child, PATIENCE)
}

/// The same with a patience of the caller's.
///
/// # Errors
/// When it does not end in time; it is killed then.
pub fn finish_within(mut child: Child, patience: Duration) -> Result<Output> {
    let pid = child.id();
    drop(child.stdin.take());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(patience) else {
        let standing = standing()?;
        kill_9(pid)?;
        let output = receiver.recv_timeout(Duration::from_secs(5));
        bail!("process {pid} did not end within {patience:?}: {output:?}\n{standing}");
    };
    Ok(output?)
}

/// Passes each line of a child's output to `line` as it comes, and waits for the child, which must
/// succeed.
///
/// # Errors
/// When `line` fails, the child fails, or nothing comes for too long; the child is killed then.
pub fn each_line(mut child: Child, line: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let output = child.stdout.take().context("no standard output")?;
    let read = read_lines(output, line);
    if read.is_err() {
        child.kill()?;
    }
    let ended = finish(child);
    read?;
    let output = ended?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {errors}", output.status);
    Ok(())
}

fn read_lines(output: ChildStdout, mut line: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    let output = BufReader::new(output);
    std::thread::spawn(move || output.lines().try_for_each(|line| sender.send(line)));
    loop {
        match receiver.recv_timeout(PATIENCE) {
            Ok(text) => line(&text?)?,
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("no line came within {PATIENCE:?}\n{}", standing()?)
            }
        }
    }
}

/// What every thread of every Bulkhead process is doing, and the logs: for the report of a hang,
/// which may be hard to reproduce.
fn standing() -> Result<String> {
    let mut report = String::new();
    for process in process_table()?.iter().filter(|it| it.command_line.contains("bulkhead")) {
        writeln!(report, "{} {}", process.pid, process.command_line)?;
        // A process may end meanwhile.
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", process.pid)) else { continue };
        for thread in threads.flatten() {
            let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            let (status, call) = (read("status"), read("syscall"));
            let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or_default();
            writeln!(report, "  {}: {state}, system call {}", read("comm").trim(), call.trim())?;
        }
        for directory in process.command_line.split(' ').map(Path::new) {
            let Ok(entries) = fs::read_dir(directory) else { continue };
            for log in entries.flatten().map(|entry| entry.path()) {
                if log.extension().is_some_and(|extension| extension == "log") {
                    let text = fs::read_to_string(&log).unwrap_or_default();
                    writeln!(report, "  {}: {}", log.display(), text.trim())?;
                }
            }
        }
    }
    Ok(report)
}
