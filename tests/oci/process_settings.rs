//! Further settings of processes and of the kernel: each is applied, to a container's first process
//! and to further processes, or refused by name. Debian's runc knows few of them.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::Runtime;
use serde_json::{Value, json};

/// The output of a container's first process with these settings, and that of a further process
/// with the same settings.
fn said(pod: &Pod, script: &str, change: impl Fn(&mut Value)) -> [String; 2] {
    let runtime = pod.runtime();
    let first = format!("({script}) > /mnt/said; touch /mnt/done; exec sleep 1000");
    let mut bundle = Bundle::script(&first).unwrap().with(|spec| change(spec)).unwrap();
    pod.take_in(&mut bundle).unwrap();
    runtime.create("set", &bundle).unwrap();
    runtime.ok(&["start", "set"]).unwrap();
    let mut process = bundle.spec["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", script]);
    let file = bundle.path().join("process.json");
    std::fs::write(&file, process.to_string()).unwrap();
    let further = runtime.ok(&["exec", "--process", file.to_str().unwrap(), "set"]).unwrap();
    let wait = "until test -e /mnt/done; do sleep 0.1; done; cat /mnt/said";
    let first = runtime.ok(&["exec", "set", "/bin/sh", "-c", wait]).unwrap();
    runtime.ok(&["delete", "--force", "set"]).unwrap();
    [first, further]
}

/// The error of `create` with these settings.
fn refused(change: impl Fn(&mut Value)) -> String {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("true").unwrap().with(|spec| change(spec)).unwrap();
    let line = ["create", "--bundle", bundle.path().to_str().unwrap(), "set"];
    let errors = runtime.fails(&line).unwrap();
    runtime.assert_clean().unwrap();
    errors
}

#[test]
fn what_is_set_is_kept() {
    let pod = Pod::of(Runtime::new().unwrap()).unwrap();
    a_scheduler_is_kept(&pod);
    an_io_priority_is_kept(&pod);
    clocks_of_a_time_namespace_are_kept(&pod);
    a_personality_is_kept(&pod);
    pod.end().unwrap();
}

fn a_scheduler_is_kept(pod: &Pod) {
    // Fields of proc_pid_stat(5): nice, rt_priority, policy.
    let script = "set -- $(cat /proc/self/stat); shift 18; echo $1 ${22} ${23}";
    for (scheduler, expected) in [
        (json!({"policy": "SCHED_BATCH", "nice": 7}), "7 0 3\n"),
        (json!({"policy": "SCHED_OTHER", "nice": -5}), "-5 0 0\n"),
        (json!({"policy": "SCHED_IDLE"}), "0 0 5\n"),
        (json!({"policy": "SCHED_RR", "priority": 5}), "0 5 2\n"),
        (json!({"policy": "SCHED_FIFO", "priority": 9}), "0 9 1\n"),
    ] {
        let said = said(pod, script, |spec| spec["process"]["scheduler"] = scheduler.clone());
        assert_eq!(said, [expected; 2], "{scheduler}");
    }
}

fn an_io_priority_is_kept(pod: &Pod) {
    for (class, priority, expected) in [
        ("IOPRIO_CLASS_BE", 3, "best-effort: prio 3\n"),
        ("IOPRIO_CLASS_RT", 1, "realtime: prio 1\n"),
        ("IOPRIO_CLASS_IDLE", 0, "idle\n"),
    ] {
        let said = said(pod, "busybox ionice -p $$", |spec| {
            spec["process"]["ioPriority"] = json!({"class": class, "priority": priority});
        });
        assert!(said.iter().all(|said| said.starts_with(expected.trim())), "{class}: {said:?}");
    }
}

fn clocks_of_a_time_namespace_are_kept(pod: &Pod) {
    let script = "cat /proc/self/timens_offsets | tr -s ' '; cut -d. -f1 /proc/uptime";
    let script = script.replace("cut -d. -f1", "sed 's/\\..*//'");
    let [first, further] = said(pod, &script, |spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
        spec["linux"]["timeOffsets"] = json!({
            "monotonic": {"secs": 7000, "nanosecs": 5}, "boottime": {"secs": 1_000_000},
        });
    });
    for said in [first, further] {
        assert!(said.starts_with("monotonic 7000 5\nboottime 1000000 0\n"), "{said}");
        let up: u64 = said.lines().last().unwrap().parse().unwrap();
        assert!((1_000_000..1_100_000).contains(&up), "{said}");
    }
    let errors = refused(|spec| spec["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 1}}));
    assert!(errors.contains("linux.timeOffsets"), "{errors}");
}

fn a_personality_is_kept(pod: &Pod) {
    for (domain, expected) in [("LINUX32", "00000008\n"), ("LINUX", "00000000\n")] {
        let said = said(pod, "cat /proc/self/personality", |spec| {
            spec["linux"]["personality"] = json!({"domain": domain});
        });
        assert_eq!(said, [expected; 2], "{domain}");
    }
}

#[test]
fn what_only_the_host_has_is_refused_by_its_name() {
    let policy = json!({"mode": "MPOL_BIND", "nodes": "0"});
    let errors = refused(|spec| spec["linux"]["memoryPolicy"] = policy.clone());
    assert!(errors.contains("linux.memoryPolicy"), "{errors}");
    let affinity = json!({"initial": "0"});
    let errors = refused(|spec| spec["process"]["execCPUAffinity"] = affinity.clone());
    assert!(errors.contains("process.execCPUAffinity"), "{errors}");
}

#[test]
fn a_further_process_cannot_choose_processors_either() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("set", &bundle).unwrap();
    runtime.ok(&["start", "set"]).unwrap();
    let mut process = bundle.spec["process"].clone();
    process["execCPUAffinity"] = json!({"final": "0"});
    let file = bundle.path().join("process.json");
    std::fs::write(&file, process.to_string()).unwrap();
    let errors = runtime.fails(&["exec", "--process", file.to_str().unwrap(), "set"]).unwrap();
    assert!(errors.contains("process.execCPUAffinity"), "{errors}");
    runtime.ok(&["delete", "--force", "set"]).unwrap();
    runtime.assert_clean().unwrap();
}
