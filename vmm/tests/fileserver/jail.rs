//! What the process gave up.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use bulkhead_vmm::fileserver::config::FsAnswer;

use crate::pod::{JAIL, Pod, Server, THREADS, relay_pair, tmpfs};

fn status(server: &Server) -> String {
    fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap()
}

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{name} in {status}")).split_whitespace().collect()
}

#[test]
fn only_what_serving_files_needs_is_kept() {
    let pod = Pod::new();
    let status = status(&pod.server);
    let (uid, gid) = (JAIL.uid.to_string(), JAIL.gid.to_string());
    assert_eq!(field(&status, "Uid"), [&*uid; 4]);
    assert_eq!(field(&status, "Gid"), [&*gid; 4]);
    assert_eq!(field(&status, "Groups"), [""; 0]);
    // CHOWN DAC_OVERRIDE FOWNER FSETID SETGID SETUID MKNOD SETFCAP.
    let kept = format!("{:016x}", 0b1_1011_u64 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(field(&status, set), [&*kept], "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
    assert_eq!(field(&status, "NSpid").last(), Some(&"1"), "first of its pid namespace");
    let limits = fs::read_to_string(format!("/proc/{}/limits", pod.server.child.id())).unwrap();
    for line in [
        "Max core file size        0                    0",
        "Max processes             0                    0",
    ] {
        assert!(limits.contains(line), "{limits}");
    }
}

#[test]
fn its_namespaces_are_its_own() {
    let pod = Pod::new();
    for name in ["mnt", "net", "ipc", "uts", "pid"] {
        let theirs = fs::read_link(format!("/proc/{}/ns/{name}", pod.server.child.id())).unwrap();
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(theirs, ours);
    }
}

#[test]
fn its_root_holds_what_was_attached_and_nothing_else() {
    let pod = Pod::new();
    let root = format!("/proc/{}/root", pod.server.child.id());
    let names: Vec<_> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["c"]);
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", pod.server.child.id())).unwrap();
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
    assert!(fs::create_dir(pod.root.join("new")).is_err(), "the root of the share is read-only");
}

#[test]
fn it_holds_no_other_descriptors() {
    let pod = Pod::new();
    let mut kinds: Vec<String> = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", pod.server.child.id())).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        kinds.push(target.to_string_lossy().split(':').next().unwrap().to_owned());
    }
    let sockets = kinds.iter().filter(|kind| *kind == "socket").count();
    assert_eq!(sockets, 2, "control and relay: {kinds:?}");
    // The procfs directory, standard streams, and what the guest remembers.
    let allowed = |kind: &str| kind.starts_with('/') || matches!(kind, "socket" | "pipe");
    assert!(kinds.iter().all(|kind| allowed(kind)), "{kinds:?}");
    assert!(kinds.len() < 16, "{kinds:?}");
}

#[test]
fn it_serves_on_as_many_threads_as_asked() {
    let pod = Pod::new();
    let tasks = fs::read_dir(format!("/proc/{}/task", pod.server.child.id())).unwrap().count();
    // The main thread, and those for locks, watches and FIFOs.
    assert_eq!(tasks, usize::from(THREADS) + 4);
}

#[test]
fn the_end_of_the_control_socket_is_its_end() {
    let mut pod = Pod::new();
    pod.server.hang_up();
    for _ in 0..100 {
        if let Some(status) = pod.server.child.try_wait().unwrap() {
            return assert!(status.success());
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("still there");
}

#[test]
fn a_configuration_that_cannot_be_used_is_answered_with_the_field() {
    let (relay, _ours) = relay_pair();
    let share = tmpfs();
    let descriptors = [share.as_fd(), relay.as_fd()];
    let cases = [
        (
            r#"{"version":9,"jail":{"uid":1,"gid":1},"threads":1,"sockets":true}"#,
            "field version: is 9",
        ),
        (
            r#"{"version":3,"jail":{"uid":0,"gid":1},"threads":1,"sockets":true}"#,
            "field jail.uid: 0 is not",
        ),
        ("nonsense", "field (message): expected"),
    ];
    for (config, expected) in cases {
        let mut server = Server::spawn(None);
        let FsAnswer::Error(reason) = server.configure(config.as_bytes(), &descriptors) else {
            panic!("accepted {config}");
        };
        assert!(reason.contains(expected), "{reason}");
        assert!(!server.child.wait().unwrap().success());
    }
}

#[test]
fn the_guest_finds_no_procfs_and_no_way_up() {
    let pod = Pod::new();
    assert!(!pod.root.join("proc").exists());
    std::os::unix::fs::symlink("/proc/self/root", pod.guest.join("up")).unwrap();
    // The guest follows the link; the server opens only the link itself.
    assert_eq!(fs::read_link(pod.guest.join("up")).unwrap(), Path::new("/proc/self/root"));
}
