//! A terminal belongs to the user of its program, beside runc.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;
use serde_json::{Value, json};

use super::mounts::mapped;
use super::terminal::detached;

/// Writes to every path of the terminal, and prints its owner.
const PROBE: &str = "id -u; for name in /dev/stdin /dev/stdout /dev/stderr /dev/tty $(busybox tty) \
    /proc/self/fd/1; do echo to $name 2>&1 > $name; done; stat -c '%u %g %a' $(busybox tty); \
    stat -L -c '%u %g %a' /dev/fd/0 /dev/fd/1 /dev/fd/2";

fn with_terminal(script: &[&str], user: u32) -> Bundle {
    let bundle = Bundle::new(script).unwrap();
    let change = |spec: &mut Value| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["user"] = json!({"uid": user, "gid": user});
    };
    bundle.with(change).unwrap()
}

/// The terminal output of a container's first process.
fn first(runtime: &Runtime, bundle: &Bundle) -> String {
    let directory = tempfile::tempdir().unwrap();
    let create = ["create", "--bundle", bundle.path().to_str().unwrap(), "owned"];
    let mut screen = detached(runtime, directory.path(), &create).unwrap();
    runtime.ok(&["start", "owned"]).unwrap();
    screen.wait_for_end().unwrap();
    runtime.wait_for_status("owned", "stopped").unwrap();
    runtime.ok(&["delete", "owned"]).unwrap();
    screen.seen
}

/// The terminal output of a further process.
fn further(runtime: &Runtime, bundle: &Bundle, user: &str) -> String {
    runtime.create("owned", bundle).unwrap();
    runtime.ok(&["start", "owned"]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let exec = ["exec", "--detach", "--tty", "--user", user, "owned", "/bin/sh", "-c", PROBE];
    let mut screen = detached(runtime, directory.path(), &exec).unwrap();
    screen.wait_for_end().unwrap();
    runtime.ok(&["delete", "--force", "owned"]).unwrap();
    screen.seen
}

/// Runs the probe under both runtimes; the output must be the same, and nothing may be refused.
fn same(user: u32, probe: impl Fn(&Runtime) -> String) {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let seen = probe(&runtime);
        runtime.assert_clean().unwrap();
        seen
    });
    assert_eq!(ours, theirs);
    assert!(ours.starts_with(&format!("{user}\r\nto /dev/stdin\r\nto /dev/stdout\r\n")), "{ours}");
    assert!(ours.contains(&format!("\r\n{user} 5 620\r\n")), "{ours}");
}

#[test]
fn the_terminal_of_a_container_is_its_users() {
    for user in [0, 1000] {
        same(user, |runtime| first(runtime, &with_terminal(&["/bin/sh", "-c", PROBE], user)));
    }
}

#[test]
fn the_terminal_of_a_further_process_is_its_users() {
    let user = 1001;
    same(user, |runtime| {
        let sleep = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        further(runtime, &sleep, "1001:1001")
    });
}

#[test]
fn a_terminal_is_its_users_in_a_user_namespace() {
    same(999, |runtime| first(runtime, &mapped(with_terminal(&["/bin/sh", "-c", PROBE], 999))));
    same(998, |runtime| {
        let sleep = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        further(runtime, &mapped(sleep), "998:998")
    });
}
