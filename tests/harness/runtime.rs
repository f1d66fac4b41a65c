//! The `bulkhead` command, called as a person or Docker would, and what it must not leave behind.

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

/// A bound on hangs under emulation, not a measure.
const PATIENCE: Duration = Duration::from_secs(300);

/// A runtime with a state directory of its own: Bulkhead, or one to compare it with.
#[derive(Debug)]
pub struct Runtime {
    root: TempDir,
    /// Those of the host before anything was run.
    cgroups: BTreeSet<PathBuf>,
    program: PathBuf,
    environment: Vec<(&'static str, &'static str)>,
}

impl Runtime {
    /// An empty state directory.
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

    fn of(program: PathBuf) -> Result<Self> {
        let (root, cgroups) = (TempDir::with_prefix("root-")?, cgroups()?);
        Ok(Self { root, cgroups, program, environment: Vec::new() })
    }

    /// The only supervisor.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn supervisor(&self) -> Result<u32> {
        let found = self.processes(" supervise")?;
        let [supervisor] = found[..] else { bail!("supervisors: {found:?}") };
        Ok(supervisor)
    }

    /// How something that the only pod shares is mounted where its file server sees it, the place
    /// being below `kind` and ending so: the options, proc_pid_mountinfo(5).
    ///
    /// # Errors
    /// When there is no such mount, or not one file server.
    pub fn shared_with(&self, kind: &str, end: &str) -> Result<Vec<String>> {
        let found = self.processes("bulkhead-fs")?;
        let [server] = found[..] else { bail!("file servers: {found:?}") };
        let table = fs::read_to_string(format!("/proc/{server}/mountinfo"))?;
        let mut lines = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let line = lines.find(|words| words[4].contains(kind) && words[4].ends_with(end));
        let line = line.with_context(|| format!("{kind} {end}: {table}"))?;
        Ok(line[5].split(',').map(str::to_owned).collect())
    }

    /// Whether it is Debian's runc.
    #[must_use]
    pub fn is_runc(&self) -> bool {
        self.program.ends_with("runc")
    }

    /// Sets a variable of the environment for each command.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.environment.push((name, value));
        self
    }

    /// The state directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// A command with the state directory set, its standard input empty.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.environment.iter().copied());
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

    /// Runs a command that must succeed; gives its standard output.
    ///
    /// # Errors
    /// With its standard error when it fails.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.call(args)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{args:?}: {}: {text}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs a command that must fail; gives its standard error.
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

    /// `bulkhead run`, to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run(&self, id: &str, bundle: &Bundle) -> Result<Output> {
        self.run_with_input(id, bundle, b"")
    }

    /// `bulkhead run` with something on standard input.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run_with_input(&self, id: &str, bundle: &Bundle, input: &[u8]) -> Result<Output> {
        let mut child = self.spawn_run(id, bundle)?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        let input = input.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = finish(child)?;
        // A container that does not read its input is no failure.
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

    /// `bulkhead create`, its streams the null device.
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
    /// shows the pod's state directory as an argument.
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
        // One may be removed meanwhile.
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

/// Sends a process a signal.
///
/// # Errors
/// When there is no such process.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let process = Pid::from_raw(pid.cast_signed()).context("no process has number 0")?;
    kill_process(process, signal).with_context(|| format!("{signal:?} for {pid}"))
}

/// Kills a process at once and reports when it cannot be.
///
/// # Errors
/// When there is no such process.
pub fn kill_9(pid: u32) -> Result<()> {
    signal(pid, Signal::KILL)?;
    Ok(())
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
        // A process may end while it is looked at.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if stat.rsplit_once(')').is_some_and(|(_, tail)| tail.trim_start().starts_with('Z')) {
            continue;
        }
        let command_line = String::from_utf8_lossy(&line).replace('\0', " ");
        table.push(Process { pid, command_line });
    }
    Ok(table)
}

/// Waits until the first bytes of a child's output are there, and checks that they are these.
///
/// # Errors
/// When they are others, or do not come in time.
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

/// Status, standard output and standard error of what has ended.
#[must_use]
pub fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// The message of the last line that a runtime has logged on standard error; one that says so when that
/// is no line of a log.
#[must_use]
pub fn message(errors: &str) -> String {
    let line = errors.trim_end().lines().next_back().unwrap_or_default();
    let quoted = line.split_once(" msg=").map(|(_, quoted)| quoted);
    let message = quoted.and_then(|quoted| serde_json::from_str(quoted).ok());
    message.unwrap_or_else(|| format!("no message in {errors:?}"))
}

/// Asks again and again until it is so; false when the time is up.
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

/// Asks a daemon to end, and kills it when it does not in time.
pub fn end(daemon: &mut Child, patience: Duration) {
    let asked = Pid::from_raw(daemon.id().cast_signed())
        .is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok());
    let gone = || daemon.try_wait().is_ok_and(|status| status.is_some());
    if !(asked && comes_true(patience, gone)) {
        // Both fail only when it has been waited for.
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

/// Waits for a child's end and collects what it wrote.
///
/// # Errors
/// When it does not end in time; it is killed then.
pub fn finish(mut child: Child) -> Result<Output> {
    let pid = child.id();
    drop(child.stdin.take());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(PATIENCE) else {
        let standing = standing()?;
        kill_9(pid)?;
        let output = receiver.recv_timeout(Duration::from_secs(5));
        bail!("process {pid} did not end within {PATIENCE:?}: {output:?}\n{standing}");
    };
    Ok(output?)
}

/// Hands each line of a child's output to `line` when it comes, and waits for the end, which must
/// be a success.
///
/// # Errors
/// When `line` fails, the child fails, or nothing comes for too long; it is killed then.
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

/// Where every thread of every process of Bulkhead's stands, and what their logs say: for the report
/// of a hang, which nobody may see a second time.
fn standing() -> Result<String> {
    let mut report = String::new();
    for process in process_table()?.iter().filter(|it| it.command_line.contains("bulkhead")) {
        writeln!(report, "{} {}", process.pid, process.command_line)?;
        // Whatever ends meanwhile does not stand there any more.
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
