//! Hooks on the host, beside runc.

use std::fs;
use std::path::Path;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;
use serde_json::{Value, json};

/// A hook that writes its kind, the container's status, and whether the container's process has the
/// host's network.
fn hook(kind: &str, log: &Path, status: u8) -> Value {
    let script = format!(
        "state=$(cat); pid=$(echo \"$state\" | sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p'); \
         status=$(echo \"$state\" | sed -n 's/.*\"status\": *\"\\([a-z]*\\)\".*/\\1/p'); \
         own=$(readlink /proc/self/ns/net); its=$(readlink /proc/${{pid:-none}}/ns/net); \
         [ \"$own\" = \"$its\" ] && network=the || network=not; \
         echo \"{kind} $status $network\" >> {}; echo why >&2; exit {status}",
        log.display()
    );
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}])
}

/// A bundle with a hook of every kind that runs on the host.
fn bundle(log: &Path, prestart: u8) -> Bundle {
    let hooks = json!({
        "prestart": hook("prestart", log, prestart),
        "createRuntime": hook("createRuntime", log, 0),
        "poststart": hook("poststart", log, 0),
        "poststop": hook("poststop", log, 0),
    });
    Bundle::script("true").unwrap().with(|spec| spec["hooks"] = hooks).unwrap()
}

#[test]
fn hooks_run_in_their_order_and_see_what_they_see_under_runc() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let mut logs = Vec::new();
    for runtime in [&ours, &runc] {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let bundle = bundle(&log, 0);
        runtime.create("hooked", &bundle).unwrap();
        runtime.ok(&["start", "hooked"]).unwrap();
        runtime.wait_for_status("hooked", "stopped").unwrap();
        runtime.ok(&["delete", "hooked"]).unwrap();
        logs.push(fs::read_to_string(&log).unwrap());
    }
    // By the specification the program runs by then; runc 1.1 still calls it created.
    assert_eq!(logs[0], logs[1].replace("poststart created", "poststart running"));
    let early = "prestart creating not\ncreateRuntime creating not\n";
    assert!(logs[0].starts_with(early), "{}", logs[0]);
    ours.assert_clean().unwrap();
}

#[test]
fn a_hook_that_fails_early_is_the_end_and_those_at_the_end_run() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    for runtime in [&ours, &runc] {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let bundle = bundle(&log, 3);
        let path = bundle.path().to_str().unwrap();
        let error = runtime.fails(&["create", "--bundle", path, "hooked"]).unwrap();
        assert!(error.contains("hook #0"), "{error}");
        assert!(error.contains("exit status") && error.contains("why"), "{error}");
        let log = fs::read_to_string(&log).unwrap();
        let lines: Vec<_> = log.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(lines, ["prestart", "poststop"]);
        assert!(runtime.fails(&["state", "hooked"]).unwrap().contains("does not exist"));
    }
    ours.assert_clean().unwrap();
}
