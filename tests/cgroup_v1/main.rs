//! The pod's cgroup in each hierarchy of a host with cgroup v1. Runs in the test host with cgroup
//! v1 instead of v2.

#![cfg(test)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, expect_output, finish, kill_9};
use serde_json::{Value, json};

const PATH: &str = "/bulkhead-suite/pod";
const HIERARCHIES: [&str; 10] = [
    "blkio",
    "cpu",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "net_cls",
    "perf_event",
    "pids",
];

/// The path of a container's cgroup on the host; its parents are removed when this is dropped.
struct Place;

impl Place {
    fn dir(hierarchy: &str) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(hierarchy).join(PATH.trim_start_matches('/'))
    }

    fn read(hierarchy: &str, file: &str) -> String {
        fs::read_to_string(Self::dir(hierarchy).join(file)).unwrap().trim().to_owned()
    }

    /// The hierarchies in which it exists.
    fn left() -> Vec<&'static str> {
        HIERARCHIES.into_iter().filter(|hierarchy| Self::dir(hierarchy).exists()).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for hierarchy in HIERARCHIES {
            // Fails if no container has created it.
            let _ = fs::remove_dir(Self::dir(hierarchy));
            let _ = fs::remove_dir(Self::dir(hierarchy).parent().unwrap());
        }
    }
}

fn bundle(script: &str, resources: &Value) -> Bundle {
    let bundle = Bundle::script(script).unwrap();
    let change = |spec: &mut Value| {
        spec["linux"]["cgroupsPath"] = json!(PATH);
        spec["linux"]["resources"] = resources.clone();
    };
    bundle.with(change).unwrap()
}

fn sleeping(resources: &Value) -> Bundle {
    bundle("exec sleep 1000", resources)
}

#[test]
fn the_whole_pod_is_in_each_hierarchy_with_its_limits_and_they_change() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let bundle = sleeping(&json!({
        "memory": {"limit": 64 << 20, "swap": 64 << 20},
        "cpu": {"quota": 300_000, "period": 100_000, "shares": 2048},
        "pids": {"limit": 20},
    }));
    runtime.create("c", &bundle).unwrap();
    let root = runtime.root().to_string_lossy().into_owned();
    let all: BTreeSet<u32> = runtime.processes(&root).unwrap().into_iter().collect();
    assert_eq!(all.len(), 4, "supervisor, monitor, file server, stand-in");
    for hierarchy in HIERARCHIES {
        let members: BTreeSet<u32> = Place::read(hierarchy, "cgroup.procs")
            .lines()
            .map(|pid| pid.parse().unwrap())
            .collect();
        assert_eq!(members, all, "{hierarchy}");
    }
    // In MiB: 64 of the container, 128 for the machine, 64 for the pod's processes.
    let memory = |name: &str| Place::read("memory", &format!("memory.{name}"));
    let mib = |mib: u64| (mib << 20).to_string();
    assert_eq!(memory("limit_in_bytes"), mib(256));
    assert_eq!(memory("memsw.limit_in_bytes"), mib(256));
    assert_eq!(Place::read("cpu", "cpu.cfs_quota_us"), "300000");
    assert_eq!(Place::read("cpu", "cpu.shares"), "2048");
    assert_eq!(Place::read("pids", "pids.max"), (20 + 256).to_string());
    let used: u64 = memory("usage_in_bytes").parse().unwrap();
    assert!(used > 16 << 20, "the guest's memory is not counted: {used}");

    runtime.ok(&["start", "c"]).unwrap();
    let update = ["update", "--memory", "48m", "--memory-swap", "48m", "--pids-limit", "30"];
    runtime.ok(&[&update[..], &["--cpu-quota", "50000", "c"]].concat()).unwrap();
    assert_eq!(memory("limit_in_bytes"), mib(48 + 192));
    assert_eq!(memory("memsw.limit_in_bytes"), mib(48 + 192));
    assert_eq!(Place::read("pids", "pids.max"), (30 + 256).to_string());
    assert_eq!(Place::read("cpu", "cpu.cfs_quota_us"), "50000");
    runtime.ok(&["update", "--memory", "64m", "--memory-swap", "64m", "c"]).unwrap();
    assert_eq!(memory("limit_in_bytes"), mib(64 + 192));
    let inside = runtime.ok(&["exec", "c", "cat", "/sys/fs/cgroup/memory.max"]).unwrap();
    assert_eq!(inside.trim(), mib(64), "inside it is cgroup v2");
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    assert_eq!(Place::left(), [""; 0]);
}

