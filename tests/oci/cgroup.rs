//! The pod's cgroup on the host: the processes in it, its limits, and that it is removed.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, expect_output, finish, kill_9};
use serde_json::{Value, json};

const PATH: &str = "/bulkhead-suite/pod";

/// The path of a container's cgroup on the host; the cgroup and its parent are removed when this is
/// dropped.
struct Place;

impl Place {
    fn dir() -> PathBuf {
        Path::new("/sys/fs/cgroup").join(PATH.trim_start_matches('/'))
    }

    fn read(file: &str) -> String {
        fs::read_to_string(Self::dir().join(file)).unwrap().trim().to_owned()
    }

    fn processes() -> BTreeSet<u32> {
        Self::read("cgroup.procs").lines().map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Fails if no container has created it.
        let _ = fs::remove_dir(Self::dir());
        let _ = fs::remove_dir(Self::dir().parent().unwrap());
    }
}

fn bundle(resources: &Value) -> Bundle {
    let bundle = Bundle::script("echo up; exec sleep 1000").unwrap();
    bundle
        .with(|spec| {
            spec["linux"]["cgroupsPath"] = json!(PATH);
            spec["linux"]["resources"] = resources.clone();
            spec["process"]["oomScoreAdj"] = json!(77);
        })
        .unwrap()
}

#[test]
fn the_whole_pod_is_in_it_with_its_limits() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let bundle = bundle(&json!({
        "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 64 << 20},
        "cpu": {"quota": 300_000, "period": 100_000, "shares": 2048},
        "pids": {"limit": 20},
    }));
    runtime.create("c", &bundle).unwrap();
    let root = runtime.root().to_string_lossy().into_owned();
    let all: BTreeSet<u32> = runtime.processes(&root).unwrap().into_iter().collect();
    assert_eq!(all.len(), 4, "supervisor, monitor, file server, stand-in");
    assert_eq!(Place::processes(), all);
    for pid in all {
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap(), "77\n");
    }
    // In MiB: 64 of the container, 128 for the machine, 64 for the pod's processes.
    assert_eq!(Place::read("memory.max"), (256 << 20).to_string());
    assert_eq!(Place::read("memory.low"), ((32 + 192) << 20).to_string());
    // The limit of memory and swap together equals that of memory, so there is no swap.
    assert_eq!(Place::read("memory.swap.max"), "0");
    assert_eq!(Place::read("cpu.max"), "300000 100000");
    assert_ne!(Place::read("cpu.weight"), "100");
    assert_eq!(Place::read("pids.max"), (20 + 256).to_string());
    let used: u64 = Place::read("memory.current").parse().unwrap();
    assert!(used > 16 << 20, "the guest's memory is not counted: {used}");
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    assert!(!Place::dir().exists());
    assert!(Place::dir().parent().unwrap().exists(), "parents stay, as under runc");
}

#[test]
fn stand_ins_that_stay_are_in_it_and_callers_are_not() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let bundle = bundle(&json!({}));
    let mut child = runtime.spawn_run("c", &bundle).unwrap();
    expect_output(&mut child, "up\n").unwrap();
    assert!(!Place::processes().contains(&child.id()), "a caller's own process was moved");
    let before = Place::processes().len();
    let mut detached = runtime.command(&["exec", "--detach", "c", "sleep", "1000"]);
    // No pipes: the process that stays would keep them open.
    assert!(detached.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    assert_eq!(Place::processes().len(), before + 1);
    let own = exec_sleep(&runtime);
    assert!(comes_true(Duration::from_secs(20), || {
        runtime.ok(&["ps", "c"]).unwrap().matches("sleep 1000").count() == 3
    }));
    assert_eq!(Place::processes().len(), before + 1);
    kill_9(child.id()).unwrap();
    child.wait().unwrap();
    finish(own).unwrap();
    assert!(comes_true(Duration::from_secs(20), || !Place::dir().exists()));
}

