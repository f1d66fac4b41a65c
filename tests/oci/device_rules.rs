//! Device rules, beside runc: what a container may do with a device that is not among its default
//! devices.

use std::fs;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

/// `/dev/kmsg`: both kernels have it, and no container has it by default.
const LOG: (i64, i64) = (1, 11);
/// Opens the device in every way, and makes device nodes.
const PROBE: &str = "try() { (eval \"$2\") > /dev/null 2>&1; echo $1 $?; }; \
    try read ': < /dev/log'; try write ': > /dev/log'; try both ': 1<> /dev/log'; \
    try make 'mknod /mnt/log c 1 11'; try disk 'mknod /mnt/disk b 7 0'; try null ': 1<> /dev/null'; \
    try tty ': 1<> /dev/ptmx'";

fn rule(allow: bool, kind: &str, (major, minor): (i64, i64), access: &str) -> Value {
    let mut rule = json!({"allow": allow, "type": kind, "access": access});
    // -1 means any number.
    for (name, number) in [("major", major), ("minor", minor)] {
        if number != -1 {
            rule[name] = json!(number);
        }
    }
    rule
}

fn log(allow: bool, access: &str) -> Value {
    rule(allow, "c", LOG, access)
}

fn all(allow: bool) -> Value {
    json!({"allow": allow, "access": "rwm"})
}

fn lists() -> Vec<(&'static str, Vec<Value>)> {
    vec![
        ("nothing", vec![]),
        ("read", vec![all(false), log(true, "r")]),
        ("both", vec![all(false), log(true, "rw")]),
        ("both and more", vec![all(false), log(true, "rwa")]),
        ("one after the other", vec![all(false), log(true, "r"), log(true, "w")]),
        ("taken away", vec![all(false), log(true, "rwm"), log(false, "w")]),
        ("any minor", vec![all(false), rule(true, "c", (1, -1), "r")]),
        ("any major", vec![all(false), rule(true, "c", (-1, 11), "w")]),
        ("a hole elsewhere", vec![rule(true, "c", (1, -1), "r"), log(false, "w")]),
        ("all but writing", vec![all(true), log(false, "w")]),
        ("all but it", vec![all(true), log(false, "rwm")]),
        ("all but it, but reading", vec![all(true), log(false, "rwm"), log(true, "r")]),
        ("null is everybody's", vec![all(false), rule(false, "c", (1, 3), "rwm")]),
        ("all but null, which is everybody's", vec![all(true), rule(false, "c", (1, 3), "rwm")]),
    ]
}

fn bundle(rules: &[Value]) -> Bundle {
    let mut bundle = Bundle::script(PROBE).unwrap();
    bundle.spec["linux"]["resources"]["devices"] = json!(rules);
    bundle.spec["linux"]["devices"] = json!([
        {"path": "/dev/log", "type": "c", "major": LOG.0, "minor": LOG.1, "fileMode": 0o666},
    ]);
    bundle.with_capability("CAP_SYSLOG").unwrap()
}

/// With rules that allow all devices but one, a container can still make a node of that one,
/// `docs/COMPATIBILITY.md`.
const MADE_ANYWAY: [&str; 2] = ["all but it", "all but it, but reading"];

#[test]
fn rules_mean_what_they_mean_to_runc() {
    let pods = Pod::beside_runc().unwrap();
    for (name, rules) in lists() {
        let [ours, mut theirs] = pods.each_ref().map(|pod| {
            let mut bundle = bundle(&rules);
            let told = told(&pod.run("ruled", &mut bundle).unwrap());
            assert!(!fs::exists(bundle.rootfs().join("dev/log")).unwrap());
            told
        });
        if MADE_ANYWAY.contains(&name) {
            assert!(theirs.1.contains("make 1\n"), "{name}: {theirs:?}");
            theirs.1 = theirs.1.replace("make 1\n", "make 0\n");
        }
        assert_eq!(ours, theirs, "{name}");
        assert_eq!(ours.0, Some(0), "{name}: {ours:?}");
    }
    Pod::end_all(pods).unwrap();
}

#[test]
fn a_container_without_resources_has_the_devices_of_everybody() {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let mut bundle = bundle(&[]);
        bundle.spec["linux"].as_object_mut().unwrap().remove("resources");
        bundle.write().unwrap();
        let told = told(&runtime.run("ruled", &bundle).unwrap());
        runtime.assert_clean().unwrap();
        told
    });
    assert_eq!(ours, theirs);
    assert!(ours.1.starts_with("read 1\nwrite 1\n"), "{ours:?}");
}

#[test]
fn rules_that_runc_refuses_are_refused() {
    for (words, rules) in [
        ("device access at 1 field cannot be empty", vec![all(false), log(true, "")]),
        ("hole", vec![rule(true, "c", (1, -1), "rw"), log(false, "w")]),
    ] {
        for runtime in [Runtime::new().unwrap(), Runtime::runc().unwrap()] {
            let (status, output, errors) = told(&runtime.run("ruled", &bundle(&rules)).unwrap());
            assert_eq!(status, Some(1), "{output}");
            assert!(errors.contains(words), "{errors}");
            runtime.assert_clean().unwrap();
        }
    }
}
