//! The container has the network that its caller has prepared, as under runc.

use std::fs;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::network::Tap;
use bulkhead_tests::ping::ping;
use bulkhead_tests::runtime::{Runtime, comes_true, kill_9, told};
use serde_json::{Value, json};

/// A network namespace with an interface whose other end is on the host; both are removed when this
/// is dropped.
struct Prepared;

const NAMESPACE: &str = "pod";
const HERE: &str = "10.9.0.1";
const THERE: &str = "10.9.0.2";

fn ip(line: &str) -> String {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    let (status, out, err) = told(&output);
    assert_eq!(status, Some(0), "ip {line}: {err}");
    out
}

fn in_pod(line: &str) -> String {
    ip(&format!("-netns {NAMESPACE} {line}"))
}

/// The interfaces and the ingress queueing disciplines as the container's caller sees them.
fn seen() -> [String; 3] {
    let tc = ["-netns", NAMESPACE, "qdisc", "show", "ingress"];
    let tc = told(&Command::new("tc").args(tc).output().unwrap());
    assert_eq!(tc.0, Some(0), "{tc:?}");
    [in_pod("-details link show eth0"), in_pod("link show type tun"), tc.1]
}

impl Prepared {
    fn new() -> Self {
        ip(&format!("netns add {NAMESPACE}"));
        let prepared = Self;
        ip(&format!("link add here type veth peer name eth0 netns {NAMESPACE}"));
        ip(&format!("address add {HERE}/24 dev here"));
        ip("address add fd09::1/64 dev here nodad");
        ip("link set here mtu 1400 up");
        in_pod("link set lo up");
        in_pod("link set eth0 address 02:00:00:00:09:02 mtu 1400 txqueuelen 500 up");
        in_pod(&format!("address add {THERE}/24 broadcast 10.9.0.255 dev eth0"));
        in_pod("address add 10.9.0.3/24 dev eth0");
        in_pod("address add fd09::2/64 dev eth0 nodad");
        in_pod(&format!("route add default via {HERE} metric 7"));
        in_pod("route add 10.20.0.0/16 via 192.0.2.1 dev eth0 onlink");
        in_pod("route add blackhole 10.66.0.0/16");
        in_pod("route add default via fd09::1");
        in_pod("neighbour add 10.9.0.9 lladdr 02:00:00:00:00:99 dev eth0");
        // Wait for duplicate address detection of the link-local address.
        let settled = || in_pod("-6 address show tentative").is_empty();
        assert!(comes_true(Duration::from_secs(30), settled), "an address stays tentative");
        prepared
    }

    fn bundle(script: &str) -> Bundle {
        Bundle::script(script)
            .unwrap()
            .with(|spec| {
                for entry in spec["linux"]["namespaces"].as_array_mut().unwrap() {
                    if entry["type"] == "network" {
                        entry["path"] = json!(format!("/run/netns/{NAMESPACE}"));
                    }
                }
            })
            .unwrap()
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", "here"]).status();
        let _ = Command::new("ip").args(["netns", "delete", NAMESPACE]).status();
    }
}

#[test]
fn an_interface_is_as_under_runc_and_is_left_as_it_was() {
    let _prepared = Prepared::new();
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let bundle = Prepared::bundle(
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /sys/class/net/eth0/tx_queue_len; \
         ip -o address show dev eth0 | sed 's/^[0-9]*: //;s/@[^ ]*//'; ip route; ip -6 route | sort; \
         ip neigh | grep PERMANENT; ping -c 1 -W 20 10.9.0.1 >/dev/null && echo reached; \
         ping -c 1 -W 20 fd09::1 >/dev/null && echo reached by six",
    );
    let before = seen();
    let [theirs, our] = [&runc, &ours].map(|runtime| told(&runtime.run("one", &bundle).unwrap()));
    assert!(theirs.1.contains("reached by six"), "{theirs:?}");
    assert_eq!(our, theirs);
    assert_eq!(seen(), before);
    ours.assert_clean().unwrap();
}

