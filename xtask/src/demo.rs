//! `cargo xtask demo`: runs one container in its own machine and shows side by side what the host
//! and the container see. It runs on this machine if KVM has hardware support, else in the test
//! host.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use guest_image::progress::say;
use serde_json::{Value, json};

use crate::cargo::output;
use crate::clock::{Clock, both};
use crate::{host, image, packages};

/// The verb with which the demo calls itself, here or in the test host.
pub(crate) const INSIDE: &str = "demo-inside";

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 8] = ["cat", "dmesg", "grep", "head", "ls", "sh", "tr", "uname"];
/// The rows of the table: a name, and a line of shell that is run on both sides.
const QUESTIONS: [(&str, &str); 5] = [
    ("kernel release", "uname -r"),
    ("kernel command line", "cat /proc/cmdline"),
    ("memory", "grep MemTotal /proc/meminfo"),
    ("processes", "ls /proc | grep '^[0-9]' | tr '\\n' ' '"),
    ("first kernel message", "dmesg | head -n 1"),
];
/// The test host's kernel: Debian's, which need not be built.
const KERNEL: [&str; 2] = ["--kernel", "debian"];
/// The width of one side of the table, and of the names before it.
const COLUMN: usize = 52;
const NAMES: usize = 20;
/// The most lines of an answer; the rest of a longer one adds nothing.
const LINES: usize = 3;

/// Builds everything, then shows the comparison.
pub(crate) fn run(clock: &Clock) -> Result<ExitCode> {
    let this = env::current_exe().context("find this program")?;
    let mut command = if hardware_kvm() {
        image::build(clock)?;
        let mut command = Command::new(this);
        command.arg(INSIDE);
        command
    } else {
        say("this machine's KVM has no hardware virtualization under it: using the test host");
        clock.step("Debian packages", packages::ensure)?;
        both(|| image::build(clock), || clock.step("test host", || host::prepare(&KERNEL)))?;
        let options = [&KERNEL[..], &["--timeout", "600"]].concat();
        host::command(&options, [this.as_os_str(), INSIDE.as_ref()])?
    };
    let status = clock.step("container in its machine", || command.status().context("run it"))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A KVM that emulates virtualization in software has `/dev/kvm` too, but the processor lacks the
/// flag.
fn hardware_kvm() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let virtualization = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    virtualization && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Runs the container here and prints the table.
pub(crate) fn inside() -> Result<ExitCode> {
    let directory = Bundle(env::temp_dir().join(format!("bulkhead-demo-{}", process::id())));
    let script = script();
    make_bundle(&directory.0, &script).context("make the bundle")?;
    let host = output(Command::new(BUSYBOX).args(["sh", "-c", &script]))?;
    let mut run = Command::new(image::dist().join("bin/bulkhead"));
    run.arg("run").arg("--bundle").arg(&directory.0).arg("demo");
    let container = output(&mut run).context("bulkhead run")?;
    let (host, container) = (answers(&host)?, answers(&container)?);
    for line in table(&host, &container) {
        say(&line);
    }
    if host[0] == container[0] {
        bail!("both see the kernel {}: the container has no kernel of its own", host[0]);
    }
    say("the container ran under its own kernel, in its own machine");
    Ok(ExitCode::SUCCESS)
}

/// A directory that is removed when this is dropped.
struct Bundle(PathBuf);

impl Drop for Bundle {
    fn drop(&mut self) {
        // If this fails, the rest stays in the temporary directory.
        _ = fs::remove_dir_all(&self.0);
    }
}

fn script() -> String {
    let lines: Vec<String> =
        QUESTIONS.iter().map(|(_, question)| format!("echo \"$({question})\"")).collect();
    lines.join("; ")
}

fn make_bundle(directory: &Path, script: &str) -> Result<()> {
    let rootfs = directory.join("rootfs");
    for name in ["bin", "dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(rootfs.join(name))?;
    }
    fs::copy(BUSYBOX, rootfs.join("bin/busybox")).context(BUSYBOX)?;
    for applet in APPLETS {
        symlink("busybox", rootfs.join("bin").join(applet))?;
    }
    fs::write(directory.join("config.json"), specification(script).to_string())?;
    Ok(())
}

fn specification(script: &str) -> Value {
    let namespaces = ["pid", "mount", "uts", "ipc", "cgroup", "network"];
    let namespaces = namespaces.map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "hostname": "demo",
        "process": {
            "args": ["/bin/sh", "-c", script],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 },
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] },
        ],
        "linux": { "namespaces": namespaces },
    })
}

fn answers(text: &str) -> Result<Vec<String>> {
    let answers: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    ensure!(answers.len() == QUESTIONS.len(), "expected one line per question, got:\n{text}");
    ensure!(!answers[0].is_empty(), "no kernel release in:\n{text}");
    Ok(answers)
}

/// Wraps long answers within their column.
fn table(host: &[String], container: &[String]) -> Vec<String> {
    let mut lines = vec![row("", "the host sees", "the container sees")];
    for (index, (name, _)) in QUESTIONS.iter().enumerate() {
        let (left, right) = (wrapped(&host[index]), wrapped(&container[index]));
        for line in 0..left.len().max(right.len()) {
            let part = |side: &[String]| side.get(line).cloned().unwrap_or_default();
            lines.push(row(if line == 0 { name } else { "" }, &part(&left), &part(&right)));
        }
    }
    lines
}

fn row(name: &str, left: &str, right: &str) -> String {
    format!("{name:NAMES$}  {left:COLUMN$}  {right}").trim_end().to_owned()
}

fn wrapped(text: &str) -> Vec<String> {
    let mut signs: Vec<char> = text.chars().collect();
    if signs.len() > COLUMN * LINES {
        signs.truncate(COLUMN * LINES - 1);
        signs.push('…');
    }
    signs.chunks(COLUMN).map(|chunk| chunk.iter().collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_answers_are_wrapped_in_their_column() {
        let mut host = vec!["short".to_owned(); QUESTIONS.len()];
        host[1] = "x".repeat(COLUMN + 1);
        let container = vec!["other".to_owned(); QUESTIONS.len()];
        let lines = table(&host, &container);
        assert_eq!(lines.len(), 1 + QUESTIONS.len() + 1);
        assert!(lines[2].ends_with("other"));
        assert_eq!(lines[3].trim(), "x");
    }

    #[test]
    fn very_long_answers_are_cut() {
        assert_eq!(wrapped(&"x".repeat(COLUMN * 9)).len(), LINES);
    }

    #[test]
    fn missing_answer_is_an_error() {
        assert!(answers("6.12\n").is_err());
    }
}
