//! Podman's networks with netavark and aardvark-dns: what a container sees, whom it reaches and how
//! it is reached are as under runc.

use std::time::Duration;

use bulkhead_tests::netns::of_host;
use bulkhead_tests::runtime::{comes_true, output, told};
use bulkhead_tests::traffic::{echoed_by_udp, says};

use super::podman::{Podman, Shared};
use super::{NETWORK, wait_for_nothing};

const RUNC: [&str; 2] = ["--runtime", "/usr/bin/runc"];
/// The options that choose the runtime, given last so that they take effect; no option means
/// Bulkhead.
const RUNTIMES: [&[&str]; 2] = [&RUNC, &[]];

/// Podman with the IPv4 and IPv6 network `own`.
struct Networked(Shared);

impl Networked {
    fn new() -> Self {
        let networked = Self(Podman::shared());
        let podman = &networked.0;
        if !output(&mut podman.command(&["network", "exists", "own"])).unwrap().status.success() {
            assert_eq!(podman.ok(&["info", "--format", "{{.Host.NetworkBackend}}"]), "netavark");
            let subnets = ["--subnet", "10.52.0.0/24", "--ipv6", "--subnet", "fd52::/64"];
            podman.ok(&[&["network", "create"][..], &subnets, &["own"]].concat());
            // The first container leaves iptables chains behind under every runtime; create them
            // now.
            networked.run(&RUNC, "--network own -p 8080:80", "true");
        }
        networked
    }

    /// Runs a script in a new container, with options that are split at spaces.
    fn run(&self, runtime: &[&str], options: &str, script: &str) -> (Option<i32>, String, String) {
        let options: Vec<_> = options.split_whitespace().collect();
        let fixed = ["run", "--rm", "--name", "seen", "--cap-add", "NET_RAW"];
        let line = [runtime, &fixed[..], &options, &["box", "sh", "-c", script]].concat();
        told(&output(&mut self.0.command(&line)).unwrap())
    }

    /// Runs a script in a running container; returns its standard output and standard error.
    fn inside(&self, runtime: &[&str], name: &str, script: &str) -> String {
        let line = [runtime, &["exec", name, "sh", "-c", script]].concat();
        let (_, out, err) = told(&output(&mut self.0.command(&line)).unwrap());
        (out + &err).trim().to_owned()
    }

    /// Waits until the state of the host's networks is the same as before.
    fn wait_for(&self, before: &str) {
        let mut now = String::new();
        let same = comes_true(Duration::from_secs(20), || {
            now = of_host().unwrap();
            now == before
        });
        assert!(same, "before: {before}\nnow: {now}");
        wait_for_nothing(self.0.directory());
    }
}

#[test]
fn addresses_and_names_that_are_asked_for_are_as_under_runc() {
    let podman = Networked::new();
    let all = "--network own --ip 10.52.0.9 --ip6 fd52::9 --mac-address 02:00:00:00:52:09 \
               --add-host friend:10.52.0.1 --add-host six:fd52::1 --hostname named --dns 10.52.0.1 \
               --dns-search there --dns-opt timeout:2";
    // The default network.
    let plain = "--network podman --ip 10.88.0.77 --mac-address 02:00:00:00:52:0a \
                 --add-host friend:10.88.0.1 --hostname plain";
    for (options, reached) in [(all, "six reached\nfriend reached\n"), (plain, "friend reached\n")]
    {
        let expected = podman.run(&RUNC, options, NETWORK);
        assert!(expected.1.ends_with(reached), "{expected:?}");
        let before = of_host().unwrap();
        assert_eq!(podman.run(&[], options, NETWORK), expected, "{options}");
        podman.wait_for(&before);
    }
}

/// Serves its name over TCP, and echoes on UDP port 9.
const SERVES: &str = "hostname > /index.html; httpd -p 80 -h /; exec /datagrams echo 9";

#[test]
#[ignore = "long: --suite callers_long"]
fn containers_reach_each_other_by_both_families_and_are_reached_by_published_ports() {
    let podman = Networked::new();
    reach_each_other(&podman, &RUNC);
    // This has what netavark leaves behind under every runtime.
    let before = of_host().unwrap();
    reach_each_other(&podman, &[]);
    podman.wait_for(&before);
}