#[test]
fn several_interfaces_keep_their_names_and_a_fourth_is_refused() {
    let _prepared = Prepared::new();
    in_pod("link set eth0 down");
    in_pod("link set eth0 name eth1");
    in_pod("link add eth0 type dummy");
    in_pod("link set eth0 address 02:00:00:00:00:0a up");
    in_pod("address add 10.10.0.2/24 dev eth0");
    in_pod("link add down0 type dummy");
    in_pod("link set eth1 up");
    in_pod(&format!("route add default via {HERE} metric 7"));
    let bundle = Prepared::bundle(
        "for i in eth0 eth1 down0; do echo $i $(cat /sys/class/net/$i/address); \
         ip -o -4 address show dev $i | sed 's/^[0-9]*: //'; done; ip route; \
         ip link show down0 | grep -c UP; ping -c 1 -W 20 10.9.0.1 >/dev/null && echo reached",
    );
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let [theirs, our] = [&runc, &ours].map(|runtime| told(&runtime.run("one", &bundle).unwrap()));
    assert!(theirs.1.contains("reached"), "{theirs:?}");
    assert_eq!(our, theirs);

    in_pod("link add more type dummy");
    let error = ours.fails(&["run", "--bundle", bundle.path().to_str().unwrap(), "one"]).unwrap();
    assert!(error.contains("4 interfaces") && error.contains("room for 3"), "{error}");
    ours.assert_clean().unwrap();
}

