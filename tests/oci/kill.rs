//! Killed with -9, whichever it is: nothing is left after `delete --force`, and nobody else is hurt.

use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, kill_9};

fn killing(program: &str) {
    let runtime = Runtime::new().unwrap();
    let neighbours = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    let other = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    neighbours.create("neighbour", &other).unwrap();
    neighbours.ok(&["start", "neighbour"]).unwrap();
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
    let mut ready = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    runtime.wait_for_status("orphan", "stopped").unwrap();
    runtime.ok(&["delete", "--force", "orphan"]).unwrap();
    runtime.assert_clean().unwrap();
}
