//! Capabilities of a container's first process and of further processes, beside runc: each set
//! alone and combined, with and without a seccomp filter, for root and for another user.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

/// Prints the sets of the shell and of a program that it starts, and tries what they allow.
const PROBE: &str = "grep -h -E '^(Cap|NoNew|Seccomp:)' /proc/$$/status /proc/self/status; \
    chown 5 /mnt/file 2> /dev/null; echo chown $?";

/// Named combinations of sets. Sets that a combination does not name are absent.
fn combinations() -> Vec<(&'static str, Value)> {
    let (some, more) =
        (json!(["CAP_KILL", "CAP_CHOWN"]), json!(["CAP_KILL", "CAP_CHOWN", "CAP_BPF"]));
    vec![
        ("none", json!({})),
        ("not named", Value::Null),
        ("bounding", json!({"bounding": some})),
        ("permitted", json!({"permitted": some})),
        ("permitted in bounding", json!({"bounding": more, "permitted": some})),
        ("permitted beyond bounding", json!({"bounding": some, "permitted": more})),
        ("effective", json!({"bounding": more, "permitted": some, "effective": ["CAP_KILL"]})),
        ("effective beyond permitted", json!({"bounding": more, "effective": some})),
        ("inheritable", json!({"bounding": more, "inheritable": some})),
        ("inheritable beyond bounding", json!({"bounding": some, "inheritable": more})),
        (
            "inheritable and permitted",
            json!({"bounding": more, "permitted": some, "inheritable": some}),
        ),
        ("ambient", json!({"bounding": more, "ambient": some})),
        (
            "ambient without inheritable",
            json!({"bounding": more, "permitted": some, "ambient": some}),
        ),
        (
            "ambient without permitted",
            json!({"bounding": more, "inheritable": some, "ambient": some}),
        ),
        (
            "ambient of some",
            json!({"bounding": more, "permitted": more, "inheritable": some, "ambient": more}),
        ),
        (
            "ambient and all else",
            json!({
                "bounding": some, "permitted": some, "effective": some, "inheritable": some,
                "ambient": some,
            }),
        ),
        (
            "ambient that loads filters",
            json!({
                "bounding": ["CAP_SYS_ADMIN"], "inheritable": ["CAP_SYS_ADMIN"],
                "ambient": ["CAP_SYS_ADMIN"],
            }),
        ),
    ]
}

/// Exit status, standard output, and the error.
type Told = (Option<i32>, String, String);

/// A bundle whose process has these capability sets.
fn bundle(args: &[&str], sets: &Value, change: impl FnOnce(&mut Value)) -> Bundle {
    let bundle = Bundle::new(args).unwrap();
    std::fs::write(bundle.rootfs().join("mnt/file"), "").unwrap();
    let set = |spec: &mut Value| {
        spec["process"]["capabilities"] = sets.clone();
        change(spec);
    };
    bundle.with(set).unwrap()
}

/// A runtime's output, without the prefix that each runtime puts before an error.
fn words((status, output, errors): Told) -> Told {
    let cause = errors.find("unable to apply").map_or(&*errors, |at| &errors[at..]);
    (status, output, cause.trim().trim_end_matches('"').to_owned())
}

/// The name of the sets, the user and no_new_privs of a process, and its output.
type Said = (&'static str, u32, bool, Told);

/// Runs a process for each combination in one container, as root and as another user, with and
/// without no_new_privs.
fn try_all(runtime: &Runtime, change: impl FnOnce(&mut Value)) -> Vec<Said> {
    let bundle = bundle(&["/bin/sleep", "1000"], &json!({"bounding": ["CAP_CHOWN"]}), change);
    runtime.create("able", &bundle).unwrap();
    runtime.ok(&["start", "able"]).unwrap();
    let file = bundle.path().join("process.json");
    let mut all = Vec::new();
    for (name, sets) in combinations() {
        for (user, stays) in [(0, false), (1000, false), (0, true), (1000, true)] {
            let process = json!({
                "args": ["/bin/sh", "-c", PROBE], "cwd": "/", "env": ["PATH=/bin"],
                "capabilities": sets, "noNewPrivileges": stays, "user": {"uid": user, "gid": user},
            });
            std::fs::write(&file, process.to_string()).unwrap();
            let exec = ["exec", "--process", file.to_str().unwrap(), "able"];
            all.push((name, user, stays, words(told(&runtime.call(&exec).unwrap()))));
        }
    }
    runtime.ok(&["delete", "--force", "able"]).unwrap();
    runtime.assert_clean().unwrap();
    all
}

fn assert_same(ours: &[Said], theirs: &[Said]) {
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
}

#[test]
#[ignore = "long: --suite oci_long"]
fn every_set_is_as_asked_for() {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| try_all(&runtime, |_| {}));
    assert_same(&ours, &theirs);
    let refused = ours
        .iter()
        .filter(|(_, user, stays, told)| (*user, *stays) == (0, false) && told.0 != Some(0));
    let refused: Vec<_> = refused.map(|(name, ..)| *name).collect();
    assert_eq!(refused, ["effective beyond permitted", "inheritable beyond bounding"]);
    let all = ours.iter().find(|(name, user, ..)| *name == "ambient and all else" && *user != 0);
    assert!(all.unwrap().3.1.contains("CapAmb:\t0000000000000021\n"), "{all:?}");
}