#[test]
fn streams_go_both_ways_and_the_container_is_reached() {
    let _prepared = Prepared::new();
    let runtime = Runtime::new().unwrap();
    let bundle = Prepared::bundle("nc -l -p 7 -e cat");
    runtime.create("served", &bundle).unwrap();
    runtime.ok(&["start", "served"]).unwrap();
    let ping =
        Command::new("busybox").args(["ping", "-c", "3", "-W", "20", THERE]).output().unwrap();
    assert!(ping.status.success(), "{ping:?}");
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
    assert!(echoed(&data), "what comes back is not what was sent");
    runtime.ok(&["delete", "--force", "served"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// Whether the container echoes this data.
fn echoed(data: &[u8]) -> bool {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpStream};
    let mut stream = TcpStream::connect((THERE, 7)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(data).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        back == data
    })
}

/// Prints interfaces and their settings, without interface indexes.
const LOOK: &str = "for i in $(ls /sys/class/net | grep -v -e ^lo$ -e ^bulkhead -e gre -e erspan -e tunl -e sit); do \
     echo $i $(cat /sys/class/net/$i/address /sys/class/net/$i/mtu /sys/class/net/$i/carrier 2>&1 | sed 's/.*carrier.*/down/'); \
     ip -o address show dev $i | sed 's/^[0-9]*: //;s/@[^ ]*//'; done; ip -o address show dev lo; ip route; ip -6 route | sort";

#[test]
fn a_container_follows_what_becomes_of_its_network() {
    let _prepared = Prepared::new();
    let runtime = Runtime::new().unwrap();
    let bundle = Prepared::bundle("exec sleep 1000");
    runtime.create("follows", &bundle).unwrap();
    let inside = || runtime.ok(&["exec", "follows", "sh", "-c", LOOK]).unwrap();
    let outside = || {
        let shell = ["netns", "exec", NAMESPACE, "busybox", "sh", "-c", LOOK];
        told(&Command::new("ip").args(shell).output().unwrap()).1
    };
    assert_eq!(inside(), outside());
    for steps in [
        // The first steps are made before the container is started, the others while it runs. Each
        // change must be visible at once.
        "link add eth1 type dummy;link set eth1 address 02:00:00:00:00:11 up;\
         address add 10.11.0.1/24 dev eth1;route add 10.12.0.0/16 via 10.11.0.9 dev eth1",
        "link set eth0 mtu 1300;link set eth1 mtu 9000",
        "address add 10.9.0.4/24 dev eth0;address del 10.9.0.3/24 dev eth0",
        "address del 10.9.0.2/24 dev eth0;address add 10.9.0.2/24 dev eth0 broadcast 10.9.0.255;\
         route add default via 10.9.0.1 metric 9",
        "route del blackhole 10.66.0.0/16;-6 route add fd77::/64 via fd09::1",
        "link set eth1 down;link set eth1 name other;link set other address 02:00:00:00:00:12",
        "link set other up;link add eth1 type dummy;link set eth1 up",
        "link delete other",
        "link add third type dummy;link set third up;address add fd33::1/64 dev third nodad",
        "link delete eth1;link delete third",
        "address add 10.99.0.1/32 dev lo;route add 10.98.0.0/16 dev lo",
    ] {
        for step in steps.split(';') {
            in_pod(step.trim());
        }
        let settled = || in_pod("-6 address show tentative").is_empty();
        assert!(comes_true(Duration::from_secs(30), settled), "an address stays tentative");
        assert_eq!(inside(), outside(), "after {steps}");
        // Started after the first steps; later calls fail, because it runs already.
        runtime.call(&["start", "follows"]).unwrap();
    }
    let off = "echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6";
    let off = Command::new("ip").args(["netns", "exec", NAMESPACE, "sh", "-c", off]).status();
    assert!(off.unwrap().success());
    assert!(!outside().contains("::1/128"));
    assert_eq!(inside(), outside());
    ip("link set here down");
    let unplugged = || inside().starts_with("eth0 02:00:00:00:09:02 1300 0\n");
    assert!(comes_true(Duration::from_secs(30), unplugged), "{}", inside());
    ip("link set here up");
    let ping = || {
        let ping = ["ping", "-c", "1", "-W", "20", THERE];
        Command::new("busybox").args(ping).output().unwrap().status.success()
    };
    assert!(comes_true(Duration::from_secs(60), ping));
    runtime.ok(&["delete", "--force", "follows"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_process_finds_a_new_interface_that_nobody_has_told_it_of() {
    let _prepared = Prepared::new();
    let runtime = Runtime::new().unwrap();
    let waits = "until ip -4 address show dev late | grep -q 10.13.0.1; do sleep 0.1; done";
    let bundle = Prepared::bundle(waits);
    runtime.create("waits", &bundle).unwrap();
    runtime.ok(&["start", "waits"]).unwrap();
    in_pod("link add late type dummy");
    in_pod("address add 10.13.0.1/24 dev late");
    runtime.wait_for_status("waits", "stopped").unwrap();
    runtime.ok(&["delete", "waits"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn an_interface_that_cannot_be_had_leaves_a_running_container_alone() {
    let _prepared = Prepared::new();
    let runtime = Runtime::new().unwrap();
    let bundle = Prepared::bundle("exec sleep 1000");
    runtime.create("goes-on", &bundle).unwrap();
    runtime.ok(&["start", "goes-on"]).unwrap();
    for name in ["one", "two", "three"] {
        in_pod(&format!("link add {name} type dummy"));
    }
    let names = || runtime.ok(&["exec", "goes-on", "ls", "/sys/class/net"]).unwrap();
    let there = |name: &str| names().split_whitespace().any(|found| found == name);
    assert!(there("eth0") && there("one") && there("two") && !there("three"), "{}", names());
    in_pod("link delete one");
    assert!(there("three") && !there("one"), "{}", names());
    runtime.ok(&["delete", "--force", "goes-on"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn an_interface_that_somebody_else_redirects_is_refused_and_left_to_him() {
    let _prepared = Prepared::new();
    let tc = ["-netns", NAMESPACE, "qdisc", "add", "dev", "eth0", "ingress"];
    assert!(Command::new("tc").args(tc).status().unwrap().success());
    let before = seen();
    let runtime = Runtime::new().unwrap();
    let bundle = Prepared::bundle("true");
    let path = bundle.path().to_str().unwrap();
    let error = runtime.fails(&["run", "--bundle", path, "x"]).unwrap();
    assert!(
        error.contains("interface eth0: another program has an ingress qdisc on it"),
        "{error}"
    );
    assert_eq!(seen(), before);
    runtime.assert_clean().unwrap();
}

#[test]
fn an_interface_of_another_pod_is_refused_by_name() {
    let _prepared = Prepared::new();
    let (one, other) = (Runtime::new().unwrap(), Runtime::new().unwrap());
    let bundle = Prepared::bundle("exec sleep 1000");
    one.create("owner", &bundle).unwrap();
    let path = bundle.path().to_str().unwrap();
    let error = other.fails(&["run", "--bundle", path, "late"]).unwrap();
    assert!(error.contains("the frames of interface eth0 go to bulkhead0"), "{error}");
    one.ok(&["delete", "--force", "owner"]).unwrap();
    other.create("late", &bundle).unwrap();
    other.ok(&["delete", "--force", "late"]).unwrap();
    one.assert_clean().unwrap();
}

#[test]
fn whoever_is_killed_the_interface_is_as_it_was() {
    let _prepared = Prepared::new();
    let runtime = Runtime::new().unwrap();
    let bundle = Prepared::bundle("exec sleep 1000");
    let before = seen();
    for victim in ["bulkhead-vmm", "supervise"] {
        runtime.create("victim", &bundle).unwrap();
        runtime.ok(&["start", "victim"]).unwrap();
        assert_ne!(seen(), before);
        let [process] = runtime.processes(victim).unwrap()[..] else { panic!("one {victim}") };
        kill_9(process).unwrap();
        runtime.wait_for_status("victim", "stopped").unwrap();
        runtime.ok(&["delete", "victim"]).unwrap();
        assert_eq!(seen(), before, "{victim}");
        runtime.assert_clean().unwrap();
    }
}

#[test]
fn the_network_of_the_host_is_refused() {
    let runtime = Runtime::new().unwrap();
    let bundle = Prepared::bundle("true").with(|spec| {
        for entry in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            if entry["type"] == "network" {
                entry["path"] = json!("/proc/1/ns/net");
            }
        }
    });
    let path = bundle.unwrap();
    let error = runtime.fails(&["run", "--bundle", path.path().to_str().unwrap(), "x"]).unwrap();
    assert!(error.contains("the network of the host"), "{error}");
    runtime.assert_clean().unwrap();
}

#[test]
fn the_kernel_moves_the_frames_unless_it_is_told_not_to() {
    let _prepared = Prepared::new();
    let bundle = Prepared::bundle("exec sleep 1000");
    for (switch, by_kernel) in [("1", true), ("0", false)] {
        let runtime = Runtime::new().unwrap().with("BULKHEAD_VHOST_NET", switch);
        let features: Value = serde_json::from_str(&runtime.ok(&["features"]).unwrap()).unwrap();
        let told = &features["annotations"]["org.bulkhead.vhost-net.enabled"];
        assert_eq!(told, &by_kernel.to_string(), "{features}");
        runtime.create("one", &bundle).unwrap();
        ping(THERE.parse().unwrap(), 56, Duration::from_secs(20)).unwrap();
        let monitors = runtime.processes("bulkhead-vmm").unwrap();
        let threads = fs::read_dir(format!("/proc/{}/task", monitors[0])).unwrap().flatten();
        let names = threads.filter_map(|it| fs::read_to_string(it.path().join("comm")).ok());
        let names: Vec<String> = names.collect();
        let found = names.iter().any(|name| name.starts_with("vhost-"));
        assert_eq!(found, by_kernel, "{switch}: {names:?}");
        runtime.ok(&["delete", "--force", "one"]).unwrap();
        runtime.assert_clean().unwrap();
    }
}

/// A broadcast ARP request for an address, RFC 826, after the header of a tap.
fn asks_who_has(address: [u8; 4]) -> Vec<u8> {
    let (own, everybody) = ([2, 0, 0, 0, 8, 1], [0xff; 6]);
    let kind: [u8; 10] = [8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
    let mut frame = vec![0; 12];
    for part in [&everybody[..], &own, &kind, &own, &[10, 8, 0, 1], &[0; 6], &address] {
        frame.extend(part);
    }
    frame
}

#[test]
fn a_tap_that_somebody_reads_and_a_dummy_are_the_container_s_too() {
    let _prepared = Prepared::new();
    let tap = Tap::new("tap8", 1).unwrap();
    ip(&format!("link set tap8 netns {NAMESPACE}"));
    for line in [
        "link set tap8 address 02:00:00:00:08:02 up",
        "address add 10.8.0.2/24 dev tap8",
        "link add dummy7 type dummy",
        "link set dummy7 mtu 1300 up",
        "address add 10.7.0.2/24 dev dummy7",
    ] {
        in_pod(line);
    }
    let settled = || in_pod("-6 address show tentative").is_empty();
    assert!(comes_true(Duration::from_secs(30), settled), "an address stays tentative");
    let see = "for one in tap8 dummy7; do ip -o address show dev $one | sed 's/^[0-9]*: //'; \
               cat /sys/class/net/$one/address /sys/class/net/$one/mtu; done; \
               ping -c 1 -W 20 10.7.0.2 > /dev/null && echo itself";
    let bundle = Prepared::bundle(see);
    let (runc, ours) = (Runtime::runc().unwrap(), Runtime::new().unwrap());
    let [theirs, our] = [&runc, &ours].map(|runtime| told(&runtime.run("one", &bundle).unwrap()));
    assert!(theirs.1.ends_with("itself\n"), "{theirs:?}");
    assert_eq!(our, theirs);

    ours.create("one", &Prepared::bundle("exec sleep 1000")).unwrap();
    let [queue] = tap.descriptors()[..] else { panic!("one queue") };
    let mut frame = [0; 2048];
    let answered = || {
        rustix::io::write(queue, &asks_who_has([10, 8, 0, 2])).unwrap();
        while let Ok(count) = rustix::io::read(queue, &mut frame) {
            let frame = &frame[12..count];
            // An ARP reply with the address and the MAC address.
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                assert_eq!(frame[22..32], [2, 0, 0, 0, 8, 2, 10, 8, 0, 2]);
                return true;
            }
        }
        false
    };
    assert!(comes_true(Duration::from_secs(30), answered), "nobody answers");
    ours.ok(&["delete", "--force", "one"]).unwrap();
    ours.assert_clean().unwrap();
}
