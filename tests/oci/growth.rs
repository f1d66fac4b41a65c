//! `update` to higher limits than the machine was started with: the machine grows.

use std::fs;
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true};
use serde_json::{Value, json};

/// Starts a container called `c`.
fn start(resources: Value) -> (Runtime, Bundle) {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("exec sleep 1000").unwrap();
    let bundle = bundle.with(|spec| spec["linux"]["resources"] = resources).unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    (runtime, bundle)
}

fn limit(runtime: &Runtime, file: &str) -> String {
    let path = format!("/sys/fs/cgroup/{file}");
    runtime.ok(&["exec", "c", "cat", &path]).unwrap().trim().to_owned()
}

/// The memory of the guest's kernel, in MiB.
fn total(runtime: &Runtime) -> u64 {
    let meminfo = runtime.ok(&["exec", "c", "cat", "/proc/meminfo"]).unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

/// Has a program in the container use this much memory; returns its exit status.
fn use_memory(runtime: &Runtime, mib: u64) -> Option<i32> {
    let size = format!("bs={mib}M");
    let dd = ["exec", "c", "dd", "if=/dev/zero", "of=/dev/null", &size, "count=1"];
    runtime.call(&dd).unwrap().status.code()
}

/// The host memory that the monitor uses, in MiB.
pub(crate) fn resident(runtime: &Runtime) -> u64 {
    let [monitor] = runtime.processes("bulkhead-vmm").unwrap()[..] else { panic!("one monitor") };
    let rollup = fs::read_to_string(format!("/proc/{monitor}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[test]
fn memory_is_there_when_the_limit_is_raised_and_comes_back_when_it_is_free() {
    let (runtime, _bundle) = start(json!({"memory": {"limit": 64 << 20}}));
    let first = total(&runtime);
    assert_eq!(first, 192);
    let update = |memory: &str| runtime.ok(&["update", "--memory", memory, "c"]).unwrap();
    update("400m");
    assert_eq!(limit(&runtime, "memory.max"), (400 << 20).to_string());
    assert!(total(&runtime) > 400, "{} MiB", total(&runtime));
    let idle = resident(&runtime);
    assert!(idle < 150, "memory that nobody has touched takes {idle} MiB");
    assert_eq!(use_memory(&runtime, 360), Some(0));
    // The guest's kernel reports free pages after two seconds.
    assert!(
        comes_true(Duration::from_secs(60), || resident(&runtime) < idle + 60),
        "{} MiB are not given back, {idle} MiB were taken before",
        resident(&runtime)
    );

    // The machine grows a second time, while the container is paused.
    runtime.ok(&["pause", "c"]).unwrap();
    update("600m");
    runtime.ok(&["resume", "c"]).unwrap();
    assert_eq!(limit(&runtime, "memory.max"), (600 << 20).to_string());
    assert_eq!(use_memory(&runtime, 540), Some(0));
    let grown = total(&runtime);
    update("100m");
    assert_eq!(limit(&runtime, "memory.max"), (100 << 20).to_string());
    assert_eq!(use_memory(&runtime, 190), Some(137));
    update("500m");
    assert_eq!(total(&runtime), grown, "it was large enough");
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn what_the_host_does_not_have_is_left_out_as_at_the_start() {
    let (runtime, _bundle) = start(json!({}));
    let before = total(&runtime);
    let processors = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let quota = ["--cpu-quota", "1600000", "--cpu-period", "100000"];
    runtime.ok(&[&["update", "--memory", "4096g"], &quota[..], &["c"]].concat()).unwrap();
    assert_eq!(limit(&runtime, "memory.max"), (4096_u64 << 30).to_string());
    assert_eq!(limit(&runtime, "cpu.max"), "1600000 100000");
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let host = meminfo.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024;
    let grown = total(&runtime);
    assert!(grown > host * 9 / 10 && grown < host + 256, "{before}, {grown} of {host} MiB");
    let online = runtime.ok(&["exec", "c", "cat", "/sys/devices/system/cpu/online"]).unwrap();
    assert_eq!(online, processors);
    // Limits can be removed again.
    runtime.ok(&["update", "--memory", "-1", "--cpu-quota", "-1", "c"]).unwrap();
    assert_eq!(limit(&runtime, "memory.max"), "max");
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn limits_stay_when_the_guest_does_not_take_the_memory() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("exec sleep 1000").unwrap();
    let bundle = bundle
        .with(|spec| {
            spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}});
            let mounts = spec["mounts"].as_array_mut().unwrap();
            let sys = mounts.iter_mut().find(|mount| mount["type"] == "sysfs").unwrap();
            sys["options"] = json!(["rw"]);
        })
        .unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    runtime.ok(&["update", "--memory", "80m", "c"]).unwrap();
    // The driver is unbound, as a hostile guest might do.
    let script = "cd /sys/bus/virtio/drivers/virtio_mem; basename virtio? > unbind";
    runtime.ok(&["exec", "c", "sh", "-c", script]).unwrap();
    let errors = runtime.fails(&["update", "--memory", "600m", "c"]).unwrap();
    assert!(errors.contains("the guest plugged 128 of"), "{errors}");
    assert_eq!(limit(&runtime, "memory.max"), (80 << 20).to_string());
    // The memory that the machine has is enough for this limit.
    runtime.ok(&["update", "--memory", "100m", "c"]).unwrap();
    assert_eq!(limit(&runtime, "memory.max"), (100 << 20).to_string());
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}
