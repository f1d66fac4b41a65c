//! Docker's networks: who is on a bridge reaches the others, whatever runs them.

use std::fs;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::docker::Docker;
use bulkhead_tests::runtime::{comes_true, told};

use super::wait_for_nothing;

/// A daemon with its bridge; the later option of two counts.
const BRIDGED: [&str; 3] = ["--bridge", "", "--iptables=true"];
/// Says its name to everybody who asks at port 80.
const SERVES: &str = "hostname > /index.html; exec httpd -f -p 80 -h /";

/// Starts a container that serves; gives its address.
fn serve(docker: &Docker, runtime: &str, options: &[&str]) -> String {
    let fixed = ["run", "-d", "--runtime", runtime, "--name", runtime, "--hostname", runtime];
    docker.ok(&[&fixed[..], options, &["box", "sh", "-c", SERVES]].concat()).unwrap();
    let format = "{{.NetworkSettings.IPAddress}}";
    docker.ok(&["inspect", "--format", format, runtime]).unwrap().trim().to_owned()
}

/// What a server says to this host, once it does.
fn says(place: &str) -> String {
    let mut said = String::new();
    let url = format!("http://{place}/");
    let asked = || {
        let output = Command::new("busybox").args(["wget", "-q", "-O", "-", &url]).output();
        said = output.map(|output| told(&output).1).unwrap_or_default();
        !said.is_empty()
    };
    comes_true(Duration::from_secs(60), asked);
    said.trim().to_owned()
}

#[test]
fn containers_of_a_bridge_reach_each_other_and_are_reached() {
    let docker = Docker::start_with(&BRIDGED).unwrap();
    let ours = serve(&docker, "bulkhead", &["--publish", "127.0.0.1:8080:80"]);
    let theirs = serve(&docker, "runc", &[]);
    assert_eq!(says("127.0.0.1:8080"), "bulkhead");
    assert_eq!(says(&ours), "bulkhead");
    assert_eq!(says(&theirs), "runc");

    let asks = |runtime: &str, whom: &str| {
        let url = format!("http://{whom}/");
        let ask = ["run", "--rm", "--runtime", runtime, "box", "wget", "-q", "-O", "-", &url];
        docker.ok(&ask).unwrap().trim().to_owned()
    };
    assert_eq!(asks("bulkhead", &theirs), "runc");
    assert_eq!(asks("runc", &ours), "bulkhead");
    let beside = "ip -o -4 address show dev eth0; wget -q -O - http://127.0.0.1/";
    let joins = ["run", "--rm", "--runtime", "bulkhead", "--network", "container:bulkhead"];
    let beside = docker.ok(&[&joins[..], &["box", "sh", "-c", beside]].concat()).unwrap();
    assert!(beside.contains(&ours) && beside.trim().ends_with("bulkhead"), "{beside}");

    let [here, there] = ["bulkhead", "runc"].map(|runtime| {
        let look = "ip -o -4 address show dev eth0 | sed 's/^[0-9]*: //'; ip route; ip link show eth0 \
                    | grep -o 'mtu [0-9]*'; cat /etc/resolv.conf";
        let line = ["run", "--rm", "--runtime", runtime, "--network", "bridge", "box", "sh", "-c", look];
        told(&docker.call(&line).unwrap())
    });
    assert_eq!(here, there);

    docker.ok(&["rm", "--force", "bulkhead", "runc"]).unwrap();
    let left = fs::read_dir("/sys/class/net").unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("bulkhead")), "{left:?}");
    wait_for_nothing(docker.directory());
}
