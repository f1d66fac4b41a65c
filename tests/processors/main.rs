//! Machines with several processors: `update` to more processors than a machine was started with,
//! and a pair of queues for each. Runs in a test host with two processors.
//!
//! Everything here stays on the first processor: on an emulated host, a nested machine that moves
//! between two processors is not reliable (`docs/decisions/0005-test-host.md`).

#![cfg(test)]

use std::process::Command;
use std::thread::available_parallelism;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::netns::{Serving, Wired};
use bulkhead_tests::runtime::{Runtime, told};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::json;

/// Two busy processes, which share one processor or have one each.
const TWO_AT_WORK: &str =
    "count() { n=0; while [ $n -lt 3000 ]; do n=$((n + 1)); done; }; count & count; wait";

/// The clock ticks that each processor of the guest has spent in user mode: proc(5), `stat`.
fn ticks(runtime: &Runtime) -> Vec<u64> {
    let stat = runtime.ok(&["exec", "c", "cat", "/proc/stat"]).unwrap();
    let lines = stat.lines().filter_map(|line| line.strip_prefix("cpu"));
    let each = lines.filter(|line| line.starts_with(|first: char| first.is_ascii_digit()));
    each.map(|line| line.split_whitespace().nth(1).unwrap().parse().unwrap()).collect()
}

fn stay_on_the_first() {
    assert!(available_parallelism().unwrap().get() > 1, "run by cargo xtask test");
    let mut first = CpuSet::new();
    first.set(0);
    sched_setaffinity(None, &first).unwrap();
}

#[test]
fn processors_are_there_when_the_quota_is_raised_and_do_work() {
    stay_on_the_first();
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap().with(|spec| {
        spec["linux"]["resources"] = json!({"cpu": {"quota": 100_000, "period": 100_000}});
    });
    let bundle = bundle.unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    assert_eq!(ticks(&runtime).len(), 1);
    runtime.ok(&["update", "--cpu-quota", "200000", "--cpu-period", "100000", "c"]).unwrap();
    let before = ticks(&runtime);
    assert_eq!(before.len(), 2);
    let worked = runtime.call(&["exec", "c", "sh", "-c", TWO_AT_WORK]).unwrap();
    assert_eq!(told(&worked), (Some(0), String::new(), String::new()));
    let after = ticks(&runtime);
    assert!(
        before.iter().zip(&after).all(|(before, after)| after > before),
        "{before:?} {after:?}"
    );
    // The host has no more processors.
    runtime.ok(&["update", "--cpu-quota", "400000", "--cpu-period", "100000", "c"]).unwrap();
    assert_eq!(ticks(&runtime).len(), 2);
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn without_a_quota_there_are_as_many_as_the_host_has() {
    stay_on_the_first();
    let said = [Runtime::runc(), Runtime::new()].map(|runtime| {
        let runtime = runtime.unwrap();
        let script = "grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/cpu/online";
        let output = told(&runtime.run("c", &Bundle::script(script).unwrap()).unwrap());
        runtime.assert_clean().unwrap();
        output
    });
    assert_eq!(said[0], said[1]);
    assert_eq!(said[0].1, "2\n0-1\n");
}

#[test]
fn an_interface_has_queues_for_each_processor() {
    const TURN: &str = "nc -w 20 10.9.0.1 7 < /tmp/sent | cmp - /tmp/sent && echo same";
    stay_on_the_first();
    let wired = Wired::new().unwrap();
    let mut echo = Command::new("busybox");
    echo.args(["nc", "-ll", "-p", "7", "-e", "cat"]);
    let _echo = Serving::start(echo).unwrap();
    let script = format!(
        "ls /sys/class/net/eth0/queues; seq 100000 > /tmp/sent; \
         for turn in 1 2 3; do {TURN} & done; wait"
    );
    let bundle = wired.pod.of(Bundle::script(&script).unwrap()).unwrap().with(|spec| {
        spec["linux"]["resources"] = json!({"cpu": {"quota": 200_000, "period": 100_000}});
    });
    let bundle = bundle.unwrap();
    for switch in ["1", "0"] {
        let runtime = Runtime::new().unwrap().with("BULKHEAD_VHOST_NET", switch);
        let (status, out, err) = told(&runtime.run("c", &bundle).unwrap());
        assert_eq!(status, Some(0), "{err}");
        assert_eq!(out, "rx-0\nrx-1\ntx-0\ntx-1\nsame\nsame\nsame\n", "{switch} {err}");
        runtime.assert_clean().unwrap();
    }
}
