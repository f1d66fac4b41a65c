//! Every error is one line that names the object, the reason and the remedy.

use std::fs;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, output};
use serde_json::{Value, json};

/// Runs a bundle that must be refused with one line that contains every needle.
fn refused(bundle: &Bundle, needles: &[&str]) {
    let runtime = Runtime::new().unwrap();
    let output = runtime.run("refused", bundle).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    for needle in needles {
        assert!(text.contains(needle), "{needle} is not in: {text}");
    }
    runtime.assert_clean().unwrap();
}

#[test]
fn a_bundle_without_a_configuration() {
    let bundle = Bundle::new(&["true"]).unwrap();
    fs::remove_file(bundle.path().join("config.json")).unwrap();
    refused(&bundle, &["config.json", "bulkhead spec"]);
}

#[test]
fn a_configuration_that_is_not_json_is_refused_with_the_place() {
    let bundle = Bundle::new(&["true"]).unwrap();
    fs::write(bundle.path().join("config.json"), "{\n  \"ociVersion\": oops\n}").unwrap();
    refused(&bundle, &["config.json", "line 2"]);
}

#[test]
fn a_rootfs_that_is_not_there() {
    let bundle = Bundle::new(&["true"]).unwrap();
    fs::remove_dir_all(bundle.rootfs()).unwrap();
    refused(&bundle, &["rootfs"]);
}

#[test]
fn host_namespaces_are_refused_by_name() {
    for kind in ["network", "pid", "ipc"] {
        let bundle = Bundle::new(&["true"]).unwrap();
        let bundle = bundle
            .with(|spec| {
                if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
                    list.retain(|entry| entry["type"] != kind);
                }
            })
            .unwrap();
        refused(&bundle, &[kind]);
    }
}

#[test]
fn a_namespace_that_does_not_exist_is_refused() {
    let bundle = Bundle::new(&["true"]).unwrap();
    let bundle =
        bundle.with(|spec| spec["linux"]["namespaces"] = json!([{"type": "galaxy"}])).unwrap();
    refused(&bundle, &["galaxy"]);
}

fn with_environment(name: &str, value: &str, needles: &[&str]) {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["true"]).unwrap();
    let mut command = runtime.run_command("environment", &bundle);
    command.env(name, value);
    let output = output(&mut command).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for needle in needles {
        assert!(text.contains(needle), "{needle} is not in: {text}");
    }
    runtime.assert_clean().unwrap();
}

#[test]
fn a_guest_image_that_is_not_there_is_named_with_the_way_out() {
    with_environment("BULKHEAD_KERNEL", "/no/vmlinux", &["/no/vmlinux", "cargo xtask image"]);
    with_environment("BULKHEAD_INITRAMFS", "/no/initramfs", &["/no/initramfs"]);
}

#[test]
fn a_guest_that_does_not_come_up_is_reported_with_its_console() {
    // The kernel boots, but the initramfs has no init.
    let empty = tempfile::NamedTempFile::new().unwrap();
    let path = empty.path().to_str().unwrap();
    with_environment("BULKHEAD_INITRAMFS", path, &["panic"]);
}

#[test]
fn an_id_can_be_taken_once() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("taken", &bundle).unwrap();
    let output = runtime.run("taken", &bundle).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("taken"), "{text}");
    assert_eq!(runtime.state("taken").unwrap()["status"], "created");
    runtime.ok(&["delete", "--force", "taken"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_container_that_is_not_there_is_named() {
    let runtime = Runtime::new().unwrap();
    for args in [&["state", "nobody"][..], &["start", "nobody"], &["kill", "nobody"]] {
        let text = runtime.fails(args).unwrap();
        assert!(text.contains("nobody"), "{args:?}: {text}");
    }
    assert!(runtime.fails(&["delete", "nobody"]).unwrap().contains("nobody"));
    runtime.ok(&["delete", "--force", "nobody"]).unwrap();
}

#[test]
fn an_id_that_is_a_path_is_refused() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["true"]).unwrap();
    for id in ["../up", "a/b", ".", ""] {
        let output = runtime.run(id, &bundle).unwrap();
        assert!(!output.status.success(), "{id:?} was accepted");
    }
    runtime.assert_clean().unwrap();
}

#[test]
fn the_log_has_the_error_as_json() {
    let runtime = Runtime::new().unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let path = log.path().to_str().unwrap();
    runtime.fails(&["--log", path, "--log-format", "json", "state", "nobody"]).unwrap();
    let text = fs::read_to_string(log.path()).unwrap();
    let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(line["msg"].as_str().unwrap().contains("nobody"), "{line}");
    assert!(line["time"].is_string());
}
