//! Debian's Podman, with conmon as the monitor of its containers.

use std::io::Write;
use std::ops::Deref;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use bulkhead_tests::runtime::{comes_true, finish, output, told};
use bulkhead_tests::vm::dist;
use bulkhead_tests::{bundle, systemd};
use tempfile::TempDir;

use super::{wait_for_nothing, wait_until};

/// How long systemd may take to boot under emulation; a timeout for hangs.
const BOOT: Duration = Duration::from_secs(180);

/// Podman with its storage in a directory of its own, and the image `box`.
pub(super) struct Podman {
    directory: TempDir,
}

impl Podman {
    /// Returns the one that all tests share, one after the other. Its storage lasts as long as the
    /// test host.
    pub(super) fn shared() -> Shared {
        static SHARED: OnceLock<Podman> = OnceLock::new();
        Shared(SHARED.get_or_init(Self::new))
    }

    fn new() -> Self {
        let podman = Self { directory: TempDir::with_prefix("podman-").unwrap() };
        let applets =
            ["cat", "echo", "false", "httpd", "ping", "readlink", "sh", "sleep", "true", "wget"];
        let archive = bundle::image(podman.directory(), &applets).unwrap();
        podman.ok(&["import", archive.to_str().unwrap(), "box"]);
        podman
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The options before every command.
    fn line(&self) -> Vec<String> {
        let path = |name: &str| self.directory().join(name).display().to_string();
        let runtime = dist().join("bin/bulkhead").display().to_string();
        let options = ["--root", &path("root"), "--runroot", &path("run"), "--runtime", &runtime]
            .map(str::to_owned);
        let fixed = ["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend"];
        let fixed = fixed.into_iter().chain(["file"]).map(str::to_owned);
        ["podman".to_owned()].into_iter().chain(options).chain(fixed).collect()
    }

    pub(super) fn command(&self, args: &[&str]) -> Command {
        let line = self.line();
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).args(args).stdin(Stdio::null());
        command
    }

    pub(super) fn ok(&self, args: &[&str]) -> String {
        let output = output(&mut self.command(args)).unwrap();
        let (status, out, err) = told(&output);
        assert_eq!(status, Some(0), "{args:?}: {err}");
        out.trim_end_matches('\n').to_owned()
    }
}

/// The storage that tests share, for one of them.
pub(super) struct Shared(&'static Podman);

impl Deref for Shared {
    type Target = Podman;

    fn deref(&self) -> &Podman {
        self.0
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A test that fails must not make the next one fail.
        if thread::panicking() {
            let _ = output(&mut self.command(&["pod", "rm", "--force", "--all"]));
            let _ = output(&mut self.command(&["rm", "--force", "--all", "--time", "0"]));
        }
    }
}

#[test]
fn health_is_asked() {
    let podman = Podman::shared();
    for (name, program, expected) in [("well", "true", 0), ("ill", "false", 1)] {
        let options = ["run", "-d", "--network", "none", "--name", name, "--health-cmd", program];
        let rest = ["--health-interval", "disable", "box", "sleep", "1000"];
        podman.ok(&[&options[..], &rest].concat());
        let asked = output(&mut podman.command(&["healthcheck", "run", name])).unwrap();
        assert_eq!(asked.status.code(), Some(expected), "{asked:?}");
    }
    podman.ok(&["rm", "--force", "--time", "0", "well", "ill"]);
    wait_for_nothing(podman.directory());
}

#[test]
fn descriptors_that_are_preserved_arrive() {
    let podman = Podman::shared();
    let given = |args: &[&str]| {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "printf given | (exec 3<&0 0</dev/null; exec \"$0\" \"$@\")"]);
        let (status, out, err) = told(&output(command.args(podman.line()).args(args)).unwrap());
        assert_eq!((status, out.as_str()), (Some(0), "given"), "{args:?}: {err}");
    };
    let script = ["sh", "-c", "cat <&3"];
    let run = ["run", "--rm", "--network", "none", "--preserve-fds", "1", "box"];
    given(&[&run[..], &script].concat());
    podman.ok(&["run", "-d", "--network", "none", "--name", "stays", "box", "sleep", "1000"]);
    given(&[&["exec", "--preserve-fds", "1", "stays"][..], &script].concat());
    podman.ok(&["rm", "--force", "--time", "0", "stays"]);
    wait_for_nothing(podman.directory());
}

