//! Any process of a pod may be killed with -9: nothing is left after `delete --force`, and nothing
//! else is affected.

use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, expect_output, kill_9};

fn killing(program: &str) {
    let neighbours = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    let other = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    neighbours.create("neighbour", &other).unwrap();
    neighbours.ok(&["start", "neighbour"]).unwrap();
    // Cgroups that exist before this are not counted as left behind.
    let runtime = Runtime::new().unwrap();
    runtime.create("victim", &bundle).unwrap();
    runtime.ok(&["start", "victim"]).unwrap();

    let victims = runtime.processes(program).unwrap();
    assert_eq!(victims.len(), 1, "processes called {program}: {victims:?}");
    kill_9(victims[0]).unwrap();
    std::thread::sleep(Duration::from_millis(500));

    runtime.ok(&["delete", "--force", "victim"]).unwrap();
    runtime.fails(&["state", "victim"]).unwrap();
    runtime.assert_clean().unwrap();
    assert_eq!(neighbours.state("neighbour").unwrap()["status"], "running");
    neighbours.ok(&["delete", "--force", "neighbour"]).unwrap();
    neighbours.assert_clean().unwrap();
}

#[test]
fn the_monitor_killed_leaves_nothing() {
    killing("bulkhead-vmm");
}

#[test]
fn the_file_server_killed_leaves_nothing() {
    killing("bulkhead-fs");
}

#[test]
fn the_supervisor_killed_leaves_nothing() {
    killing(" supervise");
}

/// With a stopped monitor, the guest and its agent never answer again. The agent itself cannot be
/// killed from inside: the guest's kernel protects its PID 1.
#[test]
fn a_guest_that_never_answers_again_does_not_hang_delete() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("frozen", &bundle).unwrap();
    runtime.ok(&["start", "frozen"]).unwrap();
    let monitor = runtime.processes("bulkhead-vmm").unwrap();
    assert_eq!(monitor.len(), 1, "{monitor:?}");
    let pid = rustix::process::Pid::from_raw(i32::try_from(monitor[0]).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let started = std::time::Instant::now();
    runtime.ok(&["delete", "--force", "frozen"]).unwrap();
    assert!(started.elapsed() < Duration::from_secs(30), "took {:?}", started.elapsed());
    runtime.assert_clean().unwrap();
}

#[test]
fn a_machine_whose_container_kills_everything_it_can_leaves_nothing() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("kill -9 -1; sleep 1000").unwrap();
    runtime.create("self", &bundle).unwrap();
    runtime.ok(&["start", "self"]).unwrap();
    runtime.ok(&["delete", "--force", "self"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn run_killed_takes_its_container_along() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("echo up; exec sleep 1000").unwrap();
    let mut child = runtime.spawn_run("orphan", &bundle).unwrap();
    expect_output(&mut child, "up\n").unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    runtime.ok(&["delete", "--force", "orphan"]).unwrap();
    runtime.assert_clean().unwrap();
}
