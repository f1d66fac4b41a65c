//! Programs that use and configure a container's network: the output is the same as under runc, and
//! traffic passes.

use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::netns::{Namespace, Wired};
use bulkhead_tests::runtime::{Runtime, comes_true, told};
use bulkhead_tests::tools;

/// The multicast group that the test sends to and listens to.
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);

/// Runs a bundle in a network under runc and under Bulkhead; both must do the same. Returns the
/// output.
fn alike(wired: &Wired, bundle: Bundle) -> String {
    let bundle = wired.pod.of(bundle).unwrap();
    let (runc, ours) = (Runtime::runc().unwrap(), Runtime::new().unwrap());
    let run = |runtime: &Runtime| told(&runtime.run("one", &bundle).unwrap());
    let [theirs, our] = [run(&runc), run(&ours)];
    assert_eq!(our, theirs);
    ours.assert_clean().unwrap();
    our.1
}

#[test]
fn raw_sockets_need_the_capability_and_tcpdump_sees_what_passes() {
    let wired = Wired::new().unwrap();
    let script = "tcpdump -Z root -n -c 2 -i eth0 icmp >/tmp/seen 2>/tmp/words & \
        until grep -q listening /tmp/words; do kill -0 $! || exit; sleep 0.1; done; \
        busybox ping -c 3 -W 20 10.9.0.1 | grep -c 'bytes from'; wait; \
        sed 's/^[^ ]* //;s/id [0-9]*/id/' /tmp/seen";
    let seen = alike(&wired, tools::bundle(script).unwrap());
    assert!(seen.starts_with("3\nIP 10.9.0.2 > 10.9.0.1: ICMP echo request"), "{seen}");

    let bare = tools::bundle("busybox ping -c 1 10.9.0.1; tcpdump -Z root -i eth0 -c 1")
        .unwrap()
        .with(|spec| {
            for set in ["bounding", "effective", "permitted"] {
                let set = spec["process"]["capabilities"][set].as_array_mut().unwrap();
                set.retain(|power| power != "CAP_NET_RAW" && power != "CAP_NET_ADMIN");
            }
        });
    alike(&wired, bare.unwrap());
}

/// Sends to a multicast group until it has received a message of another host, and prints it.
const GROUPED: &str = r#"
import socket, struct
group = "239.1.2.3"
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
s.bind(("", 5000))
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + bytes(4))
s.settimeout(0.2)
heard = 0
while heard < 3:
    s.sendto(b"from inside", (group, 5000))
    try:
        heard += s.recv(100) == b"from outside"
    except TimeoutError:
        pass
print("heard")
"#;

#[test]
fn a_group_is_heard_inside_and_outside() {
    let wired = Wired::new().unwrap();
    let outside = UdpSocket::bind((GROUP, 5000)).unwrap();
    outside.join_multicast_v4(&GROUP, &Ipv4Addr::new(10, 9, 0, 1)).unwrap();
    outside.set_multicast_loop_v4(false).unwrap();
    outside.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = scope.spawn(|| {
            let (mut heard, mut bytes) = (0, [0; 100]);
            while !over.load(Ordering::Relaxed) {
                let received = outside.recv(&mut bytes);
                if received.is_ok_and(|count| &bytes[..count] == b"from inside") {
                    heard += 1;
                    outside.send_to(b"from outside", (GROUP, 5000)).unwrap();
                }
            }
            heard
        });
        let bundle = tools::bundle(&format!("exec python3 -c '{GROUPED}'")).unwrap();
        let said = alike(&wired, bundle);
        over.store(true, Ordering::Relaxed);
        assert_eq!(said, "heard\n");
        assert!(talk.join().unwrap() >= 6);
    });
}

/// A router for a network of its own: masquerading, packet filters of both kinds, a bridge.
const ROUTER: &str = r#"
set -e
echo 1 > /proc/sys/net/ipv4/ip_forward
ip link add bridge type bridge
ip address add 10.77.0.1/24 dev bridge
ip link set bridge up
for i in 2 3; do
    ip netns add inner$i
    ip link add port$i type veth peer name eth0 netns inner$i
    ip link set port$i master bridge up
    ip -n inner$i link set eth0 up
    ip -n inner$i address add 10.77.0.$i/24 dev eth0
    ip -n inner$i route add default via 10.77.0.1
