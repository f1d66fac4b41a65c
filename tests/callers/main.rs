//! Debian's real callers of an OCI runtime, with Bulkhead as their runtime. Runs in the test host.

#![cfg(test)]

mod cni;
mod containerd;
mod debian;
mod docker;
mod docker_network;
mod network;
mod podman;
mod podman_network;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::runtime::{comes_true, output};

/// A timeout for hangs; generous because of emulation.
const PATIENCE: Duration = Duration::from_secs(90);

/// Waits for duplicate address detection, prints a container's network settings and names, and
/// tries to reach `friend` and `six`.
const NETWORK: &str = "for turn in $(seq 60); do ip -o addr | grep -q tentative || break; sleep 0.2; done; \
    ip -o addr | sed 's/^[0-9]*: //'; ip route; ip -6 route | sort; \
    cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /etc/hosts /etc/resolv.conf /etc/hostname; \
    hostname; timeout 20 ping -6 -c 1 six >/dev/null && echo six reached; \
    timeout 20 ping -c 1 friend >/dev/null && echo friend reached";

fn wait_until(reached: impl FnMut() -> bool) {
    assert!(comes_true(PATIENCE, reached), "did not come to that");
}

/// Waits until no Bulkhead process is left, and no state of a container below `/run` or
/// `directory`.
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
    let none = comes_true(Duration::from_secs(20), || left().is_empty());
    assert!(none, "left behind: {:#?}", left());
}
