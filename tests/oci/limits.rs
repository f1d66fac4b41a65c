//! Limits, both as fields and as `linux.resources.unified`: their effect on the container, on its
//! machine and on the cgroup of the host, beside runc.

use std::fs;
use std::path::Path;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, message};
use serde_json::{Value, json};

const PARENT: &str = "/sys/fs/cgroup/bulkhead-limits";
/// What a machine may use in addition to the container's limit, in bytes.
const OVERHEAD: u64 = 192 << 20;

/// The path of a container's cgroup on the host; the cgroup and its parent are removed when this is
/// dropped.
struct Place;

impl Place {
    /// Makes the parent, which containers leave behind.
    fn new() -> Self {
        fs::create_dir(PARENT).unwrap();
        Self
    }

    fn read(file: &str) -> String {
        let path = Path::new(PARENT).join("pod").join(file);
        fs::read_to_string(path).unwrap().trim().to_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Fails if no container has created it.
        let _ = fs::remove_dir(Path::new(PARENT).join("pod"));
        let _ = fs::remove_dir(PARENT);
    }
}

fn bundle(script: &str, resources: &Value) -> Bundle {
    let bundle = Bundle::script(script).unwrap();
    bundle
        .with(|spec| {
            spec["linux"]["cgroupsPath"] = json!("/bulkhead-limits/pod");
            spec["linux"]["resources"] = resources.clone();
        })
        .unwrap()
}

fn idle(resources: &Value) -> Bundle {
    bundle("exec sleep 1000", resources)
}

fn both() -> [Runtime; 2] {
    [Runtime::new().unwrap(), Runtime::runc().unwrap()]
}

#[test]
fn a_limit_that_the_host_does_not_have_is_named() {
    let _place = Place::new();
    let [ours, runc] = both();
    for (resources, words) in [
        (json!({"blockIO": {"weight": 100}}), "io.weight"),
        (json!({"unified": {"io.weight": "100"}}), "io.weight"),
        (json!({"unified": {"nosuch.file": "1"}}), "nosuch"),
        (json!({"unified": {"memory.nosuch": "1"}}), "memory.nosuch"),
        (json!({"unified": {"../cgroup.max.depth": "1"}}), "must be a file name"),
        (json!({"cpu": {"cpus": "99"}}), "cpuset.cpus"),
    ] {
        let bundle = idle(&resources);
        for runtime in [&ours, &runc] {
            let output = runtime.run("none", &bundle).unwrap();
            let words_of = message(&String::from_utf8(output.stderr).unwrap());
            assert_eq!(output.status.code(), Some(1), "{words_of}");
            assert!(words_of.contains(words), "{resources}: {words_of}");
        }
    }
    ours.assert_clean().unwrap();
}

#[test]
fn what_only_other_hosts_have_is_left_out_as_by_runc() {
    let _place = Place::new();
    let [ours, runc] = both();
    let resources = json!({
        "blockIO": {"leafWeight": 10, "weightDevice": [{"major": 8, "minor": 0, "weight": 10}]},
        "memory": {"kernel": 1 << 30, "swappiness": 60},
    });
    for runtime in [&ours, &runc] {
        let output = runtime.run("none", &bundle("echo up", &resources)).unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "up\n", "{output:?}");
    }
    ours.assert_clean().unwrap();
}

#[test]
fn groups_of_the_caller_are_refused_by_name() {
    let ours = Runtime::new().unwrap();
    let bundle = Bundle::new(&["true"]).unwrap();
    let name = "run.oci.keep_original_groups";
    let bundle = bundle.with(|spec| spec["annotations"] = json!({name: "1"})).unwrap();
    let output = ours.run("groups", &bundle).unwrap();
    let words = message(&String::from_utf8(output.stderr).unwrap());
    assert!(words.contains(name) && words.contains("--group-add"), "{words}");
    ours.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn zeros_are_no_limits() {
    let _place = Place::new();
    let [ours, runc] = both();
    for resources in [
        json!({"pids": {"limit": 0}}),
        json!({"pids": {}}),
        json!({
            "memory": {"limit": 0, "swap": 0, "reservation": 0},
            "cpu": {
                "shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": "",
                "realtimeRuntime": 0, "realtimePeriod": 0,
            },
            "blockIO": {"weight": 0},
        }),
    ] {
        for runtime in [&ours, &runc] {
            let output = runtime.run("zero", &bundle("true | true; echo up", &resources)).unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "up\n", "{resources}: {output:?}");
        }
    }
    ours.assert_clean().unwrap();
}

