//! Debian's CNI plugins: the container has the network that they prepare, as under runc, and
//! nothing is left after they have deleted it.

use std::path::Path;
use std::process::Command;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::cni::Attachment;
use bulkhead_tests::netns::{Namespace, Serving, ip, of_host};
use bulkhead_tests::runtime::{Runtime, told};
use bulkhead_tests::traffic::echoed_by_udp;
use serde_json::{Value, json};

/// The network that `outer` leads to, with a host that answers outside of the pod.
struct Outside(Namespace);

impl Outside {
    fn new() -> Self {
        let outside = Namespace::new("outside").unwrap();
        ip("link add outer type veth peer name inner netns outside").unwrap();
        ip("link set outer up").unwrap();
        outside.ip("link set inner up").unwrap();
        outside.ip("address add 10.44.0.1/24 dev inner").unwrap();
        outside.ip("address add fd44::1/64 dev inner nodad").unwrap();
        outside.ip("link add link inner name tagged type vlan id 5").unwrap();
        outside.ip("link set tagged up").unwrap();
        outside.ip("address add 10.45.0.1/24 dev tagged").unwrap();
        outside.ip("address add fd45::1/64 dev tagged nodad").unwrap();
        Self(outside)
    }
}

/// The IPAM configuration of host-local for an IPv4 and an IPv6 subnet; the first address of each
/// is its gateway.
fn ipam(number: u8) -> Value {
    json!({
        "type": "host-local",
        "ranges": [[{"subnet": format!("10.{number}.0.0/24")}], [{"subnet": format!("fd{number}::/64")}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "10.99.0.0/16"}],
    })
}

fn bridge() -> Value {
    json!({"type": "bridge", "bridge": "cni41", "isGateway": true, "ipMasq": true, "ipam": ipam(41)})
}

/// A container that prints its network settings and tries to reach others.
fn probe(number: u8) -> Bundle {
    let script = format!(
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; \
         ip -o address show dev eth0 | sed 's/^[0-9]*: //;s/@[^ ]*//'; ip route; ip -6 route | sort; \
         ping -c 1 -W 20 10.{number}.0.1 >/dev/null && echo reached; \
         ping -c 1 -W 20 fd{number}::1 >/dev/null && echo reached by six; \
         seq 20000 | nc -w 20 10.{number}.0.1 7 | sha256sum"
    );
    Bundle::script(&script).unwrap()
}

