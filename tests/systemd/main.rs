//! `--systemd-cgroup`: the pod in a scope of systemd. Runs in the test host with systemd as its first
//! process.

#![cfg(test)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{Runtime, comes_true, expect_output, finish, kill_9, output, told};
use bulkhead_tests::vm::dist;
use serde_json::{Value, json};
use tempfile::TempDir;

const CGROUPS: &str = "/sys/fs/cgroup";
const PATH: &str = "suite-pods.slice:pod:c";
const SCOPE: &str = "pod-c.scope";
const SCOPE_DIR: &str = "suite.slice/suite-pods.slice/pod-c.scope";
const SYSTEMD: &str = "--systemd-cgroup";

fn bundle(path: Option<&str>, resources: &Value) -> Bundle {
    let bundle = Bundle::script("echo up; exec sleep 1000").unwrap();
    let change = |spec: &mut Value| {
        if let Some(path) = path {
            spec["linux"]["cgroupsPath"] = json!(path);
        }
        spec["linux"]["resources"] = resources.clone();
    };
    bundle.with(change).unwrap()
}

fn limited() -> Value {
    json!({
        "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 64 << 20},
        "cpu": {"quota": 300_000, "period": 100_000, "shares": 2048},
        "pids": {"limit": 20},
        "devices": [{"allow": false, "access": "rwm"}],
    })
}

/// Runs `create` without pipes, which the container would keep open.
fn create(runtime: &Runtime, bundle: &Bundle) {
    let mut command = runtime.command(&[SYSTEMD, "create", "--bundle"]);
    let errors = tempfile::NamedTempFile::new().unwrap();
    command.arg(bundle.path()).arg("c").stdout(Stdio::null()).stderr(errors.reopen().unwrap());
    let ended = finish(command.spawn().unwrap()).unwrap();
    assert!(ended.status.success(), "{}", fs::read_to_string(errors.path()).unwrap());
}

/// The properties of a unit, as systemd shows them.
fn shown(unit: &str, properties: &[&str]) -> Vec<String> {
    let mut command = Command::new("systemctl");
    command.args(["show", unit, "--property", &properties.join(",")]);
    let (status, out, err) = told(&output(&mut command).unwrap());
    assert_eq!(status, Some(0), "{err}");
    let mut lines: Vec<String> = out.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn dir(below: &str) -> PathBuf {
    Path::new(CGROUPS).join(below)
}

fn read(file: &str) -> String {
    fs::read_to_string(dir(SCOPE_DIR).join(file)).unwrap().trim().to_owned()
}

#[track_caller]
fn assert_gone(unit: &str, below: &str) {
    assert!(!dir(below).exists(), "{below}");
    let unloaded = || shown(unit, &["LoadState"]) == ["LoadState=not-found"];
    assert!(comes_true(Duration::from_secs(10), unloaded), "{:?}", shown(unit, &["ActiveState"]));
}

#[test]
fn the_scope_has_the_pod_and_its_limits_and_they_change() {
    let (runtime, bundle) = (Runtime::new().unwrap(), bundle(Some(PATH), &limited()));
    create(&runtime, &bundle);
    let root = runtime.root().to_string_lossy().into_owned();
    let all: BTreeSet<u32> = runtime.processes(&root).unwrap().into_iter().collect();
    assert_eq!(all.len(), 4, "supervisor, monitor, file server, stand-in");
    let members: BTreeSet<u32> =
        read("cgroup.procs").lines().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(members, all);
    // On top of the container's limits: 128 MiB for the machine, 64 MiB and 256 tasks for the pod's
    // processes. `MemoryLow` is raised by the same amount of memory.
    let properties =
        ["CPUQuotaPerSecUSec", "MemoryLow", "MemoryMax", "MemorySwapMax", "Slice", "TasksMax"];
    let expected = |memory: u64, tasks: u64, quota: &str| {
        vec![
            format!("CPUQuotaPerSecUSec={quota}"),
            format!("MemoryLow={}", (32 + 192) << 20),
            format!("MemoryMax={}", (memory + 192) << 20),
            "MemorySwapMax=0".to_owned(),
            "Slice=suite-pods.slice".to_owned(),
            format!("TasksMax={}", tasks + 256),
        ]
    };
    assert_eq!(shown(SCOPE, &properties), expected(64, 20, "3s"));
    assert_eq!(read("memory.max"), (256 << 20).to_string());
    assert_eq!(read("memory.swap.max"), "0");
    assert_eq!((read("cpu.max").as_str(), read("pids.max").as_str()), ("300000 100000", "276"));

    runtime.ok(&["start", "c"]).unwrap();
    let stats: Value =
        serde_json::from_str(&runtime.ok(&["events", "--stats", "c"]).unwrap()).unwrap();
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], 256 << 20);
    let [supervisor] = runtime.processes("supervise").unwrap()[..] else {
        panic!("one supervisor")
    };
    let descriptors = || fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().count();
    let before = descriptors();
    let less = ["update", "--memory", "48m", "--memory-swap", "48m", "--pids-limit", "30"];
    runtime.ok(&[&less[..], &["c"]].concat()).unwrap();
    assert_eq!(shown(SCOPE, &properties), expected(48, 30, "3s"));
    assert_eq!(read("memory.max"), ((48 + 192) << 20).to_string());
    runtime.ok(&["update", "--cpu-quota", "50000", "c"]).unwrap();
    assert_eq!(shown(SCOPE, &properties), expected(48, 30, "500ms"));
    let no_more = comes_true(Duration::from_secs(5), || descriptors() <= before);
    assert!(no_more, "{} descriptors, {before} before", descriptors());
    // The stand-in of a further process is in the pod's scope.
    let mut detached = runtime.command(&["exec", "--detach", "c", "sleep", "1000"]);
    assert!(detached.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    assert_eq!(read("cgroup.procs").lines().count(), 5);
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    assert_gone(SCOPE, SCOPE_DIR);
}

