//! The commands, in the order in which Docker and containerd use them.

use std::fs;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, expect_output, finish};

#[test]
fn create_start_kill_delete_walk_through_the_states() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("walk", &bundle).unwrap();
    let state = runtime.state("walk").unwrap();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], "walk");
    assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
    let pid = state["pid"].as_u64().unwrap();
    assert!(fs::exists(format!("/proc/{pid}")).unwrap(), "the stand-in does not run");

    runtime.ok(&["start", "walk"]).unwrap();
    assert_eq!(runtime.state("walk").unwrap()["status"], "running");
    let refusal = runtime.fails(&["delete", "walk"]).unwrap();
    assert!(refusal.contains("walk"), "{refusal}");

    runtime.ok(&["kill", "walk", "KILL"]).unwrap();
    runtime.wait_for_status("walk", "stopped").unwrap();
    runtime.ok(&["delete", "walk"]).unwrap();
    runtime.fails(&["state", "walk"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_created_container_has_not_run_anything() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("echo ran > /root/ran").unwrap();
    runtime.create("wait", &bundle).unwrap();
    assert!(!bundle.rootfs().join("root/ran").exists());
    runtime.ok(&["start", "wait"]).unwrap();
    runtime.wait_for_status("wait", "stopped").unwrap();
    assert_eq!(fs::read_to_string(bundle.rootfs().join("root/ran")).unwrap(), "ran\n");
    runtime.ok(&["delete", "wait"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn list_shows_what_is_there() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("listed", &bundle).unwrap();
    assert_eq!(runtime.ok(&["list", "--quiet"]).unwrap(), "listed\n");
    let table = runtime.ok(&["list"]).unwrap();
    assert!(table.starts_with("ID"), "{table}");
    assert!(table.contains("created"), "{table}");
    runtime.ok(&["delete", "--force", "listed"]).unwrap();
    assert_eq!(runtime.ok(&["list", "-q"]).unwrap(), "");
}

#[test]
fn a_signal_to_run_reaches_the_container() {
    let runtime = Runtime::new().unwrap();
    let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 1; done";
    let bundle = Bundle::script(script).unwrap();
    let mut child = runtime.spawn_run("signal", &bundle).unwrap();
    expect_output(&mut child, "ready\n").unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = finish(child).unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"caught\n");
    runtime.assert_clean().unwrap();
}

#[test]
fn the_pid_file_names_the_process_that_stands_for_the_container() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    let file = bundle.path().join("pid");
    let mut command = runtime.command(&["create", "--bundle"]);
    command.arg(bundle.path()).arg("--pid-file").arg(&file).arg("pidfile");
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    assert!(command.status().unwrap().success());
    let pid: u64 = fs::read_to_string(&file).unwrap().parse().unwrap();
    assert_eq!(runtime.state("pidfile").unwrap()["pid"], pid);
    runtime.ok(&["delete", "-f", "pidfile"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn spec_writes_a_configuration_that_runs() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["true"]).unwrap();
    fs::remove_file(bundle.path().join("config.json")).unwrap();
    let path = bundle.path().to_str().unwrap();
    runtime.ok(&["spec", "--bundle", path]).unwrap();
    let text = fs::read_to_string(bundle.path().join("config.json")).unwrap();
    let spec: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(spec["process"]["args"][0], "sh");
    let again = runtime.fails(&["spec", "--bundle", path]).unwrap();
    assert!(again.contains("config.json"), "{again}");
}
