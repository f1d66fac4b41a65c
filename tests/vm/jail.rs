//! The monitor's jail while a guest runs, as the host's `/proc` shows it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_protocol::AGENT_PORT;
use bulkhead_tests::runtime::comes_true;
use bulkhead_tests::vm::{JAIL_ID, Options, TestVm};

/// A machine whose guest runs, and a stream to its agent.
fn running() -> (TestVm, UnixStream) {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    let stream = vm.open_stream(AGENT_PORT, Duration::from_secs(30)).unwrap();
    (vm, stream)
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim()
}

#[test]
fn the_monitor_has_no_identity_and_no_right() {
    let (vm, _stream) = running();
    let status = vm.proc("status").unwrap();
    let id = JAIL_ID.to_string();
    for name in ["Uid:", "Gid:"] {
        let ids: Vec<_> = field(&status, name).split_whitespace().collect();
        assert_eq!(ids, [id.as_str(); 4], "real, effective, saved and of the file system");
    }
    assert_eq!(field(&status, "Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs:"), "1");
}

#[test]
fn the_monitor_shares_no_namespace_with_the_host_that_it_could_leave() {
    let (vm, _stream) = running();
    for kind in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of(&vm.pid().to_string()), of("self"), "{kind}");
    }
}

#[test]
fn the_monitor_sees_an_empty_root() {
    let (vm, _stream) = running();
    let root = format!("/proc/{}/root", vm.pid());
    assert_eq!(fs::read_dir(root).unwrap().count(), 0);
    let mounts = vm.proc("mountinfo").unwrap();
    let [root] = mounts.lines().collect::<Vec<_>>()[..] else { panic!("{mounts}") };
    // proc_pid_mountinfo(5): the fifth field is the mount point, the sixth the options.
    let fields: Vec<_> = root.split(' ').collect();
    assert_eq!(fields[4], "/");
    let options: Vec<_> = fields[5].split(',').collect();
    assert!(["ro", "nosuid", "nodev", "noexec"].iter().all(|it| options.contains(it)), "{root}");
}

/// How many descriptors of each kind a machine's monitor has, without the standard streams.
fn held(vm: &TestVm) -> BTreeMap<String, usize> {
    let mut held = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap() {
        let entry = entry.unwrap();
        if matches!(entry.file_name().to_str(), Some("0" | "1" | "2")) {
            continue;
        }
        // The descriptor may be closed meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        // Leave out the numbers of sockets and the former names of deleted files.
        let kind = match target.split_once(':') {
            Some(("socket", _)) => "socket",
            None if target.ends_with(" (deleted)") => "file without a name",
            _ => &target,
        };
        *held.entry(kind.to_owned()).or_insert(0) += 1;
    }
    held
}

#[test]
fn the_monitor_holds_only_what_it_was_handed() {
    let (vm, _stream) = running();
    let expected = [
        // The VM and its vCPU, but not /dev/kvm itself.
        ("anon_inode:kvm-vm", 1),
        ("anon_inode:kvm-vcpu:0", 1),
        // The event loops of the monitor and of two devices, and the timer of one.
        ("anon_inode:[eventpoll]", 3),
        ("anon_inode:[timerfd]", 1),
        // The control socket, and the stream that was opened.
        ("socket", 2),
        // The console's log. Kernel and initramfs are closed.
        ("file without a name", 1),
        ("/dev/urandom", 1),
    ];
    let expected = BTreeMap::from(expected.map(|(kind, count)| (kind.to_owned(), count)));
    let without_events = || {
        let mut held = held(&vm);
        // Any number of eventfds: no other process can use them.
        assert!(held.remove("anon_inode:[eventfd]").is_some_and(|count| count > 0));
        held
    };
    // Descriptors that the boot needed are closed soon afterwards.
    comes_true(Duration::from_secs(10), || without_events() == expected);
    assert_eq!(without_events(), expected);
}
