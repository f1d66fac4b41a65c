//! What the monitor is while a guest runs, as the host's kernel sees it.

use std::fs;
use std::time::Duration;

use bulkhead_protocol::AGENT_PORT;
use bulkhead_tests::vm::{JAIL_ID, Options, TestVm};

fn running() -> TestVm {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    vm.open_stream(AGENT_PORT, Duration::from_secs(30)).unwrap();
    vm
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line[name.len()..].trim()
}

#[test]
fn the_monitor_has_no_identity_and_no_right() {
    let vm = running();
    let status = vm.proc("status").unwrap();
    let id = JAIL_ID.to_string();
    for name in ["Uid:", "Gid:"] {
        assert!(field(&status, name).split_whitespace().all(|value| value == id), "{status}");
    }
    assert_eq!(field(&status, "Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs:"), "1");
}

#[test]
fn the_monitor_shares_no_namespace_with_the_host_that_it_could_leave() {
    let vm = running();
    for kind in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of(&vm.pid().to_string()), of("self"), "{kind}");
    }
}

#[test]
fn the_monitor_sees_an_empty_root() {
    let vm = running();
    let root = format!("/proc/{}/root", vm.pid());
    assert_eq!(fs::read_dir(root).unwrap().count(), 0);
    let mounts = vm.proc("mountinfo").unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" ro,") || mounts.contains(" ro "), "{mounts}");
}

#[test]
fn the_monitor_holds_only_what_it_was_handed() {
    let vm = running();
    let directory = format!("/proc/{}/fd", vm.pid());
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        // One that was closed meanwhile is not held.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        let standard = matches!(entry.file_name().to_str(), Some("0" | "1" | "2"));
        let expected = target.starts_with("anon_inode:")
            || target.starts_with("socket:")
            || target.ends_with("(deleted)")
            || target == "/dev/urandom";
        assert!(standard || expected, "{:?} is {target}", entry.file_name());
    }
}
