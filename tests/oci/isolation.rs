//! The wall: a container has a kernel of its own and sees no other pod.

use std::fs;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, finish};

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
