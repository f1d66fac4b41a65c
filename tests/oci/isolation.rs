//! Isolation: a container has a kernel of its own and sees no other pod.

use std::fs;
use std::process::{Command, Stdio};

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, expect_output, finish};

fn output(runtime: &Runtime, id: &str, script: &str) -> String {
    let output = runtime.run(id, &Bundle::script(script).unwrap()).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_kernel_is_not_the_host_s() {
    let runtime = Runtime::new().unwrap();
    let host = fs::read_to_string("/proc/version").unwrap();
    let guest = output(&runtime, "kernel", "cat /proc/version /proc/cmdline");
    assert!(!guest.contains(host.trim()), "{guest}");
    assert!(guest.contains("virtio_mmio.device"), "{guest}");
}

#[test]
fn two_machines_at_once_cannot_see_each_other() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("echo up; cat > /tmp/held; ps; ls /tmp; hostname").unwrap();
    let mut first = runtime.spawn_run("first", &bundle).unwrap();
    let other = output(&runtime, "second", "ps; ls /tmp; ls /run");
    assert!(!other.contains("held"), "{other}");
    drop(first.stdin.take());
    let first = finish(first).unwrap();
    assert!(first.status.success());
    assert!(String::from_utf8_lossy(&first.stdout).contains("held"));
    runtime.assert_clean().unwrap();
}

#[test]
fn no_mount_of_a_running_container_is_in_the_host_s_namespace() {
    let runtime = Runtime::new().unwrap();
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("mounts", &bundle).unwrap();
    let during = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(before.lines().count(), during.lines().count(), "{during}");
    runtime.ok(&["delete", "--force", "mounts"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// The process ID that Docker or a pid file shows for a container is that of a host process.
#[test]
fn whoever_enters_the_namespaces_of_a_stand_in_finds_nothing() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("behind", &bundle).unwrap();
    runtime.ok(&["start", "behind"]).unwrap();
    let file = bundle.path().join("pid");
    let options = ["exec", "-d", "--pid-file", file.to_str().unwrap(), "behind", "sleep", "1000"];
    // The process that stays would keep a pipe of this test open.
    let mut further = runtime.command(&options);
    assert!(further.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let other = Bundle::script("echo up; exec sleep 1000").unwrap();
    let mut run = runtime.spawn_run("front", &other).unwrap();
    expect_output(&mut run, "up\n").unwrap();
    let mut exec = runtime.command(&["exec", "front", "sh", "-c", "echo up; exec sleep 1000"]);
    let mut exec = exec.stdout(Stdio::piped()).spawn().unwrap();
    expect_output(&mut exec, "up\n").unwrap();
    let number = |id: &str| runtime.state(id).unwrap()["pid"].to_string();
    let further = fs::read_to_string(&file).unwrap();
    for pid in [number("behind"), further, number("front"), exec.id().to_string()] {
        let root = fs::read_dir(format!("/proc/{pid}/root")).unwrap();
        assert_eq!(root.count(), 0, "{pid} shows files of the host");
        for kind in ["mnt", "ipc", "uts"] {
            let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            assert_ne!(namespace(&pid), namespace("self"), "{kind} of {pid}");
        }
        let entered =
            Command::new("nsenter").args(["--mount", "--target", &pid, "/bin/true"]).output();
        assert!(!entered.unwrap().status.success(), "a program of the host runs in {pid}");
        let written = fs::write(format!("/proc/{pid}/root/file"), "");
        assert!(written.is_err(), "a file was left in {pid}");
    }
    for id in ["behind", "front"] {
        runtime.ok(&["delete", "--force", id]).unwrap();
    }
    finish(run).unwrap();
    finish(exec).unwrap();
    runtime.assert_clean().unwrap();
}
