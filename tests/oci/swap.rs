//! Swap, beside runc: a container may use as much as its limits and the host's swap allow.

use std::fs;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, output, told};
use serde_json::{Value, json};

use crate::growth::resident;

const MIB: i64 = 1 << 20;

/// A device of the test host's memory, on which it can swap.
const RAM_DISK: &str = "/dev/ram0";

/// Swap of the test host, until it is dropped.
struct HostSwap;

impl HostSwap {
    fn new() -> Self {
        ran("/sbin/mkswap", &[RAM_DISK]);
        ran("/sbin/swapon", &[RAM_DISK]);
        Self
    }
}

impl Drop for HostSwap {
    fn drop(&mut self) {
        ran("/sbin/swapoff", &[RAM_DISK]);
        // It gives its memory back.
        ran("/sbin/blockdev", &["--flushbufs", RAM_DISK]);
    }
}

fn ran(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
}

fn container(script: &str, memory: &Value) -> Bundle {
    let bundle = Bundle::script(script).unwrap();
    bundle.with(|spec| spec["linux"]["resources"]["memory"] = memory.clone()).unwrap()
}

/// Touches so many MiB at once.
fn touch(mib: u32) -> String {
    format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>/dev/null")
}

#[test]
fn a_container_swaps_as_much_as_it_may() {
    let _swap = HostSwap::new();
    let script = format!(
        "{}; echo $?; {}; echo $?; cat /sys/fs/cgroup/memory.swap.max",
        touch(160),
        touch(400)
    );
    for memory in [
        json!({"limit": 64 * MIB, "swap": 64 * MIB}),
        json!({"limit": 64 * MIB, "swap": 256 * MIB}),
        json!({"limit": 64 * MIB, "swap": -1}),
        json!({"limit": 64 * MIB}),
    ] {
        let [runc, ours] = [Runtime::runc(), Runtime::new()].map(|runtime| {
            let runtime = runtime.unwrap();
            let output = told(&runtime.run("c", &container(&script, &memory)).unwrap());
            runtime.assert_clean().unwrap();
            output
        });
        assert_eq!(ours, runc, "{memory}");
    }
}

#[test]
fn swap_comes_with_an_update_and_what_is_freed_goes_back() {
    let _swap = HostSwap::new();
    let runtime = Runtime::new().unwrap();
    let limits = json!({"limit": 64 * MIB, "swap": 64 * MIB});
    let bundle = container("exec sleep 1000", &limits);
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    let touched = |mib| {
        let script = format!("{}; echo $?", touch(mib));
        runtime.ok(&["exec", "c", "sh", "-c", &script]).unwrap()
    };
    assert_eq!(touched(100), "137\n");
    assert_eq!(fs::read_to_string("/proc/swaps").unwrap().lines().count(), 2);
    let idle = resident(&runtime);
    for (swap, mib) in [("128m", 100), ("192m", 160), ("512m", 400)] {
        runtime.ok(&["update", "--memory-swap", swap, "c"]).unwrap();
        assert_eq!(touched(mib), "0\n", "{swap}");
    }
    let freed = || resident(&runtime) < idle + 80;
    let found = comes_true(Duration::from_secs(60), freed);
    assert!(found, "{} MiB, {idle} MiB before", resident(&runtime));
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn swap_is_limited_and_refused_as_by_runc() {
    let limits = json!({"limit": 64 * MIB, "swap": 96 * MIB});
    let bundle = container("exec sleep 1000", &limits);
    let outcomes = |runtime: Runtime| {
        let mut seen = Vec::new();
        for memory in [
            json!({"limit": 64 * MIB, "swap": 32 * MIB}),
            json!({"swap": 64 * MIB}),
            json!({"limit": -1, "swap": 64 * MIB}),
            json!({"limit": 64 * MIB, "swap": 0}),
            json!({"limit": 0, "swap": -1}),
        ] {
            let bundle = container("cat /sys/fs/cgroup/memory.swap.max", &memory);
            let (status, printed, _) = told(&runtime.run("c", &bundle).unwrap());
            seen.push((memory.to_string(), status, printed));
        }
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        for update in [
            &["--memory", "128m"][..],
            &["--memory-swap", "32m"],
            &["--memory", "128m", "--memory-swap", "160m"],
            &["--memory", "32m"],
            &["--memory-swap", "-1"],
            &["--memory", "-1"],
            &["--memory", "-1", "--memory-swap", "-1"],
            &["--memory", "48m"],
        ] {
            let updated = output(&mut runtime.command(&[&["update"], update, &["c"]].concat()));
            let read = "cd /sys/fs/cgroup; cat memory.max memory.swap.max";
            let limits = runtime.ok(&["exec", "c", "sh", "-c", read]).unwrap();
            seen.push((update.join(" "), updated.unwrap().status.code(), limits));
        }
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
        seen
    };
    let runc = outcomes(Runtime::runc().unwrap());
    assert_eq!(outcomes(Runtime::new().unwrap()), runc);
}