fn exec_sleep(runtime: &Runtime) -> Child {
    let mut command: Command = runtime.command(&["exec", "c", "sleep", "1000"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn limits_change_inside_and_outside_while_it_runs() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let limits = json!({
        "memory": {"limit": 100 << 20},
        "cpu": {"quota": 100_000, "period": 100_000},
        "pids": {"limit": 20},
        "devices": [{"allow": false, "access": "rwm"}],
    });
    let bundle = bundle(&limits);
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    let inside =
        |file: &str| runtime.ok(&["exec", "c", "cat", &format!("/sys/fs/cgroup/{file}")]).unwrap();
    let outside = |mib: u64| ((mib + 128 + 64) << 20).to_string();
    let less = ["--memory", "64m", "--memory-swap", "64m", "--pids-limit", "30"];
    runtime.ok(&[&["update"], &less[..], &["c"]].concat()).unwrap();
    assert_eq!(inside("memory.max"), format!("{}\n", 64 << 20));
    assert_eq!(Place::read("memory.max"), outside(64));
    assert_eq!([inside("memory.swap.max").trim(), &Place::read("memory.swap.max")], ["0", "0"]);
    assert_eq!((inside("pids.max").as_str(), Place::read("pids.max").as_str()), ("30\n", "286"));
    // As Docker writes it: values that are 0 or empty are unchanged.
    let update = json!({
        "memory": {"limit": 0, "reservation": 16 << 20},
        "cpu": {"quota": 50_000, "period": 0, "cpus": "", "shares": 0},
    });
    let mut command = runtime.command(&["update", "--resources", "-", "c"]);
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(update.to_string().as_bytes()).unwrap();
    let output = finish(child).unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(inside("memory.max"), format!("{}\n", 64 << 20));
    assert_eq!(
        (inside("cpu.max").as_str(), Place::read("cpu.max").as_str()),
        ("50000 100000\n", "50000 100000")
    );
    assert_eq!(Place::read("memory.low"), outside(16));
    // The update has not changed the device rules.
    runtime.ok(&["exec", "c", "sh", "-c", "echo > /dev/null"]).unwrap();

    // An invalid size is refused and changes nothing.
    let errors = runtime.fails(&["update", "--memory", "abc", "c"]).unwrap();
    assert!(errors.contains("invalid value for memory: invalid size: 'abc'"), "{errors}");
    assert_eq!(inside("memory.max"), format!("{}\n", 64 << 20));
    assert_eq!(Place::read("memory.max"), outside(64));

    runtime.ok(&["pause", "c"]).unwrap();
    runtime.ok(&["update", "--memory", "-1", "--memory-swap", "-1", "c"]).unwrap();
    assert_eq!(Place::read("memory.max"), "max");
    assert_eq!(Place::read("memory.swap.max"), "max");
    runtime.ok(&["resume", "c"]).unwrap();
    assert_eq!(inside("memory.max"), "max\n");
    runtime.ok(&["kill", "c", "KILL"]).unwrap();
    runtime.wait_for_status("c", "stopped").unwrap();
    let errors = runtime.fails(&["update", "--memory", "64m", "c"]).unwrap();
    assert!(errors.contains("container not running"), "{errors}");
    runtime.ok(&["delete", "c"]).unwrap();
    assert!(!Place::dir().exists());
}

#[test]
fn events_tell_what_is_used_and_when_memory_ran_out() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let script = "echo up; read go; tail -c 100000000 /dev/zero; echo \"tail: $?\"; exit 3";
    let bundle = bundle(&json!({"memory": {"limit": 32 << 20}, "pids": {"limit": 20}}));
    let bundle = bundle.with(|spec| spec["process"]["args"] = json!(["sh", "-c", script])).unwrap();
    let mut child = runtime.spawn_run("c", &bundle).unwrap();
    expect_output(&mut child, "up\n").unwrap();
    let stats: Value =
        serde_json::from_str(&runtime.ok(&["events", "--stats", "c"]).unwrap()).unwrap();
    assert_eq!((&stats["type"], &stats["id"]), (&json!("stats"), &json!("c")));
    let (memory, cpu) = (&stats["data"]["memory"]["usage"], &stats["data"]["cpu"]["usage"]);
    assert_eq!(memory["limit"], (32 + 128 + 64) << 20);
    let used = memory["usage"].as_u64().unwrap();
    let really: u64 = Place::read("memory.current").parse().unwrap();
    assert!(used.abs_diff(really) < 8 << 20, "{used} is not {really}");
    assert!(cpu["total"].as_u64().unwrap() > 10_000_000, "{cpu}");
    assert_eq!(stats["data"]["pids"]["limit"], 20 + 256);

    let mut command = runtime.command(&["events", "--interval", "1s", "c"]);
    let mut watcher = command.stdout(Stdio::piped()).spawn().unwrap();
    expect_output(&mut watcher, r#"{"#).unwrap();
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    // Neither the init process was killed nor a process of the pod on the host.
    let output = finish(child).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text.contains("tail: 137"), "{output:?}");
    let watched = String::from_utf8(finish(watcher).unwrap().stdout).unwrap();
    let oom = watched.lines().filter(|line| *line == r#"{"id":"c","type":"oom"}"#).count();
    assert_eq!(oom, 1, "{watched}");
    assert!(watched.contains(r#""type":"stats""#), "{watched}");
    assert!(!Place::dir().exists());
    let errors = runtime.fails(&["events", "--interval", "0s", "c"]).unwrap();
    assert!(errors.contains("interval must be greater than 0"), "{errors}");
}

#[test]
fn it_goes_with_the_container_whoever_was_killed() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    for victim in ["supervise", "stand-in", "bulkhead-vmm", "bulkhead-fs"] {
        runtime.create("c", &bundle(&json!({"memory": {"limit": 64 << 20}}))).unwrap();
        let [pid] = runtime.processes(victim).unwrap()[..] else { panic!("one {victim}") };
        kill_9(pid).unwrap();
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        assert!(!Place::dir().exists(), "after {victim}");
    }
    let refused = bundle(&json!({})).with(|spec| spec["process"]["args"] = json!(["/none"]));
    runtime.run("c", &refused.unwrap()).unwrap();
    assert!(!Place::dir().exists(), "after a container that could not be created");
}

#[test]
fn one_that_others_use_is_refused_and_left_alone() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    fs::create_dir_all(Place::dir()).unwrap();
    let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(Place::dir().join("cgroup.procs"), stranger.id().to_string()).unwrap();
    for path in [PATH, "/bulkhead-suite", "/"] {
        let bundle = bundle(&json!({})).with(|spec| spec["linux"]["cgroupsPath"] = json!(path));
        let output = runtime.run("c", &bundle.unwrap()).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("cgroup is not empty") && errors.contains(path), "{errors}");
        assert_eq!(output.status.code(), Some(1));
    }
    assert!(stranger.try_wait().unwrap().is_none(), "a stranger was killed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn a_unit_of_systemd_needs_its_form_and_systemd() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let run = |path: &str| {
        let bundle = bundle(&json!({})).with(|spec| spec["linux"]["cgroupsPath"] = json!(path));
        let bundle = bundle.unwrap();
        let mut command = runtime.command(&["--systemd-cgroup", "run", "--bundle"]);
        command.arg(bundle.path()).arg("c").stderr(Stdio::piped());
        String::from_utf8(finish(command.spawn().unwrap()).unwrap().stderr).unwrap()
    };
    let errors = run(PATH);
    assert!(errors.contains("slice:prefix:name") && errors.contains(PATH), "{errors}");
    // The test host runs no systemd.
    let errors = run("system.slice:suite:c");
    assert!(errors.contains("systemd"), "{errors}");
    runtime.assert_clean().unwrap();
}
