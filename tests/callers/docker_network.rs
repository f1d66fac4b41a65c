//! Docker's options for a container's network: what the container sees, whom it reaches and how it
//! is reached are as under runc.

use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use bulkhead_tests::docker::{Docker, Shared};
use bulkhead_tests::netns::of_host;
use bulkhead_tests::runtime::{comes_true, told};
use bulkhead_tests::traffic::{echoed_by_udp, says};

use super::{NETWORK, wait_for_nothing};

/// The network of most containers.
const OWN: [&str; 2] = ["--network", "own"];

/// Returns the shared daemon with the IPv4 and IPv6 network `own`.
fn networked() -> Shared {
    let docker = Docker::shared().unwrap();
    if !docker.call(&["network", "inspect", "own"]).unwrap().status.success() {
        let subnets = ["--subnet", "10.51.0.0/24", "--ipv6", "--subnet", "fd51::/64"];
        docker.ok(&[&["network", "create"][..], &subnets, &["own"]].concat()).unwrap();
    }
    docker
}

/// Runs a script in a new container, with options that are split at spaces.
fn run(
    docker: &Docker,
    runtime: &str,
    options: &str,
    script: &str,
) -> (Option<i32>, String, String) {
    let mut line = vec!["run", "--rm", "--name", "seen", "--runtime", runtime];
    line.extend(options.split_whitespace());
    line.extend(["box", "sh", "-c", script]);
    told(&docker.call(&line).unwrap())
}

/// Runs a script in a running container; returns its standard output and standard error.
fn inside(docker: &Docker, name: &str, script: &str) -> String {
    let (_, out, err) = told(&docker.call(&["exec", name, "sh", "-c", script]).unwrap());
    (out + &err).trim().to_owned()
}

/// Waits until the state of the host's networks, namespaces included, is the same as before.
fn wait_for(before: &str) {
    // The link-local address of a bridge appears only after duplicate address detection.
    let of_bridges = |state: &str| -> Vec<String> {
        state.lines().filter(|line| !line.contains("fe80:")).map(str::to_owned).collect()
    };
    let mut now = String::new();
    let same = comes_true(Duration::from_secs(20), || {
        now = of_host().unwrap();
        of_bridges(&now) == of_bridges(before)
    });
    assert!(same, "before: {before}\nnow: {now}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(" nsfs "), "{mounts}");
}

#[test]
fn addresses_and_names_that_are_asked_for_are_as_under_runc() {
    let docker = &*networked();
    let all = "--network own --ip 10.51.0.9 --ip6 fd51::9 --mac-address 02:00:00:00:51:09 \
               --add-host friend:10.51.0.1 --add-host six:fd51::1 --hostname named --domainname of \
               --dns 10.51.0.1 --dns-search there --dns-opt timeout:2";
    let plain = "--network bridge --mac-address 02:00:00:00:51:0a --add-host friend:172.17.0.1 \
                 --add-host six:127.0.0.1 --hostname plain --dns 10.9.9.9 --dns-search there";
    for options in [all, plain] {
        let expected = run(docker, "runc", options, NETWORK);
        assert!(
            expected.1.ends_with("friend reached\n") || expected.1.contains("six reached"),
            "{expected:?}"
        );
        let before = of_host().unwrap();
        assert_eq!(run(docker, "bulkhead", options, NETWORK), expected, "{options}");
        wait_for(&before);
    }
    wait_for_nothing(docker.directory());
}

/// A name server that answers every query for an IPv4 address with the same one. An empty datagram
/// ends it.
fn answer_names(place: &str) -> thread::JoinHandle<()> {
    let socket = UdpSocket::bind(place).unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((count, whom)) = socket.recv_from(&mut bytes) {
            let asked = &bytes[..count];
            if asked.is_empty() {
                break;
            }
            // RFC 1035: an answer, with a record for the name in the question if IPv4 was asked
            // for.
            let name = 12 + asked[12..].iter().position(|byte| *byte == 0).unwrap();
            let known = u8::from(asked[name + 1..name + 3] == [0, 1]);
            let mut answer = [&asked[..2], &[0x81, 0x80, 0, 1, 0, known, 0, 0, 0, 0]].concat();
            answer.extend(&asked[12..name + 5]);
            if known == 1 {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
            }
            let _ = socket.send_to(&answer, whom);
        }
    })
}

