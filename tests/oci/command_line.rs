//! What scripts and callers use of the command line, beside runc: exit statuses, help, the log,
//! signals, and the list of processes.

use std::fs;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, message, told};
use serde_json::{Value, json};

fn both() -> [Runtime; 2] {
    [Runtime::new().unwrap(), Runtime::runc().unwrap()]
}

fn started(runtime: &Runtime, id: &str) -> Bundle {
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create(id, &bundle).unwrap();
    runtime.ok(&["start", id]).unwrap();
    bundle
}

#[test]
fn what_cannot_be_read_ends_as_under_runc() {
    let [ours, runc] = both();
    for line in [
        &["--nosuch", "list"][..],
        &["list", "--nosuch"],
        &["list", "extra"],
        &["kill"],
        &["kill", "a", "9", "more"],
        &["state"],
        &["state", "a", "b"],
        &["run"],
        &["exec"],
        &["exec", "nobody", "true"],
        &["state", "nobody"],
        &["kill", "nobody"],
        &["delete", "nobody"],
        &["delete", "--force", "nobody"],
        &["ps", "nobody"],
        &["events", "nobody"],
        &["nosuch"],
        &["help"],
        &["help", "kill"],
        &["-h"],
        &["--help"],
        &["-v"],
        &["--version"],
        &["kill", "-h"],
        &["exec", "--help"],
        &["list", "-format", "json"],
        &["--debug=false", "list", "-q=true"],
        &["--log", "", "--systemd-cgroup=false", "list"],
        &["--log-format", "xml", "list"],
        &["--log", "/nonexistent/log", "list"],
        &["list", "--format", "xml"],
        &["spec", "--bundle", "/nonexistent"],
    ] {
        let (expected, found) = (runc.call(line).unwrap(), ours.call(line).unwrap());
        let (status, out, err) = told(&found);
        assert_eq!(status, expected.status.code(), "{line:?}: {err}");
        // Both write to the same streams.
        assert_eq!(out.is_empty(), expected.stdout.is_empty(), "{line:?}: {out}");
        assert_eq!(err.is_empty(), expected.stderr.is_empty(), "{line:?}: {err}");
        if status != Some(0) {
            assert!(err.contains("level=error msg="), "{line:?}: {err}");
        }
    }
}

#[test]
fn help_names_the_verb_in_its_second_line() {
    let [ours, runc] = both();
    for (runtime, name) in [(&ours, "bulkhead"), (&runc, "runc")] {
        for verb in ["create", "start", "kill", "exec", "list", "state", "update", "features"] {
            let help = runtime.ok(&[verb, "-h"]).unwrap();
            let mut lines = help.lines();
            assert_eq!(lines.next(), Some("NAME:"), "{help}");
            let start = format!("   {name} {verb} - ");
            assert!(lines.next().unwrap().starts_with(&start), "{help}");
        }
        let version = runtime.ok(&["--version"]).unwrap();
        assert!(version.starts_with(&format!("{name} version ")), "{version}");
        assert!(version.contains("\nspec: 1.0.2"), "{version}");
    }
}

#[test]
fn the_log_is_standard_error_unless_it_is_a_file() {
    let [ours, runc] = both();
    for runtime in [&ours, &runc] {
        let (_, _, plain) = told(&runtime.call(&["state", "nobody"]).unwrap());
        assert!(message(&plain).contains("does not exist"), "{plain}");
        let (_, _, json) =
            told(&runtime.call(&["--log-format", "json", "state", "nobody"]).unwrap());
        let line: Value = serde_json::from_str(json.trim()).unwrap();
        assert_eq!(line["level"], "error");
        assert!(line["msg"].as_str().unwrap().contains("does not exist"), "{line}");
        let log = tempfile::NamedTempFile::new().unwrap();
        let path = log.path().to_str().unwrap();
        let (_, _, words) = told(&runtime.call(&["--log", path, "state", "nobody"]).unwrap());
        assert!(words.contains("does not exist") && !words.contains("level="), "{words}");
        let logged = fs::read_to_string(log.path()).unwrap();
        assert_eq!(message(&logged), words.trim());
    }
}

#[test]
fn debug_lines_go_where_the_log_is() {
    let [ours, runc] = both();
    for runtime in [&ours, &runc] {
        let bundle = started(runtime, "watched");
        let (status, out, err) =
            told(&runtime.call(&["--debug", "exec", "watched", "echo", "in"]).unwrap());
        assert_eq!((status, out.as_str()), (Some(0), "in\n"), "{err}");
        assert!(err.contains("level=debug"), "{err}");
        let log = tempfile::NamedTempFile::new().unwrap();
        let path = log.path().to_str().unwrap();
        let line = ["--debug", "--log", path, "--log-format", "json", "exec", "watched", "true"];
        let (status, _, err) = told(&runtime.call(&line).unwrap());
        assert_eq!((status, err.as_str()), (Some(0), ""));
        let lines = fs::read_to_string(log.path()).unwrap();
        assert!(!lines.is_empty());
        for line in lines.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["level"], "debug");
        }
        runtime.ok(&["delete", "--force", "watched"]).unwrap();
        drop(bundle);
    }
    ours.assert_clean().unwrap();
}