#[test]
fn the_containers_of_a_pod_share_one_machine() {
    let podman = Podman::shared();
    // Without systemd, this version of Podman denies a pod's cgroup all devices, /dev/null too.
    let pod = ["pod", "create", "--name", "p", "--share-parent=false", "--network", "none"];
    podman.ok(&[&pod[..], &["--infra-image", "box", "--infra-command", "sleep 1000"]].concat());
    for name in ["one", "two"] {
        podman.ok(&["run", "-d", "--pod", "p", "--name", name, "box", "sleep", "1000"]);
    }
    let machine = |name: &str| podman.ok(&["exec", name, "cat", "/proc/sys/kernel/random/boot_id"]);
    assert_eq!(machine("one"), machine("two"));
    let namespace = |name: &str, kind: &str| {
        podman.ok(&["exec", name, "readlink", &format!("/proc/self/ns/{kind}")])
    };
    for kind in ["net", "ipc", "uts"] {
        assert_eq!(namespace("one", kind), namespace("two", kind), "{kind}");
    }
    assert_ne!(namespace("one", "pid"), namespace("two", "pid"));
    // A container that is restarted runs in the pod's machine again.
    podman.ok(&["restart", "--time", "0", "one"]);
    assert_eq!(machine("one"), machine("two"));
    let run = ["run", "--rm", "--pod", "p", "box", "sh", "-c", "echo out; exit 7"];
    let ran = output(&mut podman.command(&run)).unwrap();
    assert_eq!(told(&ran), (Some(7), "out\n".to_owned(), String::new()));
    podman.ok(&["pod", "stop", "--time", "0", "p"]);
    podman.ok(&["pod", "start", "p"]);
    assert_eq!(machine("one"), machine("two"));
    podman.ok(&["pod", "rm", "--force", "--time", "0", "p"]);
    wait_for_nothing(podman.directory());
}

#[test]
fn a_container_does_what_podman_asks() {
    let podman = Podman::shared();
    let run = ["run", "--rm", "--network", "none", "box", "sh", "-c", "echo out; exit 7"];
    let ran = output(&mut podman.command(&run)).unwrap();
    assert_eq!(told(&ran), (Some(7), "out\n".to_owned(), String::new()));

    // Podman requests a tmpfs with a copy of the image's files, so the program runs from memory.
    let options = ["run", "--rm", "--network", "none", "--tmpfs", "/bin:exec", "box"];
    let mounts = podman.ok(&[&options[..], &["cat", "/proc/mounts"]].concat());
    assert!(mounts.contains("tmpfs /bin tmpfs rw,nosuid,nodev,"), "{mounts}");

    let script = "echo log; trap 'exit 5' TERM; while :; do sleep 0.1; done";
    podman.ok(&["run", "-d", "--name", "one", "--network", "none", "box", "sh", "-c", script]);
    wait_until(|| podman.ok(&["logs", "one"]) == "log");
    let exec =
        output(&mut podman.command(&["exec", "one", "sh", "-c", "echo in; exit 3"])).unwrap();
    assert_eq!(told(&exec), (Some(3), "in\n".to_owned(), String::new()));
    let mut command = podman.command(&["exec", "-i", "one", "cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    assert_eq!(finish(child).unwrap().stdout, b"typed\n");

    let line = podman.line().join(" ");
    let line = format!("{line} exec -it one sh -c 'test -t 0 && echo a terminal; exit 4'");
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).stdin(Stdio::null());
    let (status, out, _) = told(&output(&mut script).unwrap());
    assert_eq!(status, Some(4), "{out}");
    assert!(out.contains("a terminal\r\n"), "{out}");

    podman.ok(&["pause", "one"]);
    let status = ["inspect", "--format", "{{.State.Status}}", "one"];
    assert_eq!(podman.ok(&status), "paused");
    podman.ok(&["unpause", "one"]);
    podman.ok(&["stop", "--time", "60", "one"]);
    assert_eq!(podman.ok(&["inspect", "--format", "{{.State.ExitCode}}", "one"]), "5");
    podman.ok(&["start", "one"]);
    podman.ok(&["update", "--memory", "48m", "one"]);
    let stats = ["stats", "--no-stream", "--format", "{{.MemUsage}}", "one"];
    assert!(podman.ok(&stats).contains("MB"), "{}", podman.ok(&stats));
    podman.ok(&["rm", "--force", "--time", "0", "one"]);
    wait_for_nothing(podman.directory());
}

#[test]
#[ignore = "long: --suite callers_long"]
fn a_system_container_boots_to_its_default_target_and_ends_when_it_is_asked() {
    let podman = Podman::shared();
    let root = systemd::root(podman.directory()).unwrap();
    let options = ["run", "-d", "--systemd=always", "--network", "none", "--name", "system"];
    podman.ok(&[&options[..], &["--rootfs", root.to_str().unwrap(), "/lib/systemd/systemd"]].concat());
    let asked = |verb: &[&str]| {
        let line = [&["exec", "system", "systemctl"], verb].concat();
        told(&output(&mut podman.command(&line)).unwrap())
    };
    let up = comes_true(BOOT, || asked(&["is-active", "default.target"]).1 == "active\n");
    assert!(up, "{:?}", asked(&["list-jobs"]));
    assert_eq!(asked(&["--failed", "--plain", "--no-legend"]).1, "");
    assert_eq!(asked(&["is-system-running"]), (Some(0), "running\n".to_owned(), String::new()));
    let services = asked(&["show", "--property", "ControlGroup", "systemd-journald"]);
    assert_eq!(services.1, "ControlGroup=/system.slice/systemd-journald.service\n");
    podman.ok(&["stop", "--time", "60", "system"]);
    let ended = ["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "system"];
    assert_eq!(podman.ok(&ended), "exited 0");
    podman.ok(&["rm", "system"]);
    wait_for_nothing(podman.directory());
}
