//! Hooks on the host and in the container, beside runc.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

/// A hook that logs its kind, the container's status, and whether the container's process is in the
/// host's network namespace.
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
    // By the specification the container is running by then; runc 1.1 still reports it as created.
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

/// A hook with a script of the host that the container does not have.
fn script(directory: &Path, text: &str) -> Value {
    let path = directory.join("hook");
    fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    json!([{"path": path, "args": ["hook", "argument"], "env": ["X=1", "PATH=/bin"], "timeout": 30}])
}

/// A hook with a shell that both the host and the container have.
fn shell(text: &str) -> Value {
    json!([{"path": "/bin/sh", "args": ["sh", "-c", text]}])
}

#[test]
fn hooks_in_the_container_run_as_under_runc() {
    let directory = tempfile::tempdir().unwrap();
    // runc starts createContainer hooks in the container's root directory; under Bulkhead it is
    // also their root file system.
    let create =
        "{ cat; echo; echo $X $1; } > state; mount -t tmpfs made mnt && echo kept > mnt/file";
    let mut hooks = json!({
        "createContainer": script(directory.path(), create),
        "startContainer": shell("{ cat; echo; echo $OF_PROCESS; id -u; } > /tmp/state"),
    });
    let second = shell("echo $OF_PROCESS > root/second");
    hooks["createContainer"].as_array_mut().unwrap().push(second[0].clone());
    let bundle = Bundle::script("cat /state /root/second /mnt/file /tmp/state").unwrap();
    let bundle = bundle.with(|spec| {
        spec["hooks"] = hooks;
        spec["annotations"] = json!({"kept": "yes"});
        spec["process"]["env"] = json!(["PATH=/bin", "OF_PROCESS=here"]);
    });
    let bundle = bundle.unwrap();
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let [here, there] = [&ours, &runc].map(|runtime| {
        let (status, out, err) = told(&runtime.run("hooked", &bundle).unwrap());
        assert_eq!((status, err.as_str()), (Some(0), ""), "{out}");
        out
    });
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (mut here, mut there) = (lines(&here), lines(&there));
    for number in [0, 4] {
        let [own, its] = [here.remove(number), there.remove(number)].map(|state| {
            let state: Value = serde_json::from_str(&state).unwrap();
            ["id", "status", "pid", "bundle", "annotations"].map(|field| state[field].clone())
        });
        assert_eq!(own, its);
        here.insert(number, String::new());
        there.insert(number, String::new());
    }
    assert_eq!(here, there);
    assert_eq!(here, ["", "1 argument", "here", "kept", "", "here", "0"]);
    ours.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn hooks_in_the_container_that_fail_are_told_as_under_runc() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let broken = shell("echo why >&2; exit 4");
    let with = |hooks: Value| {
        Bundle::script("echo ran").unwrap().with(|spec| spec["hooks"] = hooks).unwrap()
    };
    for runtime in [&ours, &runc] {
        let bundle = with(json!({"createContainer": broken}));
        let path = bundle.path().to_str().unwrap();
        let error = runtime.fails(&["create", "--bundle", path, "hooked"]).unwrap();
        assert!(error.contains("hook #0") && error.contains("why"), "{error}");
        assert!(runtime.fails(&["state", "hooked"]).unwrap().contains("does not exist"));
        let bundle = with(json!({"startContainer": broken}));
        let (status, out, err) = told(&runtime.run("hooked", &bundle).unwrap());
        assert_eq!((status, out.as_str()), (Some(1), ""));
        assert!(err.contains("hook #0") && err.contains("why"), "{err}");
    }
    let endless = json!([{"path": "/bin/sh", "args": ["sh", "-c", "exec sleep 60"], "timeout": 1}]);
    let bundle = with(json!({"createContainer": endless}));
    let error =
        ours.fails(&["run", "--bundle", bundle.path().to_str().unwrap(), "hooked"]).unwrap();
    assert!(error.contains("hook #0") && error.contains("not done within 1s"), "{error}");
    let missing = json!([{"path": "/usr/bin/runc"}]);
    let bundle = with(json!({"createContainer": missing}));
    let error =
        ours.fails(&["run", "--bundle", bundle.path().to_str().unwrap(), "hooked"]).unwrap();
    assert!(error.contains("/usr/bin/runc") && error.contains("link it statically"), "{error}");
    ours.assert_clean().unwrap();
}

#[test]
fn hooks_in_a_container_of_a_user_namespace_have_its_root() {
    let runtime = Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let hooks = json!({
        "createContainer": script(directory.path(), "id -u > /tmp/seen; cat /proc/self/uid_map >> /tmp/seen"),
    });
    let bundle = Bundle::script("cat /tmp/seen").unwrap().with(|spec| {
        spec["hooks"] = hooks;
        let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    });
    let (status, out, err) = told(&runtime.run("hooked", &bundle.unwrap()).unwrap());
    assert_eq!(status, Some(0), "{err}");
    let words: Vec<_> = out.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "100000", "65536"]);
    runtime.assert_clean().unwrap();
}
