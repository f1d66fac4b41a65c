//! `linux.resources.unified` and the controllers of a container's own cgroup, beside runc.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

/// Runs the same bundle with these `unified` entries under both runtimes.
fn both(script: &str, unified: &Value) -> [(Option<i32>, String, String); 2] {
    [Runtime::new().unwrap(), Runtime::runc().unwrap()].map(|runtime| {
        let bundle = Bundle::script(script).unwrap();
        let bundle = bundle.with(|spec| spec["linux"]["resources"]["unified"] = unified.clone());
        let told = told(&runtime.run("unified", &bundle.unwrap()).unwrap());
        runtime.assert_clean().unwrap();
        told
    })
}

#[test]
fn a_container_has_the_controllers_that_it_has_under_runc() {
    let script = "cd /sys/fs/cgroup; for name in cpu.weight cpuset.cpus hugetlb.2MB.max io.stat \
        memory.max misc.max misc.current pids.max; do test -e $name; echo $name $?; done";
    let [ours, theirs] = both(script, &json!({}));
    assert_eq!(ours, theirs);
    assert!(ours.1.contains("misc.max 0\n"), "{ours:?}");
}

#[test]
fn files_are_written_as_they_are() {
    let files = json!({
        "memory.high": "50000000", "pids.max": "55", "cpu.weight": "77", "memory.oom.group": "1",
        "cgroup.max.depth": "3", "cpu.max": "90000 100000", "memory.low": "",
    });
    let script = "cd /sys/fs/cgroup; for name in memory.high pids.max cpu.weight memory.oom.group \
        cgroup.max.depth cpu.max memory.low; do echo $name $(cat $name); done";
    let [ours, theirs] = both(script, &files);
    assert_eq!(ours, theirs);
    assert_eq!(ours.0, Some(0), "{ours:?}");
}

#[test]
fn files_that_are_not_there_are_named() {
    for (name, value) in [
        ("nosuch.file", "1"),
        ("memory.nosuch", "1"),
        ("memory.high", "much"),
        ("memory/high", "1"),
        ("plain", "1"),
    ] {
        let told = both("true", &json!({name: value}));
        for (status, _, errors) in &told {
            assert_eq!(*status, Some(1), "{name}: {told:?}");
            assert!(errors.contains(name), "{name}: {told:?}");
        }
    }
}