#[test]
fn names_of_elsewhere_are_asked_where_the_option_says() {
    let docker = &*networked();
    let server = answer_names("10.51.0.1:53");
    let script = "timeout 30 nslookup -type=a elsewhere.example";
    let [theirs, ours] = ["runc", "bulkhead"]
        .map(|runtime| run(docker, runtime, "--network own --dns 10.51.0.1", script));
    assert!(theirs.1.contains("192.0.2.7"), "{theirs:?}");
    assert_eq!(ours, theirs);
    UdpSocket::bind("10.51.0.1:0").unwrap().send_to(&[], "10.51.0.1:53").unwrap();
    server.join().unwrap();
    wait_for_nothing(docker.directory());
}

/// Serves its name on three TCP ports, and echoes on UDP port 9.
const SERVES: &str = "hostname > /index.html; for port in 80 81 82; do httpd -p $port -h /; done; \
                      exec /datagrams echo 9";

#[test]
fn containers_reach_each_other_by_both_families_and_are_reached_by_published_ports() {
    let docker = &*networked();
    run(docker, "runc", "--network own", "true");
    let before = of_host().unwrap();
    let program = format!("{}:/datagrams:ro", env!("CARGO_BIN_EXE_datagrams"));
    let serve = |runtime: &str, name: &str, options: &[&str]| {
        let fixed = ["run", "-d", "--runtime", runtime, "--name", name, "--hostname", name];
        let line = [&fixed[..], &OWN, &["-v", &program], options, &["box", "sh", "-c", SERVES]];
        docker.ok(&line.concat()).unwrap();
    };
    let ports = ["-p", "8080-8082:80-82", "-p", "8009:9/udp"];
    let addresses = ["--ip", "10.51.0.9", "--ip6", "fd51::9", "--network-alias", "alias"];
    serve("bulkhead", "ours", &[&ports[..], &addresses].concat());
    serve("runc", "theirs", &["--ip", "10.51.0.8", "--ip6", "fd51::8"]);

    for port in 8080..=8082 {
        assert_eq!(says(&format!("127.0.0.1:{port}")).unwrap(), "ours");
    }
    assert_eq!(says("[::1]:8080").unwrap(), "ours");
    for place in ["10.51.0.1:8009", "127.0.0.1:8009"] {
        echoed_by_udp(place.split(':').next().unwrap(), place).unwrap();
    }
    let asks = |who: &str, whom: &str| {
        inside(docker, who, &format!("timeout 20 wget -q -O - http://{whom}/"))
    };
    for (who, name, six) in [("ours", "theirs", "fd51::8"), ("theirs", "ours", "fd51::9")] {
        assert_eq!(asks(who, name), name);
        assert_eq!(asks(who, &format!("[{six}]")), name);
        let ping = format!("timeout 20 ping -6 -c 1 {six} | grep -c ' 0% packet loss'");
        assert_eq!(inside(docker, who, &ping), "1");
    }
    assert_eq!(asks("theirs", "alias"), "ours");
    let shown = "{{range .Containers}}{{.Name}} {{.IPv4Address}} {{.IPv6Address}}\n{{end}}";
    let shown = docker.ok(&["network", "inspect", "--format", shown, "own"]).unwrap();
    let mut shown: Vec<_> = shown.lines().collect();
    shown.sort_unstable();
    assert_eq!(shown, ["ours 10.51.0.9/24 fd51::9/64", "theirs 10.51.0.8/24 fd51::8/64"]);

    moves(docker, &asks);
    docker.ok(&["rm", "--force", "ours", "theirs"]).unwrap();
    wait_for(&before);
    wait_for_nothing(docker.directory());
}

/// Both containers leave the network and come back with other addresses, one after the other.
fn moves(docker: &Docker, asks: &dyn Fn(&str, &str) -> String) {
    let interface = "ip -o addr | grep -v fe80 | sed 's/^[0-9]*: //'; ip route; \
                     ip -6 route | grep -v ^multicast | sort; grep 77 /etc/hosts";
    let seen = ["theirs", "ours"].map(|name| {
        docker.ok(&["network", "disconnect", "own", name]).unwrap();
        assert_eq!(inside(docker, name, "ls /sys/class/net"), "lo");
        let connect = ["network", "connect", "--ip", "10.51.0.77", "--ip6", "fd51::77"];
        docker.ok(&[&connect[..], &["--alias", "moved", "own", name]].concat()).unwrap();
        let other = if name == "ours" { "theirs" } else { "ours" };
        assert_eq!(asks(other, "moved"), name);
        assert_eq!(asks(other, "[fd51::77]"), name);
        assert_eq!(asks(name, other), other);
        let seen = inside(docker, name, interface).replace(name, "NAME");
        docker.ok(&["network", "disconnect", "own", name]).unwrap();
        docker.ok(&["network", "connect", "own", name]).unwrap();
        seen
    });
    assert_eq!(seen[0], seen[1]);
}