done
ip netns exec inner2 busybox ping -c 1 -W 20 10.77.0.3 >/dev/null && echo over the bridge
iptables -t nat -A POSTROUTING -s 10.77.0.0/24 -o eth0 -j MASQUERADE
iptables -t nat -A PREROUTING -i eth0 -p tcp --dport 8077 -j DNAT --to-destination 10.77.0.2:7
ip netns exec inner2 busybox ping -c 1 -W 20 10.9.0.1 >/dev/null && echo masqueraded
iptables -S; iptables -t nat -S
iptables -A OUTPUT -d 10.9.0.1 -p icmp -j DROP
busybox ping -c 1 -W 1 10.9.0.1 >/dev/null 2>&1 || echo dropped by iptables
iptables -F OUTPUT
nft -f - <<END
table inet filter {
    chain output {
        type filter hook output priority 0; policy accept;
        ip daddr 10.9.0.1 icmp type echo-request counter drop
    }
}
END
busybox ping -c 1 -W 1 10.9.0.1 >/dev/null 2>&1 || echo dropped by nftables
nft list table inet filter
nft delete table inet filter
busybox ping -c 1 -W 20 10.9.0.1 >/dev/null && echo reached again
"#;

#[test]
fn a_container_filters_translates_and_bridges_for_networks_of_its_own() {
    let ours = Runtime::new().unwrap();
    let [theirs, our] = [&Runtime::runc().unwrap(), &ours].map(|runtime| {
        // Changes to the network and to the files stay, so each runtime gets new ones.
        let wired = Wired::new().unwrap();
        let bundle = wired.pod.of(tools::bundle(ROUTER).unwrap()).unwrap();
        told(&runtime.run("one", &bundle).unwrap())
    });
    assert_eq!(our, theirs);
    ours.assert_clean().unwrap();
    let said = our.1;
    for words in
        ["over the bridge", "masqueraded", "dropped by iptables", "packets 1", "reached again"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
#[ignore = "long: --suite network_long"]
fn the_older_iptables_filters_too_and_ports_are_translated_to_a_nested_network() {
    let wired = Wired::new().unwrap();
    let script = format!(
        "{ROUTER}\nip netns exec inner2 busybox nc -ll -p 7 -e cat &\n\
         iptables-legacy -A INPUT -p icmp -j REJECT\niptables-legacy -S INPUT\nsleep 1000"
    );
    let bundle = wired.pod.of(tools::bundle(&script).unwrap()).unwrap();
    let runtime = Runtime::new().unwrap();
    runtime.create("router", &bundle).unwrap();
    runtime.ok(&["start", "router"]).unwrap();
    let asked = || {
        let ask = "echo through | timeout 10 busybox nc 10.9.0.2 8077";
        let output = Command::new("sh").args(["-c", ask]).output();
        output.is_ok_and(|Output { stdout, .. }| stdout == b"through\n")
    };
    assert!(comes_true(Duration::from_secs(120), asked), "no answer from the nested network");
    let ping = || {
        let ping = ["ping", "-c", "1", "-W", "1", "10.9.0.2"];
        Command::new("busybox").args(ping).output().unwrap().status.success()
    };
    assert!(comes_true(Duration::from_secs(60), || !ping()), "the filter lets an echo pass");
    runtime.ok(&["delete", "--force", "router"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn two_containers_have_a_network_of_their_own_over_the_one_between_them() {
    let [one, other] = ["one", "other"].map(|name| Namespace::new(name).unwrap());
    one.ip("link add eth0 type veth peer name eth0 netns other").unwrap();
    let runtime = Runtime::new().unwrap();
    let start = |pod: &Namespace, own: u8, peer: u8| {
        pod.ip(&format!("address add 10.9.0.{own}/24 dev eth0")).unwrap();
        pod.ip("link set eth0 up").unwrap();
        let script = format!(
            "set -e; ip link add over type vxlan id 42 remote 10.9.0.{peer} dstport 4789 dev eth0; \
             ip address add 10.78.0.{own}/24 dev over; ip link set over up; \
             busybox nc -ll -p 7 -e cat & exec sleep 1000"
        );
        (pod.of(tools::bundle(&script).unwrap()).unwrap(), format!("vtep-{own}"))
    };
    let pods = [start(&one, 1, 2), start(&other, 2, 1)];
    for (bundle, name) in &pods {
        runtime.create(name, bundle).unwrap();
        runtime.ok(&["start", name]).unwrap();
    }
    for (own, peer) in [(1, 2), (2, 1)] {
        let ask = format!(
            "tries=0; until echo up | busybox nc -w 5 10.78.0.{peer} 7 | grep -q up; do \
             tries=$((tries + 1)); [ $tries -lt 100 ] || exit 1; sleep 0.2; done; \
             seq 20000 | busybox nc -w 30 10.78.0.{peer} 7 | wc -l; \
             cat /sys/class/net/over/mtu"
        );
        let said = runtime.ok(&["exec", &format!("vtep-{own}"), tools::SHELL, "-c", &ask]).unwrap();
        assert_eq!(said, "20000\n1450\n");
    }
    for (_, name) in &pods {
        runtime.ok(&["delete", "--force", name]).unwrap();
    }
    runtime.assert_clean().unwrap();
}