#[test]
fn events_tell_what_is_used_and_when_memory_ran_out() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let script = "echo up; read go; tail -c 100000000 /dev/zero; echo \"tail: $?\"; exit 3";
    let bundle = bundle(script, &json!({"memory": {"limit": 32 << 20}, "pids": {"limit": 20}}));
    let mut child = runtime.spawn_run("c", &bundle).unwrap();
    expect_output(&mut child, "up\n").unwrap();
    let stats: Value =
        serde_json::from_str(&runtime.ok(&["events", "--stats", "c"]).unwrap()).unwrap();
    let (memory, cpu) = (&stats["data"]["memory"], &stats["data"]["cpu"]["usage"]);
    assert_eq!(memory["usage"]["limit"], (32 + 128 + 64) << 20);
    let used = memory["usage"]["usage"].as_u64().unwrap();
    let really: u64 = Place::read("memory", "memory.usage_in_bytes").parse().unwrap();
    assert!(used.abs_diff(really) < 8 << 20, "{used} is not {really}");
    let swapped = memory["swap"]["usage"].as_u64().unwrap();
    assert!(swapped.abs_diff(used) < 8 << 20, "nothing is swapped: {memory}");
    // Processor time in nanoseconds, as the host counts it.
    let spent: u64 = Place::read("cpu", "cpuacct.usage").parse().unwrap();
    let total = cpu["total"].as_u64().unwrap();
    assert!(total <= spent && total > spent / 2, "{cpu} of {spent}");
    assert_eq!(stats["data"]["pids"]["limit"], 20 + 256);

    let mut command = runtime.command(&["events", "--interval", "1s", "c"]);
    let mut watcher = command.stdout(Stdio::piped()).spawn().unwrap();
    expect_output(&mut watcher, "{").unwrap();
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let output = finish(child).unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let watched = String::from_utf8(finish(watcher).unwrap().stdout).unwrap();
    let oom = watched.lines().filter(|line| *line == r#"{"id":"c","type":"oom"}"#).count();
    assert_eq!(oom, 1, "{watched}");
    assert_eq!(Place::left(), [""; 0]);
}

#[test]
fn it_goes_with_the_container_whoever_was_killed() {
    let (place, runtime) = (Place, Runtime::new().unwrap());
    for victim in ["supervise", "stand-in", "bulkhead-vmm"] {
        runtime.create("c", &sleeping(&json!({"memory": {"limit": 64 << 20}}))).unwrap();
        let [pid] = runtime.processes(victim).unwrap()[..] else { panic!("one {victim}") };
        kill_9(pid).unwrap();
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        assert_eq!(Place::left(), [""; 0], "after {victim}");
    }
    drop(place);
    runtime.assert_clean().unwrap();
}

#[test]
fn one_that_others_use_is_refused_and_left_alone() {
    let (_place, runtime) = (Place, Runtime::new().unwrap());
    let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::create_dir_all(Place::dir("devices")).unwrap();
    fs::write(Place::dir("devices").join("cgroup.procs"), stranger.id().to_string()).unwrap();
    let output = runtime.run("c", &sleeping(&json!({}))).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("cgroup is not empty") && errors.contains(PATH), "{errors}");
    assert!(stranger.try_wait().unwrap().is_none(), "a stranger was killed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn systemds_units_need_cgroup_v2() {
    let runtime = Runtime::new().unwrap();
    let bundle = sleeping(&json!({}));
    let mut command = runtime.command(&["--systemd-cgroup", "run", "--bundle"]);
    command.arg(bundle.path()).arg("c").stderr(Stdio::piped());
    let output = finish(command.spawn().unwrap()).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("--systemd-cgroup needs a host with cgroup v2"), "{errors}");
    runtime.assert_clean().unwrap();
}