/// A container of a runtime, `ours`, and one of runc, `theirs`.
fn reach_each_other(podman: &Networked, runtime: &[&str]) {
    let program = format!("{}:/datagrams:ro", env!("CARGO_BIN_EXE_datagrams"));
    let serve = |runtime: &[&str], name: &str, options: &str| {
        let options: Vec<_> = options.split_whitespace().collect();
        let fixed = ["run", "-d", "--name", name, "--hostname", name, "--network", "own"];
        let powers = ["--cap-add", "NET_RAW"];
        let rest = ["-v", &program, "box", "sh", "-c", SERVES];
        podman.0.ok(&[runtime, &fixed[..], &powers, &options, &rest].concat());
    };
    serve(runtime, "ours", "-p 8080:80 -p 8009:9/udp --ip 10.52.0.9 --ip6 fd52::9");
    serve(&RUNC, "theirs", "--ip 10.52.0.8 --ip6 fd52::8");
    assert_eq!(says("127.0.0.1:8080").unwrap(), "ours");
    echoed_by_udp("10.52.0.1", "10.52.0.1:8009").unwrap();
    let asks = |(runtime, who): (&[&str], &str), whom: &str| {
        podman.inside(runtime, who, &format!("timeout 20 wget -q -O - http://{whom}/"))
    };
    let (ours, theirs): ((&[&str], _), (&[&str], _)) = ((runtime, "ours"), (&RUNC, "theirs"));
    for (who, name, six) in [(ours, "theirs", "fd52::8"), (theirs, "ours", "fd52::9")] {
        assert_eq!(asks(who, name), name);
        assert_eq!(asks(who, &format!("[{six}]")), name);
        let ping = format!("timeout 20 ping -6 -c 1 {six} | grep -c ' 0% packet loss'");
        assert_eq!(podman.inside(who.0, who.1, &ping), "1");
    }
    let shown = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}";
    assert_eq!(podman.0.ok(&["inspect", "--format", shown, "ours"]), "10.52.0.9 fd52::9");

    // The container leaves the network and comes back with another address.
    podman.0.ok(&["network", "disconnect", "own", "ours"]);
    assert_eq!(podman.inside(runtime, "ours", "ls /sys/class/net"), "lo");
    podman.0.ok(&["network", "connect", "--ip", "10.52.0.77", "own", "ours"]);
    assert_eq!(asks(theirs, "ours"), "ours");
    assert_eq!(asks(theirs, "10.52.0.77"), "ours");
    assert_eq!(asks(ours, "theirs"), "theirs");
    // In this order, because netavark leaves a chain behind if a container with ports is not
    // removed first.
    for name in ["ours", "theirs"] {
        podman.0.ok(&["rm", "--force", "--time", "0", name]);
    }
}

#[test]
fn a_pod_has_one_loopback_and_its_ports_as_under_runc() {
    let podman = Networked::new();
    let before = of_host().unwrap();
    let [theirs, ours] = RUNTIMES.map(|runtime| {
        // Without systemd this Podman forbids all devices to a pod's cgroup, /dev/null too.
        let pod = "pod create --name pod --hostname pod --share-parent=false --network own -p 8080:80 \
                   --ip 10.52.0.9 --ip6 fd52::9 --mac-address 02:00:00:00:52:09 --add-host friend:10.52.0.1 \
                   --add-host six:fd52::1 --infra-image box --infra-command";
        let pod: Vec<_> = pod.split_whitespace().chain(["sleep 1000"]).collect();
        podman.0.ok(&[runtime, &pod].concat());
        let serves = "echo served > /index.html; exec httpd -f -p 80 -h /";
        let one = ["run", "-d", "--pod", "pod", "--name", "one", "box", "sh", "-c", serves];
        podman.0.ok(&[runtime, &one].concat());
        assert_eq!(says("127.0.0.1:8080").unwrap(), "served");
        // The name of a pod's first container contains its own ID.
        let look = format!(
            "(timeout 20 wget -q -O - http://127.0.0.1/; {NETWORK}) | sed 's/ [0-9a-f]*-infra/ infra/'"
        );
        let seen = podman.run(runtime, "--pod pod", &look);
        let machine = "cat /proc/sys/kernel/random/boot_id";
        let machines = [podman.inside(runtime, "one", machine), podman.run(runtime, "--pod pod", machine).1];
        assert_eq!(machines[0].trim(), machines[1].trim());
        podman.0.ok(&[runtime, &["pod", "rm", "--force", "--time", "0", "pod"]].concat());
        seen
    });
    assert!(theirs.1.starts_with("served\n") && theirs.1.contains("six reached\n"), "{theirs:?}");
    assert_eq!(ours, theirs);
    podman.wait_for(&before);
}
