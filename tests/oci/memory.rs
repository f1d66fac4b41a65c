//! What a container may use and assume of memory, beside runc: without a limit, what the host has.

use std::fs;
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, told};
use serde_json::{Value, json};

use crate::growth::resident;

/// Lines of a container's output by their first word.
fn number(output: &str, name: &str) -> u64 {
    let line = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.unwrap_or_else(|| panic!("no {name} in {output}")).parse().unwrap()
}

/// Runs a script under runc and here, with a tmpfs at `/t` and 512 MiB of `/dev/shm`.
fn beside_runc(resources: &Value, script: &str) -> [(Option<i32>, String, String); 2] {
    [Runtime::runc(), Runtime::new()].map(|runtime| {
        let runtime = runtime.unwrap();
        let tmpfs = |at: &str, options: &[&str]| {
            json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options})
        };
        let bundle = Bundle::script(script).unwrap();
        let bundle = bundle.with(|spec| spec["linux"]["resources"] = resources.clone()).unwrap();
        let bundle = bundle.mount(tmpfs("/t", &["nosuid"])).unwrap();
        let bundle = bundle.mount(tmpfs("/shm", &["size=512m"])).unwrap();
        let output = told(&runtime.run("c", &bundle).unwrap());
        runtime.assert_clean().unwrap();
        output
    })
}

/// The host's memory, in KiB.
fn host_total() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    number(&meminfo, "MemTotal:")
}

#[test]
fn without_a_limit_memory_is_there_as_on_the_host() {
    let script = "
        dd if=/dev/zero of=/dev/null bs=600M count=1 2>/dev/null; echo buffer $?
        dd if=/dev/zero of=/dev/null bs=2048M count=0 2>/dev/null; echo reserved $?
        dd if=/dev/zero of=/t/f bs=1M count=300 2>/dev/null; echo tmpfs $?
        rm /t/f
        dd if=/dev/zero of=/shm/f bs=1M count=400 2>/dev/null; echo shm $?
        rm /shm/f
        for i in 1 2 3; do dd if=/dev/zero of=/dev/null bs=300M count=2 2>/dev/null & done
        for i in 1 2 3; do wait -n; echo $?; done
        cat /sys/fs/cgroup/memory.max
        nproc";
    let [runc, ours] = beside_runc(&json!({}), script);
    assert_eq!(ours, runc);
    assert!(runc.1.starts_with("buffer 0\nreserved 0\ntmpfs 0\nshm 0\n0\n0\n0\n"), "{runc:?}");
}

#[test]
fn programs_size_themselves_by_the_hosts_memory_or_their_limit() {
    let script = "
        echo total $(grep MemTotal: /proc/meminfo | grep -o '[0-9]*')
        echo available $(grep MemAvailable: /proc/meminfo | grep -o '[0-9]*')
        echo sysinfo $(free -k | grep Mem: | tr -s ' ' | cut -d' ' -f2)
        echo tmpfs $(df -k /t | tail -n 1 | tr -s ' ' | cut -d' ' -f2)
        dd if=/dev/zero of=/dev/null bs=1024M count=0 2>/dev/null; echo reserved $?";
    let [runc, ours] = beside_runc(&json!({}), script).map(|(status, output, errors)| {
        assert_eq!((status, errors.as_str()), (Some(0), ""), "{output}");
        output
    });
    // The size crosses in whole MiB.
    for name in ["total", "sysinfo", "tmpfs"] {
        let (theirs, found) = (number(&runc, name), number(&ours, name));
        assert!(theirs.abs_diff(found) <= 1024, "{name}: {found}, under runc {theirs}");
    }
    assert!(number(&ours, "available") > host_total() / 2, "{ours}");
    assert_eq!(number(&ours, "reserved"), 0);

    let [_, limited] = beside_runc(&json!({"memory": {"limit": 128 << 20}}), script);
    let total = number(&limited.1, "total");
    assert!((128 << 10..280 << 10).contains(&total), "{limited:?}");
    // Reserving is not using.
    assert_eq!(number(&limited.1, "reserved"), 0);
}