#[test]
fn every_controller_of_the_host_is_there() {
    let [ours, runc] = both();
    let [here, there] = [&ours, &runc].map(|runtime| {
        // The container makes the parent cgroup.
        let _place = Place;
        runtime.create("all", &idle(&json!({}))).unwrap();
        let enabled = Place::read("cgroup.controllers");
        runtime.ok(&["delete", "--force", "all"]).unwrap();
        enabled
    });
    assert_eq!(here, there);
    assert!(here.contains("misc"), "{here}");
    ours.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn a_boot_is_not_slowed_down_by_the_containers_limits() {
    let _place = Place::new();
    let runtime = Runtime::new().unwrap();
    // The limit must not slow the boot down: with a tenth of a processor it would not end in this
    // time.
    let runtime = runtime.with("BULKHEAD_BOOT_TIMEOUT", "30");
    let resources = json!({"unified": {"cpu.max": "10000 100000", "cpu.weight": "1"}});
    let bundle = idle(&resources);
    runtime.create("slow", &bundle).unwrap();
    let host = ["cpu.max", "cpu.weight"].map(Place::read);
    assert_eq!(host, ["10000 100000", "1"]);
    runtime.ok(&["start", "slow"]).unwrap();
    let inside = runtime.ok(&["exec", "slow", "cat", "/sys/fs/cgroup/cpu.max"]).unwrap();
    assert_eq!(inside, "10000 100000\n");
    runtime.ok(&["delete", "--force", "slow"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn files_of_memory_are_raised_by_what_a_machine_takes() {
    let _place = Place::new();
    let runtime = Runtime::new().unwrap();
    let (max, high, low, min) = (64_u64 << 20, 48_u64 << 20, 2_u64 << 20, 1_u64 << 20);
    let resources = json!({"unified": {
        "memory.max": max.to_string(), "memory.high": "48M", "memory.low": low.to_string(),
        "memory.min": min.to_string(), "memory.swap.max": "0", "memory.oom.group": "1",
        "pids.max": "20", "cgroup.max.depth": "3",
    }});
    let bundle = idle(&resources);
    runtime.create("files", &bundle).unwrap();
    let raised = |amount: u64| (amount + OVERHEAD).to_string();
    for (file, expected) in [
        ("memory.max", raised(max)),
        ("memory.high", raised(high)),
        ("memory.low", raised(low)),
        ("memory.min", raised(min)),
        ("memory.swap.max", "0".to_owned()),
        ("memory.oom.group", "0".to_owned()),
        ("pids.max", (20 + 256).to_string()),
        ("cgroup.max.depth", "max".to_owned()),
    ] {
        assert_eq!(Place::read(file), expected, "{file}");
    }
    runtime.ok(&["start", "files"]).unwrap();
    for (file, expected) in [
        ("memory.max", max.to_string()),
        ("memory.high", high.to_string()),
        ("memory.low", low.to_string()),
        ("memory.min", min.to_string()),
        ("memory.swap.max", "0".to_owned()),
        ("memory.oom.group", "1".to_owned()),
        ("pids.max", "20".to_owned()),
        ("cgroup.max.depth", "3".to_owned()),
    ] {
        let path = format!("/sys/fs/cgroup/{file}");
        assert_eq!(
            runtime.ok(&["exec", "files", "cat", &path]).unwrap().trim(),
            expected,
            "{file}"
        );
    }
    runtime.ok(&["delete", "--force", "files"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn a_machine_is_as_large_as_a_file_says() {
    let _place = Place::new();
    let [ours, runc] = both();
    let resources = json!({"unified": {"memory.max": "400M"}});
    let script = "dd if=/dev/zero of=/large/file bs=1M count=300 2> /dev/null; wc -c < /large/file";
    let memory = json!({
        "destination": "/large", "type": "tmpfs", "source": "tmpfs", "options": ["size=350m"]
    });
    for runtime in [&ours, &runc] {
        let bundle = bundle(script, &resources).mount(memory.clone()).unwrap();
        let output = runtime.run("large", &bundle).unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "314572800\n", "{output:?}");
    }
    ours.assert_clean().unwrap();
}