/// Has plugins make a network, and runs runc and Bulkhead in it one after the other.
fn as_under_runc(outside: &Outside, number: u8, plugins: &[Value]) {
    let pod = Namespace::new("pod").unwrap();
    let path = pod.path();
    // The plugins leave something behind with every runtime; create that first.
    Attachment::add(&path, "eth0", plugins).unwrap().delete().unwrap();
    let (empty, host) = (pod.seen().unwrap(), of_host().unwrap());
    let attachment = Attachment::add(&path, "eth0", plugins).unwrap();
    pod.settle().unwrap();
    let echo = ["busybox", "nc", "-ll", "-p", "7", "-e", "cat"];
    let mut here = Command::new(echo[0]);
    here.args(&echo[1..]);
    let _echoes = [here, outside.0.command(&echo)].map(|it| Serving::start(it).unwrap());

    let bundle = pod.of(probe(number)).unwrap();
    let before = pod.seen().unwrap();
    let (runc, ours) = (Runtime::runc().unwrap(), Runtime::new().unwrap());
    let [theirs, our] = [&runc, &ours].map(|runtime| told(&runtime.run("one", &bundle).unwrap()));
    assert!(theirs.1.contains("reached\n"), "{plugins:?} {theirs:?}");
    assert_eq!(theirs.1.contains("by six"), theirs.1.contains("inet6 fd"), "{theirs:?}");
    assert_eq!(our, theirs, "{plugins:?}");
    assert_eq!(pod.seen().unwrap(), before, "{plugins:?}");
    attachment.delete().unwrap();
    assert_eq!(pod.seen().unwrap(), empty, "{plugins:?}");
    assert_eq!(of_host().unwrap(), host, "{plugins:?}");
    ours.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite callers_long"]
fn every_kind_of_interface_is_as_under_runc() {
    let outside = Outside::new();
    let chain = [
        bridge(),
        json!({"type": "tuning", "mac": "02:00:00:00:41:02", "mtu": 1400}),
        json!({"type": "firewall"}),
        json!({"type": "bandwidth", "ingressRate": 80_000_000, "ingressBurst": 80_000_000,
               "egressRate": 80_000_000, "egressBurst": 80_000_000}),
    ];
    as_under_runc(&outside, 41, &chain);
    // This plugin removes routes that the kernel has made.
    as_under_runc(&outside, 42, &[json!({"type": "ptp", "ipMasq": true, "ipam": ipam(42)})]);
    let on_outer = |kind: &str, number| {
        let mut plugin = json!({"type": kind, "master": "outer", "ipam": ipam(number)});
        plugin["vlanId"] = json!(5);
        plugin
    };
    as_under_runc(&outside, 44, &[on_outer("macvlan", 44)]);
    as_under_runc(&outside, 44, &[on_outer("ipvlan", 44)]);
    as_under_runc(&outside, 45, &[on_outer("vlan", 45)]);
}

#[test]
fn containers_of_a_bridge_reach_each_other_by_ports_of_the_host_too() {
    let host = {
        let pod = Namespace::new("first").unwrap();
        let path = pod.path();
        Attachment::add(&path, "eth0", &mapped()).unwrap().delete().unwrap();
        drop(pod);
        of_host().unwrap()
    };
    let [first, second] = ["first", "second"].map(|name| Namespace::new(name).unwrap());
    let paths = [first.path(), second.path()];
    let ours = Attachment::add(&paths[0], "eth0", &mapped()).unwrap();
    let theirs = Attachment::add(&paths[1], "eth0", &[bridge()]).unwrap();
    let (runtime, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());

    let serves = Bundle::script("nc -ll -p 7 -e cat & exec /mnt/datagrams echo 9").unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_datagrams"));
    let serves = serves.mount(bind(program, "/mnt/datagrams", &["ro"])).unwrap();
    let serves = first.of(serves).unwrap();
    runtime.create("served", &serves).unwrap();
    runtime.ok(&["start", "served"]).unwrap();
    let waits = second.of(Bundle::script("nc -ll -p 7 -e cat").unwrap()).unwrap();
    runc.create("theirs", &waits).unwrap();
    runc.ok(&["start", "theirs"]).unwrap();

    let addresses = ours.addresses().into_iter().zip(theirs.addresses());
    let asks = |runtime: &Runtime, container: &str, whom: &str| {
        let ask = format!("ping -c 1 -W 20 {whom} >/dev/null && echo asked | nc -w 20 {whom} 7");
        runtime.ok(&["exec", container, "sh", "-c", &ask]).unwrap()
    };
    for (ours, theirs) in addresses {
        assert_eq!(asks(&runtime, "served", &theirs), "asked\n");
        assert_eq!(asks(&runc, "theirs", &ours), "asked\n");
    }
    // The mapped port, through addresses of the host.
    let through = |whom: &str| {
        let mut ask = Command::new("sh");
        ask.args(["-c", &format!("echo mapped | busybox nc -w 20 {whom} 8007")]);
        told(&ask.output().unwrap()).1
    };
    assert_eq!(through("10.41.0.1"), "mapped\n");
    assert_eq!(through("127.0.0.1"), "mapped\n");
    echoed_by_udp("10.41.0.1", "10.41.0.1:8009").unwrap();

    for (runtime, name) in [(&runtime, "served"), (&runc, "theirs")] {
        runtime.ok(&["delete", "--force", name]).unwrap();
    }
    theirs.delete().unwrap();
    ours.delete().unwrap();
    drop((first, second));
    assert_eq!(of_host().unwrap(), host);
    runtime.assert_clean().unwrap();
}

/// A bridge, with host ports that are mapped to a container on it.
fn mapped() -> [Value; 2] {
    let ports = json!([
        {"hostPort": 8007, "containerPort": 7, "protocol": "tcp"},
        {"hostPort": 8009, "containerPort": 9, "protocol": "udp"},
    ]);
    let capable = json!({"portMappings": true});
    let mappings = json!({"portMappings": ports});
    [bridge(), json!({"type": "portmap", "capabilities": capable, "runtimeConfig": mappings})]
}

#[test]
fn rules_that_say_which_routes_count_are_as_under_runc() {
    let pod = Namespace::new("pod").unwrap();
    let path = pod.path();
    let mut bridge = bridge();
    bridge["ipam"] = json!({
        "type": "host-local", "subnet": "10.43.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]
    });
    bridge["bridge"] = json!("cni43");
    let attachment = Attachment::add(&path, "eth0", &[bridge, json!({"type": "sbr"})]).unwrap();
    let script = "ip rule; ip route show table 100 | grep default; \
        own=$(ip -o -4 address show dev eth0 | sed 's/.*inet //;s,/.*,,'); \
        ping -c 1 -W 20 -I $own 10.43.0.1 >/dev/null && echo reached";
    let bundle = pod.of(Bundle::script(script).unwrap()).unwrap();
    let (runc, ours) = (Runtime::runc().unwrap(), Runtime::new().unwrap());
    let [theirs, our] = [&runc, &ours].map(|runtime| told(&runtime.run("one", &bundle).unwrap()));
    assert!(theirs.1.contains("from 10.43.0.") && theirs.1.ends_with("reached\n"), "{theirs:?}");
    assert_eq!(our, theirs);
    attachment.delete().unwrap();
    ours.assert_clean().unwrap();
}
