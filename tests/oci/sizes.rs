//! Specifications with as many arguments and variables as Linux accepts, beside runc.

use std::fs;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

fn both() -> [Runtime; 2] {
    [Runtime::new().unwrap(), Runtime::runc().unwrap()]
}

/// Environment variables with this many bytes in total, a thousand each.
fn variables(bytes: usize) -> Vec<Value> {
    let long = "x".repeat(990);
    (0..bytes / 1000).map(|number| json!(format!("V{number:07}={long}"))).collect()
}

#[test]
fn a_configuration_of_many_megabytes_is_read() {
    let [ours, runc] = both();
    let annotations: serde_json::Map<_, _> =
        (0..8000).map(|number| (format!("a{number}"), json!("x".repeat(1000)))).collect();
    let bundle = Bundle::script("echo fine").unwrap();
    let bundle = bundle.with(|spec| spec["annotations"] = annotations.into()).unwrap();
    assert!(fs::metadata(bundle.path().join("config.json")).unwrap().len() > 8_000_000);
    for runtime in [&runc, &ours] {
        let output = runtime.run("large", &bundle).unwrap();
        assert_eq!(told(&output), (Some(0), "fine\n".to_owned(), String::new()));
    }
    ours.assert_clean().unwrap();
}

#[test]
fn arguments_and_variables_fill_what_linux_has_for_them() {
    let [ours, runc] = both();
    // One string of 128 KiB; all together nearly 2 MiB.
    let longest = "y".repeat((128 << 10) - 1);
    let script = "echo ${#1} $#; env | wc -c";
    let bundle = Bundle::new(&["/bin/sh", "-c", script, "x", &longest]).unwrap();
    let bundle = bundle.with(|spec| {
        let environment = spec["process"]["env"].as_array_mut();
        environment.unwrap().extend(variables(1_800_000));
    });
    let bundle = bundle.unwrap();
    let [here, there] = [&ours, &runc].map(|runtime| told(&runtime.run("full", &bundle).unwrap()));
    assert_eq!(here, there);
    assert!(here.1.starts_with("131071 1\n"), "{here:?}");
    ours.assert_clean().unwrap();
}

#[test]
fn a_further_process_is_as_large_as_linux_takes_it() {
    let [ours, runc] = both();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("process.json");
    let process = json!({
        "args": ["/bin/sh", "-c", "echo $#; env | wc -c", "x", "y".repeat(100_000)],
        "env": variables(1_800_000).into_iter().chain([json!("PATH=/bin")]).collect::<Vec<_>>(),
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
    });
    fs::write(&file, serde_json::to_vec(&process).unwrap()).unwrap();
    let [here, there] = [&ours, &runc].map(|runtime| {
        let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        runtime.create("full", &bundle).unwrap();
        runtime.ok(&["start", "full"]).unwrap();
        let exec = ["exec", "--process", file.to_str().unwrap(), "full"];
        let told = told(&runtime.call(&exec).unwrap());
        runtime.ok(&["delete", "--force", "full"]).unwrap();
        told
    });
    assert_eq!(here, there);
    assert!(here.1.starts_with("1\n18"), "{here:?}");
    ours.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn more_mounts_than_a_process_has_descriptors() {
    let [ours, runc] = both();
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("file"), "shared\n").unwrap();
    let script = "cat /mnt/1199/file; grep -c ' /mnt/' /proc/self/mountinfo";
    let bundle = Bundle::script(script).unwrap().with(|spec| {
        let mounts = (0..1200).map(|n| bind(source.path(), &format!("/mnt/{n}"), &["ro"]));
        spec["mounts"].as_array_mut().unwrap().extend(mounts);
    });
    let bundle = bundle.unwrap();
    for runtime in [&runc, &ours] {
        let output = runtime.run("mounts", &bundle).unwrap();
        assert_eq!(told(&output), (Some(0), "shared\n1200\n".to_owned(), String::new()));
    }
    ours.assert_clean().unwrap();
}
