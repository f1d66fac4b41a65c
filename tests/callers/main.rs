//! The real callers of an OCI runtime, as Debian has them, with Bulkhead as theirs. Runs in the test
//! host.

#![cfg(test)]

mod docker;
mod podman;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bulkhead_tests::runtime::output;

/// Status, standard output and standard error.
fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn wait_until(mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !reached() {
        assert!(Instant::now() < deadline, "did not come to that");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits until no process of ours is left, and no state of a container below `/run` or `directory`.
fn wait_for_nothing(directory: &Path) {
    let left = || {
        let processes = output(Command::new("ps").args(["-e", "-o", "args="])).unwrap();
        let processes = String::from_utf8(processes.stdout).unwrap();
        let ours = |line: &&str| line.contains("bin/bulkhead") && !line.contains("add-runtime");
        let mut left: Vec<String> = processes.lines().filter(ours).map(str::to_owned).collect();
        let mut find = Command::new("find");
        let found = output(find.arg("/run").arg(directory).args(["-name", "task.sock"])).unwrap();
        left.extend(String::from_utf8(found.stdout).unwrap().lines().map(str::to_owned));
        left
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !left().is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:#?}", left());
        std::thread::sleep(Duration::from_millis(100));
    }
}
