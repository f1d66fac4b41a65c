//! Containers that join another container's network and so share its machine: they join, end and
//! are killed in any order.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, expect_output, finish, kill_9, told};
use serde_json::{Value, json};

/// The process ID of a container's stand-in.
fn stand_in(runtime: &Runtime, id: &str) -> u64 {
    runtime.state(id).unwrap()["pid"].as_u64().unwrap()
}

/// A bundle whose container joins these namespaces of another container.
fn joining(script: &str, kinds: &[(&str, &str)], pid: u64) -> Bundle {
    let change = |spec: &mut Value| {
        let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
        for (kind, file) in kinds {
            list.retain(|entry| entry["type"] != *kind);
            list.push(json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
        }
    };
    Bundle::script(script).unwrap().with(change).unwrap()
}

fn inside(runtime: &Runtime, id: &str, script: &str) -> String {
    runtime.ok(&["exec", id, "sh", "-c", script]).unwrap().trim().to_owned()
}

/// Starts `a`, a container that sleeps.
fn first(runtime: &Runtime) -> Bundle {
    let bundle = Bundle::script("exec sleep 1000").unwrap();
    runtime.create("a", &bundle).unwrap();
    runtime.ok(&["start", "a"]).unwrap();
    bundle
}

/// Starts `b`, a container that sleeps and has joined `a`.
fn second(runtime: &Runtime, kinds: &[(&str, &str)]) -> Bundle {
    let bundle = joining("exec sleep 1000", kinds, stand_in(runtime, "a"));
    runtime.create("b", &bundle).unwrap();
    runtime.ok(&["start", "b"]).unwrap();
    bundle
}

const NETWORK: &[(&str, &str)] = &[("network", "net")];

#[test]
fn containers_that_join_share_one_machine_and_what_they_join() {
    let runtime = Runtime::new().unwrap();
    let _a = first(&runtime);
    let kinds = [("network", "net"), ("ipc", "ipc"), ("pid", "pid"), ("uts", "uts")];
    let _b = second(&runtime, &kinds);
    assert_eq!(runtime.processes("bulkhead-vmm").unwrap().len(), 1, "one machine");
    let same = |script: &str| inside(&runtime, "a", script) == inside(&runtime, "b", script);
    assert!(same("cat /proc/sys/kernel/random/boot_id"));
    for kind in ["net", "ipc", "pid", "uts"] {
        assert!(same(&format!("readlink /proc/self/ns/{kind}")), "{kind}");
    }
    for kind in ["mnt", "cgroup"] {
        assert!(!same(&format!("readlink /proc/self/ns/{kind}")), "{kind}");
    }
    let listening = "nc -l -p 7000 -e echo heard < /dev/null > /dev/null 2>&1 & sleep 0.3";
    inside(&runtime, "a", listening);
    assert_eq!(inside(&runtime, "b", "nc 127.0.0.1 7000 < /dev/null"), "heard");
    // The PID namespace is shared: each sees the other's processes.
    assert_eq!(inside(&runtime, "b", "ps | grep -c '[s]leep 1000'"), "2");
    // Files and cgroups are separate.
    inside(&runtime, "a", "echo mine > /mnt/file");
    assert_eq!(inside(&runtime, "b", "test -e /mnt/file || echo none"), "none");
    for id in ["b", "a"] {
        runtime.ok(&["kill", id, "KILL"]).unwrap();
        runtime.wait_for_status(id, "stopped").unwrap();
        runtime.ok(&["delete", id]).unwrap();
    }
    runtime.assert_clean().unwrap();
}

#[test]
fn the_pod_outlives_its_first_container() {
    let runtime = Runtime::new().unwrap();
    let a = first(&runtime);
    let in_cgroup = |spec: &mut Value| {
        spec["linux"]["cgroupsPath"] = json!("/bulkhead-pods/b");
        spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}});
    };
    let pid = stand_in(&runtime, "a");
    let b = joining("exec sleep 1000", NETWORK, pid).with(in_cgroup).unwrap();
    runtime.create("b", &b).unwrap();
    runtime.ok(&["start", "b"]).unwrap();
    inside(&runtime, "a", "echo kept > /mnt/file");
    let servers = runtime.processes("bulkhead-fs").unwrap();
    let files = || open_files(servers[0], &a.rootfs());
    assert!(files() > 0, "the file server has no file of the container open");
    runtime.ok(&["delete", "--force", "a"]).unwrap();
    assert_eq!(fs::read_to_string(a.rootfs().join("mnt/file")).unwrap(), "kept\n");
    assert!(comes_true(Duration::from_secs(10), || files() == 0), "{} are open", files());
    assert!(!runtime.root().join("a").exists());
    // All processes of the pod have moved to the other container's cgroup, which has the pod's
    // limits.
    let dir = Path::new("/sys/fs/cgroup/bulkhead-pods/b");
    let there = fs::read_to_string(dir.join("cgroup.procs")).unwrap();
    assert_eq!(there.lines().count(), 4, "{there}");
    let limit = fs::read_to_string(dir.join("memory.max")).unwrap();
    assert_eq!(limit.trim(), ((64 + 192) << 20).to_string());
    assert_eq!(inside(&runtime, "b", "echo still here"), "still here");
    // A container with the freed ID can join the remaining one.
    let again = joining("exec sleep 1000", NETWORK, stand_in(&runtime, "b"));
    runtime.create("a", &again).unwrap();
    runtime.ok(&["start", "a"]).unwrap();
    assert_eq!(runtime.processes("bulkhead-vmm").unwrap().len(), 1);
    runtime.ok(&["delete", "--force", "b"]).unwrap();
    assert_eq!(inside(&runtime, "a", "echo still here"), "still here");
    runtime.ok(&["delete", "--force", "a"]).unwrap();
    fs::remove_dir(dir.parent().unwrap()).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn memory_that_ran_out_in_one_is_told_in_its_cgroup() {
    let runtime = Runtime::new().unwrap();
    let _a = first(&runtime);
    let limits = |spec: &mut Value| {
        spec["linux"]["cgroupsPath"] = json!("/bulkhead-pods/greedy");
        spec["linux"]["resources"] = json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}});
    };
    let b = joining("tail /dev/zero", NETWORK, stand_in(&runtime, "a")).with(limits).unwrap();
    runtime.create("b", &b).unwrap();
    runtime.ok(&["start", "b"]).unwrap();
    runtime.wait_for_status("b", "stopped").unwrap();
    let events = fs::read_to_string("/sys/fs/cgroup/bulkhead-pods/greedy/memory.events").unwrap();
    assert!(events.contains("oom_kill 1"), "{events}");
    assert_eq!(inside(&runtime, "a", "echo alive"), "alive");
    for id in ["b", "a"] {
        runtime.ok(&["delete", "--force", id]).unwrap();
    }
    fs::remove_dir("/sys/fs/cgroup/bulkhead-pods").unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn the_machine_grows_for_each_that_joins() {
    let runtime = Runtime::new().unwrap();
    let _a = first(&runtime);
    // What is plugged, in pages: MemTotal has what a container without a limit can count on.
    let total = || -> u64 {
        let zones = inside(&runtime, "a", "grep managed /proc/zoneinfo");
        let pages = zones.lines().filter_map(|line| line.split_whitespace().nth(1));
        pages.map(|pages| pages.parse::<u64>().unwrap()).sum()
    };
    let before = total();
    let limits = |spec: &mut Value| {
        spec["linux"]["resources"] = json!({"memory": {"limit": 256 << 20}});
    };
    let space = json!({"destination": "/mnt", "type": "tmpfs", "options": ["size=220m"]});
    let b = joining("exec sleep 1000", NETWORK, stand_in(&runtime, "a")).with(limits).unwrap();
    let b = b.mount(space).unwrap();
    runtime.create("b", &b).unwrap();
    runtime.ok(&["start", "b"]).unwrap();
    assert!(total() >= before + (256 << 8), "from {before} to {} pages", total());
    inside(&runtime, "b", "dd if=/dev/zero of=/mnt/full bs=1M count=200");
    for id in ["a", "b"] {
        runtime.ok(&["delete", "--force", id]).unwrap();
    }
    runtime.assert_clean().unwrap();
}