#[test]
fn a_scope_without_a_name_has_the_containers_and_goes_with_it() {
    let runtime = Runtime::new().unwrap();
    let bundle = bundle(None, &json!({}));
    let mut command = runtime.command(&[SYSTEMD, "run", "--bundle"]);
    command.arg(bundle.path()).arg("c").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    expect_output(&mut child, "up\n").unwrap();
    let scope = "bulkhead-c.scope";
    assert_eq!(
        shown(scope, &["ActiveState", "Slice"]),
        ["ActiveState=active", "Slice=system.slice"]
    );
    runtime.ok(&["kill", "c", "KILL"]).unwrap();
    assert_eq!(finish(child).unwrap().status.code(), Some(137));
    assert_gone(scope, "system.slice/bulkhead-c.scope");
    runtime.assert_clean().unwrap();
}

#[test]
fn the_scope_goes_whoever_was_killed() {
    let runtime = Runtime::new().unwrap();
    for victim in ["supervise", "stand-in", "bulkhead-vmm", "bulkhead-fs"] {
        create(&runtime, &bundle(Some(PATH), &limited()));
        let [pid] = runtime.processes(victim).unwrap()[..] else { panic!("one {victim}") };
        kill_9(pid).unwrap();
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        assert_gone(SCOPE, SCOPE_DIR);
    }
    let root = runtime.root().to_string_lossy().into_owned();
    create(&runtime, &bundle(Some(PATH), &limited()));
    for pid in runtime.processes(&root).unwrap() {
        // It may have ended together with the one before.
        if Path::new("/proc").join(pid.to_string()).exists() {
            let _ = kill_9(pid);
        }
    }
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    assert_gone(SCOPE, SCOPE_DIR);
}

#[test]
fn the_scope_is_as_runcs() {
    let properties = [
        "CPUAccounting",
        "CPUQuotaPerSecUSec",
        "DefaultDependencies",
        "Delegate",
        "IOAccounting",
        "KillMode",
        "MemoryAccounting",
        "OOMPolicy",
        "Slice",
        "TasksAccounting",
        "Transient",
    ];
    let seen = |runtime: &Runtime| {
        create(runtime, &bundle(Some(PATH), &limited()));
        let seen = shown(SCOPE, &properties);
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        assert_gone(SCOPE, SCOPE_DIR);
        seen
    };
    assert_eq!(seen(&Runtime::new().unwrap()), seen(&Runtime::runc().unwrap()));
}

#[test]
fn a_scope_in_which_anybody_is_is_refused() {
    let runtime = Runtime::new().unwrap();
    let mut stranger = Command::new("systemd-run");
    stranger.args(["--scope", "--quiet", "--slice", "suite-pods", "--unit", "pod-c"]);
    let mut stranger = stranger.args(["sleep", "1000"]).stdin(Stdio::null()).spawn().unwrap();
    assert!(comes_true(Duration::from_secs(20), || dir(SCOPE_DIR).exists()));
    let bundle = bundle(Some(PATH), &json!({}));
    let mut command = runtime.command(&[SYSTEMD, "run", "--bundle"]);
    command.arg(bundle.path()).arg("c").stderr(Stdio::piped());
    let (status, _, errors) = told(&output(&mut command).unwrap());
    assert_eq!(status, Some(1));
    assert!(errors.contains("cgroup is not empty") && errors.contains(PATH), "{errors}");
    assert!(stranger.try_wait().unwrap().is_none(), "a stranger was killed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn podman_with_systemd_as_its_cgroup_manager() {
    let directory = TempDir::with_prefix("podman-").unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let podman = |args: &[&str]| {
        let runtime = dist().join("bin/bulkhead").display().to_string();
        let mut command = Command::new("podman");
        command.args(["--root", &path("root"), "--runroot", &path("run"), "--runtime", &runtime]);
        command.args(["--storage-driver", "vfs", "--events-backend", "file"]);
        command.args(["--cgroup-manager", "systemd"]).args(args).stdin(Stdio::null());
        let (status, out, err) = told(&output(&mut command).unwrap());
        assert_eq!(status, Some(0), "{args:?}: {err}");
        out.trim_end().to_owned()
    };
    let archive = bundle::image(directory.path(), &["cat", "echo", "sleep"]).unwrap();
    podman(&["import", archive.to_str().unwrap(), "box"]);
    let id = podman(&[
        "run",
        "-d",
        "--name",
        "one",
        "--network",
        "none",
        "--memory",
        "64m",
        "box",
        "sleep",
        "1000",
    ]);
    let scope = format!("libpod-{id}.scope");
    let expected = [format!("MemoryMax={}", 256 << 20), "Slice=machine.slice".to_owned()];
    assert_eq!(shown(&scope, &["Slice", "MemoryMax"]), expected);
    assert_eq!(
        podman(&["exec", "one", "cat", "/sys/fs/cgroup/memory.max"]),
        (64 << 20).to_string()
    );
    podman(&["rm", "--force", "--time", "0", "one"]);
    assert_gone(&scope, &format!("machine.slice/{scope}"));
}
