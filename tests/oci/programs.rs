//! Programs that cannot be run, beside runc: the exit statuses and messages of `run`, `create`,
//! `start` and `exec`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::json;

/// A file in the container: its path, content and mode.
type Program = (&'static str, &'static [u8], u32);

/// Files that the kernel, or the check before execve(2), refuses.
const PROGRAMS: [Program; 8] = [
    ("/bin/garbage", b"garbage\n", 0o755),
    ("/bin/empty", b"", 0o755),
    ("/bin/no-interpreter", b"#!/nowhere\n", 0o755),
    // The headers of a 32-bit program and of a program for another processor.
    ("/bin/small", b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0", 0o755),
    ("/bin/foreign", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0\x01\0\0\0", 0o755),
    ("/bin/plain", b"#!/bin/sh\n", 0o644),
    ("/mnt", b"", 0),
    ("/absent", b"", 0),
];

fn bundle(args: &[&str]) -> Bundle {
    let bundle = Bundle::new(args).unwrap();
    for (path, content, mode) in PROGRAMS {
        if mode != 0 {
            let path = bundle.rootfs().join(path.strip_prefix('/').unwrap());
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
    }
    bundle
}

/// Status, standard output, and the kernel's error without the words that the runtime puts around
/// it.
fn words((status, output, errors): (Option<i32>, String, String)) -> (Option<i32>, String, String) {
    let cause = errors.find("exec").map_or(&*errors, |at| &errors[at..]);
    let cause = cause.rsplit("container process: ").next().unwrap_or_default();
    // For a directory, runc's message depends on the version of Go.
    let cause = cause.replace("is a directory", "permission denied");
    (status, output, cause.trim().replace("\\\"", "\"").trim_end_matches('"').to_owned())
}

#[test]
fn a_run_ends_as_under_runc() {
    let pods = Pod::beside_runc().unwrap();
    for (path, _, _) in PROGRAMS {
        let [ours, theirs] = pods.each_ref().map(|pod| {
            let mut bundle = bundle(&[path]);
            words(told(&pod.run("unrunnable", &mut bundle).unwrap()))
        });
        assert_eq!(ours, theirs, "{path}");
    }
    Pod::end_all(pods).unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn a_start_ends_as_under_runc() {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    for (path, _, _) in PROGRAMS {
        let [ours, theirs] = [&runtimes[0], &runtimes[1]].map(|runtime| {
            let bundle = bundle(&[path]);
            let line = ["create", "--bundle", bundle.path().to_str().unwrap(), "unrunnable"];
            let mut command = runtime.command(&line);
            let errors = bundle.path().join("errors");
            let file = fs::File::create(&errors).unwrap();
            let status = command.stdout(file.try_clone().unwrap()).stderr(file).status().unwrap();
            let said = fs::read_to_string(&errors).unwrap();
            let created = words((status.code(), String::new(), said));
            if !status.success() {
                return vec![created];
            }
            let started = words(told(&runtime.call(&["start", "unrunnable"]).unwrap()));
            runtime.wait_for_status("unrunnable", "stopped").unwrap();
            let said = words((None, String::new(), fs::read_to_string(&errors).unwrap()));
            runtime.ok(&["delete", "unrunnable"]).unwrap();
            vec![created, started, said]
        });
        assert_eq!(ours, theirs, "{path}");
    }
    runtimes.iter().for_each(|runtime| runtime.assert_clean().unwrap());
}

#[test]
fn an_exec_ends_as_under_runc() {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let bundle = bundle(&["/bin/sleep", "1000"]);
        runtime.create("unrunnable", &bundle).unwrap();
        runtime.ok(&["start", "unrunnable"]).unwrap();
        let told = PROGRAMS.map(|(path, _, _)| {
            (path, words(told(&runtime.call(&["exec", "unrunnable", path]).unwrap())))
        });
        runtime.ok(&["delete", "--force", "unrunnable"]).unwrap();
        runtime.assert_clean().unwrap();
        told
    });
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(*ours, theirs);
    }
}

#[test]
fn a_process_of_a_file_without_a_user_is_roots() {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let bundle = bundle(&["/bin/sleep", "1000"]);
        runtime.create("unrunnable", &bundle).unwrap();
        runtime.ok(&["start", "unrunnable"]).unwrap();
        let file = bundle.path().join("process.json");
        let process = json!({"args": ["/bin/id"], "cwd": "/", "env": ["PATH=/bin"]});
        let told = [json!(null), json!({}), json!({"uid": 7}), json!({"gid": 8})].map(|user| {
            let mut process = process.clone();
            if !user.is_null() {
                process["user"] = user;
            }
            fs::write(&file, process.to_string()).unwrap();
            let exec = ["exec", "--process", file.to_str().unwrap(), "unrunnable"];
            told(&runtime.call(&exec).unwrap())
        });
        runtime.ok(&["delete", "--force", "unrunnable"]).unwrap();
        runtime.assert_clean().unwrap();
        told
    });
    assert_eq!(ours, theirs);
    assert!(ours[0].1.starts_with("uid=0"), "{ours:?}");
}