#[test]
fn a_machine_grows_for_programs_and_gives_back_what_they_leave() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("exec sleep 1000").unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    let idle = resident(&runtime);
    let plugged = || runtime.ok(&["exec", "c", "grep", "managed", "/proc/zoneinfo"]).unwrap();
    let small = plugged();
    let caches = "dd if=/dev/zero of=/f bs=1M count=250 2>/dev/null; cat /f > /dev/null; rm /f";
    runtime.ok(&["exec", "c", "sh", "-c", caches]).unwrap();
    assert_eq!(plugged(), small, "caches alone do not make a machine larger");
    let used = ["exec", "c", "dd", "if=/dev/zero", "of=/dev/null", "bs=400M", "count=1"];
    runtime.ok(&used).unwrap();
    assert!(
        comes_true(Duration::from_secs(60), || resident(&runtime) < idle + 80),
        "{} MiB are not given back, {idle} MiB were taken before",
        resident(&runtime)
    );
    assert_ne!(plugged(), small);
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// As PostgreSQL recommends it: vm.overcommit_memory is 2.
#[test]
fn where_the_host_refuses_overcommit_a_container_may_commit_as_much() {
    let mode = "/proc/sys/vm/overcommit_memory";
    let before = fs::read_to_string(mode).unwrap();
    fs::write(mode, "2").unwrap();
    let script = "
        cat /proc/sys/vm/overcommit_memory
        dd if=/dev/zero of=/dev/null bs=1024M count=1 2>/dev/null; echo used $?
        dd if=/dev/zero of=/dev/null bs=2047M count=0 2>/dev/null; echo reserved $?
        for i in 1 2 3 4 5 6; do dd if=/dev/zero of=/dev/null bs=2047M count=0 2>/dev/null; done
        (ulimit -v unlimited; dd if=/dev/zero of=/dev/null bs=12G count=0 2>/dev/null); echo too much $?";
    let [runc, ours] = beside_runc(&json!({}), script);
    fs::write(mode, before).unwrap();
    assert_eq!(ours, runc);
    assert_eq!(runc.1, "2\nused 0\nreserved 0\ntoo much 1\n");
}

/// runc refuses these, because they would be the host's.
#[test]
fn a_container_may_have_settings_of_its_machine() {
    let host = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("cat /proc/sys/vm/max_map_count /proc/sys/fs/aio-max-nr").unwrap();
    let settings = json!({"vm.max_map_count": "262145", "fs.aio-max-nr": "70001"});
    let bundle = bundle.with(|spec| spec["linux"]["sysctl"] = settings).unwrap();
    let output = told(&runtime.run("c", &bundle).unwrap());
    assert_eq!(output, (Some(0), "262145\n70001\n".to_owned(), String::new()));
    assert_eq!(fs::read_to_string("/proc/sys/vm/max_map_count").unwrap(), host);
    let bundle = bundle.with(|spec| spec["linux"]["sysctl"] = json!({"vm.no_such": "1"})).unwrap();
    let errors = runtime.fails(&["run", "--bundle", bundle.path().to_str().unwrap(), "c"]).unwrap();
    assert!(errors.contains("no_such"), "{errors}");
    runtime.assert_clean().unwrap();
}

#[test]
fn settings_without_a_namespace_are_the_hosts() {
    const NAMES: [&str; 12] = [
        "vm/max_map_count",
        "vm/overcommit_memory",
        "vm/swappiness",
        "fs/aio-max-nr",
        "fs/file-max",
        "fs/inotify/max_user_instances",
        "fs/inotify/max_user_watches",
        "fs/nr_open",
        "fs/pipe-max-size",
        "kernel/core_pattern",
        "kernel/pid_max",
        "kernel/threads-max",
    ];
    // What a host sets for databases and search engines.
    let changes = [("vm/max_map_count", "262144"), ("fs/inotify/max_user_instances", "1024")];
    let path = |name: &str| format!("/proc/sys/{name}");
    let before = changes.map(|(name, _)| (name, fs::read_to_string(path(name)).unwrap()));
    changes.iter().for_each(|(name, value)| fs::write(path(name), value).unwrap());
    let script = format!("cd /proc/sys; for name in {}; do cat $name; done", NAMES.join(" "));
    let [runc, ours] = beside_runc(&json!({}), &script);
    before.iter().for_each(|(name, value)| fs::write(path(name), value).unwrap());
    assert_eq!(ours, runc);
    assert!(runc.1.starts_with("262144\n"), "{runc:?}");
}