#[test]
fn signals_are_taken_and_told_as_under_runc() {
    let [ours, runc] = both();
    for runtime in [&ours, &runc] {
        let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        runtime.create("asked", &bundle).unwrap();
        // Signal 0 asks whether the container is alive.
        runtime.ok(&["kill", "asked", "0"]).unwrap();
        runtime.ok(&["start", "asked"]).unwrap();
        runtime.ok(&["kill", "asked", "0"]).unwrap();
        runtime.ok(&["kill", "--all", "asked", "0"]).unwrap();
        for wrong in ["65", "NOSUCH", "-9"] {
            runtime.fails(&["kill", "asked", wrong]).unwrap();
        }
        runtime.ok(&["kill", "asked", "sigkill"]).unwrap();
        runtime.wait_for_status("asked", "stopped").unwrap();
        for signal in ["0", "TERM", "9"] {
            let errors = runtime.fails(&["kill", "asked", signal]).unwrap();
            assert!(errors.contains("container not running"), "{errors}");
            runtime.ok(&["kill", "--all", "asked", signal]).unwrap();
        }
        runtime.ok(&["delete", "asked"]).unwrap();
    }
    ours.assert_clean().unwrap();
}

#[test]
fn the_list_of_processes_has_names_and_none_when_it_has_stopped() {
    let [ours, runc] = both();
    for runtime in [&ours, &runc] {
        let bundle = started(runtime, "listed");
        let table = runtime.ok(&["ps", "listed"]).unwrap();
        let lines: Vec<_> = table.lines().collect();
        assert!(lines[0].starts_with("UID"), "{table}");
        assert!(lines[1].starts_with("root ") && lines[1].ends_with("sleep 1000"), "{table}");
        let pids: Value =
            serde_json::from_str(&runtime.ok(&["ps", "-f", "json", "listed"]).unwrap()).unwrap();
        assert_eq!(pids.as_array().unwrap().len(), 1);
        runtime.fails(&["ps", "--format", "xml", "listed"]).unwrap();
        runtime.ok(&["kill", "listed", "KILL"]).unwrap();
        runtime.wait_for_status("listed", "stopped").unwrap();
        let table = runtime.ok(&["ps", "listed"]).unwrap();
        assert!(table.starts_with("UID") && table.lines().count() == 1, "{table}");
        assert_eq!(runtime.ok(&["ps", "--format=json", "listed"]).unwrap(), "null\n");
        runtime.ok(&["delete", "listed"]).unwrap();
        drop(bundle);
    }
    ours.assert_clean().unwrap();
}

#[test]
fn a_pid_file_that_cannot_be_written_leaves_nothing() {
    let [ours, runc] = both();
    for runtime in [&ours, &runc] {
        let bundle = started(runtime, "filed");
        let before = runtime.ok(&["ps", "filed"]).unwrap().lines().count();
        for detach in [&[][..], &["--detach"]] {
            let line =
                [&["exec", "--pid-file", "/nonexistent/pid"], detach, &["filed", "sleep", "9"]];
            let mut command = runtime.command(&line.concat());
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            assert_eq!(command.status().unwrap().code(), Some(255), "{detach:?}");
        }
        let gone = || runtime.ok(&["ps", "filed"]).unwrap().lines().count() == before;
        assert!(bulkhead_tests::runtime::comes_true(std::time::Duration::from_secs(20), gone));
        let path = bundle.path().to_str().unwrap();
        runtime.ok(&["delete", "--force", "filed"]).unwrap();
        for verb in ["create", "run"] {
            let line = [verb, "--pid-file", "/nonexistent/pid", "--bundle", path, "filed"];
            let mut command = runtime.command(&line);
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            assert_eq!(command.status().unwrap().code(), Some(1), "{verb}");
            runtime.fails(&["state", "filed"]).unwrap();
        }
    }
    ours.assert_clean().unwrap();
}

#[test]
fn the_default_configuration_is_runcs() {
    let [ours, runc] = both();
    let [mut here, mut there] = [&ours, &runc].map(|runtime| {
        let directory = tempfile::tempdir().unwrap();
        runtime.ok(&["spec", "--bundle", directory.path().to_str().unwrap()]).unwrap();
        let text = fs::read_to_string(directory.path().join("config.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()
    });
    assert_eq!((&here["ociVersion"], &there["ociVersion"]), (&json!("1.0.2"), &json!("1.0.2-dev")));
    assert_eq!((&here["hostname"], &there["hostname"]), (&json!("bulkhead"), &json!("runc")));
    for spec in [&mut here, &mut there] {
        spec["ociVersion"] = Value::Null;
        spec["hostname"] = Value::Null;
    }
    assert_eq!(here, there);
}