/// How many files below a directory a process has open.
fn open_files(pid: u32, directory: &Path) -> usize {
    fn numbers(path: &Path, found: &mut BTreeSet<(u64, u64)>) {
        let Ok(metadata) = fs::symlink_metadata(path) else { return };
        found.insert((metadata.dev(), metadata.ino()));
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            numbers(&entry.path(), found);
        }
    }
    let mut found = BTreeSet::new();
    numbers(directory, &mut found);
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let open = open.filter_map(|entry| fs::metadata(entry.path()).ok());
    open.filter(|it| found.contains(&(it.dev(), it.ino()))).count()
}

#[test]
fn one_that_fails_leaves_the_others_alone() {
    let runtime = Runtime::new().unwrap();
    let _a = first(&runtime);
    let pid = stand_in(&runtime, "a");
    let missing = joining("", NETWORK, pid);
    let missing = missing.with(|spec| spec["process"]["args"] = json!(["/no/such"])).unwrap();
    let output = runtime.run("b", &missing).unwrap();
    let (status, _, words) = told(&output);
    assert_eq!(status, Some(1), "{words}");
    assert!(words.contains("/no/such"), "{words}");
    assert!(!runtime.root().join("b").exists());
    // In the foreground, `run` returns this container's status and does not wait for the pod.
    let seven = joining("echo out; exit 7", NETWORK, pid);
    assert_eq!(told(&runtime.run("b", &seven).unwrap()), (Some(7), "out\n".into(), String::new()));
    // A container whose creator is killed while it creates it.
    let sleeper = joining("exec sleep 1000", NETWORK, pid);
    for wait in [20, 200, 500] {
        let mut create = runtime.command(&["create", "--bundle"]);
        create.arg(sleeper.path()).arg("b").stdout(Stdio::null()).stderr(Stdio::null());
        let mut create = create.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        kill_9(create.id()).unwrap();
        create.wait().unwrap();
        runtime.ok(&["delete", "--force", "b"]).unwrap();
        assert_eq!(inside(&runtime, "a", "echo alive"), "alive");
    }
    runtime.ok(&["delete", "--force", "a"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn one_in_the_foreground_ends_alone() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("echo up; read line; exit 7").unwrap();
    let mut run = runtime.spawn_run("a", &bundle).unwrap();
    expect_output(&mut run, "up\n").unwrap();
    let b = joining("exec sleep 1000", NETWORK, run.id().into());
    runtime.create("b", &b).unwrap();
    runtime.ok(&["start", "b"]).unwrap();
    let ended = Instant::now();
    run.stdin.take().unwrap().write_all(b"end\n").unwrap();
    assert_eq!(told(&finish(run).unwrap()), (Some(7), String::new(), String::new()));
    assert!(ended.elapsed() < Duration::from_secs(30), "it waited for the pod");
    assert!(!runtime.root().join("a").exists());
    assert_eq!(inside(&runtime, "b", "echo alive"), "alive");
    runtime.ok(&["delete", "--force", "b"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn when_the_machine_dies_all_of_them_do() {
    let runtime = Runtime::new().unwrap();
    let _a = first(&runtime);
    let _b = second(&runtime, NETWORK);
    for name in ["bulkhead-vmm", "supervise"] {
        let killed = runtime.processes(name).unwrap();
        kill_9(killed[0]).unwrap();
        for id in ["a", "b"] {
            runtime.wait_for_status(id, "stopped").unwrap();
            runtime.ok(&["delete", "--force", id]).unwrap();
        }
        runtime.assert_clean().unwrap();
        if name == "bulkhead-vmm" {
            let bundle = Bundle::script("exec sleep 1000").unwrap();
            runtime.create("a", &bundle).unwrap();
            let joined = joining("exec sleep 1000", NETWORK, stand_in(&runtime, "a"));
            runtime.create("b", &joined).unwrap();
            // Bundles are only needed while a container is created.
        }
    }
}

#[test]
fn many_at_once_come_and_go() {
    let runtime = Runtime::new().unwrap();
    let _a = first(&runtime);
    let pid = stand_in(&runtime, "a");
    let bundles: Vec<_> = (0..5)
        .map(|number| joining(&format!("echo {number}; exit {number}"), NETWORK, pid))
        .collect();
    let started = (0..)
        .zip(&bundles)
        .map(|(number, bundle)| runtime.spawn_run(&format!("m{number}"), bundle).unwrap());
    let runs: Vec<_> = started.collect();
    for (number, run) in (0..).zip(runs) {
        let output = finish(run).unwrap();
        assert_eq!(told(&output), (Some(number), format!("{number}\n"), String::new()));
    }
    assert_eq!(runtime.processes("bulkhead-vmm").unwrap().len(), 1);
    runtime.ok(&["delete", "--force", "a"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn what_cannot_be_joined_is_refused_by_name() {
    let runtime = Runtime::new().unwrap();
    let _a = first(&runtime);
    let pid = stand_in(&runtime, "a");
    let words = |bundle: &Bundle| {
        runtime.fails(&["create", "--bundle", bundle.path().to_str().unwrap(), "b"]).unwrap()
    };
    let only_ipc = joining("true", &[("ipc", "ipc")], pid);
    let said = words(&only_ipc);
    assert!(said.contains("ipc namespace of container a, but not its network"), "{said}");
    let hosts = joining("true", &[("network", "net"), ("ipc", "ipc")], pid);
    let hosts = hosts.with(|spec| {
        let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
        list.last_mut().unwrap()["path"] = json!("/proc/1/ns/ipc");
    });
    let said = words(&hosts.unwrap());
    assert!(said.contains("/proc/1/ns/ipc, which is outside the machine"), "{said}");
    runtime.ok(&["kill", "a", "KILL"]).unwrap();
    runtime.wait_for_status("a", "stopped").unwrap();
    let said = words(&joining("true", NETWORK, pid));
    assert!(said.contains(&format!("/proc/{pid}/ns/net")), "{said}");
    runtime.ok(&["delete", "a"]).unwrap();
    runtime.assert_clean().unwrap();
}