#[test]
#[ignore = "long: --suite oci_long"]
fn a_filter_changes_no_set() {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        try_all(&runtime, |spec| {
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["getpgrp"], "action": "SCMP_ACT_ERRNO"}],
            });
        })
    });
    assert_same(&ours, &theirs);
    let with = ours.iter().find(|(name, ..)| *name == "permitted in bounding").unwrap();
    assert!(with.3.1.contains("Seccomp:\t2\n"), "{with:?}");
}

/// The first process uses the same code as further processes, so a few combinations are enough.
#[test]
fn the_sets_of_a_first_process_are_as_asked_for() {
    let pods = Pod::beside_runc().unwrap();
    for (name, sets) in combinations() {
        let user = match name {
            "permitted in bounding" | "ambient of some" | "effective beyond permitted" => 0,
            "ambient and all else" | "inheritable" => 1000,
            _ => continue,
        };
        let [ours, theirs] = pods.each_ref().map(|pod| {
            let mut bundle = bundle(&["/bin/sh", "-c", PROBE], &sets, |spec| {
                spec["process"]["noNewPrivileges"] = json!(false);
                spec["process"]["user"] = json!({"uid": user, "gid": user});
            });
            words(told(&pod.run("able", &mut bundle).unwrap()))
        });
        assert_eq!(ours, theirs, "{name}");
    }
    Pod::end_all(pods).unwrap();
}

#[test]
fn a_further_process_has_the_sets_that_are_asked_for_or_the_containers() {
    let own = json!({"bounding": ["CAP_CHOWN", "CAP_FOWNER"], "permitted": ["CAP_CHOWN"]});
    let all = json!({
        "bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    });
    let process = |sets: &Value, user: u32| {
        json!({
            "args": ["/bin/sh", "-c", PROBE], "cwd": "/", "env": ["PATH=/bin"], "capabilities": sets,
            "user": {"uid": user, "gid": user},
        })
    };
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let bundle = bundle(&["/bin/sleep", "1000"], &own, |spec| {
            spec["process"]["noNewPrivileges"] = json!(false);
        });
        runtime.create("able", &bundle).unwrap();
        runtime.ok(&["start", "able"]).unwrap();
        let file = bundle.path().join("process.json");
        let mut told_all = Vec::new();
        for (sets, user) in [(&own, 0), (&all, 1000), (&Value::Null, 0)] {
            std::fs::write(&file, process(sets, user).to_string()).unwrap();
            let exec = ["exec", "--process", file.to_str().unwrap(), "able"];
            told_all.push(words(told(&runtime.call(&exec).unwrap())));
        }
        for options in [&["--cap", "CAP_KILL"][..], &["--user", "7", "--cap", "CAP_KILL"], &[]] {
            let program = ["able", "/bin/sh", "-c", PROBE];
            let exec: Vec<&str> = ["exec"].iter().chain(options).chain(&program).copied().collect();
            told_all.push(words(told(&runtime.call(&exec).unwrap())));
        }
        runtime.ok(&["delete", "--force", "able"]).unwrap();
        runtime.assert_clean().unwrap();
        told_all
    });
    assert_eq!(ours, theirs);
    assert!(ours[1].1.contains("CapAmb:\t0000000000000020\n"), "{ours:?}");
}

#[test]
fn a_capability_that_nobody_knows_is_a_warning() {
    let sets = json!({
        "bounding": ["CAP_KILL", "CAP_NOBODY_KNOWS"], "permitted": ["CAP_NOBODY_KNOWS", "CAP_KILL"],
        "effective": ["CAP_KILL", "chown", "CHOWN", "CAP_chown"],
    });
    for runtime in [Runtime::new().unwrap(), Runtime::runc().unwrap()] {
        let first = bundle(&["/bin/sh", "-c", "grep ^CapEff /proc/self/status"], &sets, |_| {});
        let bundle = first.path().to_str().unwrap();
        let (output, log) = logged(&runtime, &["run", "--bundle", bundle, "able"]);
        assert_eq!(output, "CapEff:\t0000000000000020\n", "{log}");
        for name in ["CAP_NOBODY_KNOWS", "chown", "CHOWN", "CAP_chown"] {
            assert!(log.contains(name), "{name}: {log}");
        }
        let sleeps = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        runtime.create("able", &sleeps).unwrap();
        runtime.ok(&["start", "able"]).unwrap();
        let script = ["able", "/bin/sh", "-c", "echo ran"];
        let exec = [&["exec", "--cap", "CAP_NOBODY_KNOWS"][..], &script].concat();
        let (output, log) = logged(&runtime, &exec);
        assert_eq!(output, "ran\n", "{log}");
        assert!(log.contains("CAP_NOBODY_KNOWS"), "{log}");
        runtime.ok(&["delete", "--force", "able"]).unwrap();
        runtime.assert_clean().unwrap();
    }
}

/// The output of a command that must succeed, and its log, which must have the warning.
fn logged(runtime: &Runtime, line: &[&str]) -> (String, String) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let line = [&["--log", log.to_str().unwrap()][..], line].concat();
    let output = runtime.ok(&line).unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("ignoring unknown or unavailable capabilities"), "{log}");
    assert!(log.contains("level=warning"), "{log}");
    (output, log)
}
