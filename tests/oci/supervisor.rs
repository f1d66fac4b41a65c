//! A supervisor that ends while a caller waits for it: the error says how it ended.

use std::process::Stdio;
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, finish, message, signal};
use rustix::process::Signal;
use serde_json::json;

/// Kills the supervisor with this signal while it waits for a hook; returns the output of `run`.
fn killed(by: Signal) -> String {
    let runtime = Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let reached = directory.path().join("reached");
    let script = format!("touch {}; exec sleep 1000", reached.display());
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    let bundle = Bundle::new(&["true"]).unwrap();
    let bundle = bundle.with(|spec| spec["hooks"] = json!({"createRuntime": hook})).unwrap();
    let mut command = runtime.run_command("struck", &bundle);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(comes_true(Duration::from_secs(60), || reached.exists()), "no hook has run");
    signal(runtime.supervisor().unwrap(), by).unwrap();
    let output = finish(child).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    runtime.assert_clean().unwrap();
    message(&String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_signal_that_kills_it_is_named() {
    let words = killed(Signal::KILL);
    assert!(words.starts_with("the pod's supervisor was killed by signal 9"), "{words}");
    assert_eq!(killed(Signal::TERM), "the pod's supervisor was killed by signal 15");
}

/// Callers of runc know this message; they do not know a supervisor.
#[test]
fn a_signal_for_a_container_that_ends_with_its_supervisor_meets_nobody() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["sleep", "1000"]).unwrap();
    runtime.create("struck", &bundle).unwrap();
    runtime.ok(&["start", "struck"]).unwrap();
    let supervisor = runtime.supervisor().unwrap();
    signal(supervisor, Signal::STOP).unwrap();
    let mut waiting = runtime.command(&["kill", "struck", "TERM"]);
    let waiting = waiting.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    signal(supervisor, Signal::KILL).unwrap();
    let told = finish(waiting).unwrap();
    assert_eq!(told.status.code(), Some(1), "{told:?}");
    let words = message(&String::from_utf8(told.stderr).unwrap());
    assert_eq!(words, "container not running");
    runtime.ok(&["delete", "--force", "struck"]).unwrap();
    runtime.assert_clean().unwrap();
}
