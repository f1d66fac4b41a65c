//! Docker's networks: containers on a bridge reach each other under either runtime.

use std::fs;

use bulkhead_tests::docker::Docker;
use bulkhead_tests::runtime::told;
use bulkhead_tests::traffic::says;

use super::wait_for_nothing;

/// Serves its name on port 80.
const SERVES: &str = "hostname > /index.html; exec httpd -f -p 80 -h /";

/// Starts a container that serves its name; returns its address.
fn serve(docker: &Docker, runtime: &str, options: &[&str]) -> String {
    let fixed = ["run", "-d", "--runtime", runtime, "--name", runtime, "--hostname", runtime];
    docker.ok(&[&fixed[..], options, &["box", "sh", "-c", SERVES]].concat()).unwrap();
    let format = "{{.NetworkSettings.IPAddress}}";
    docker.ok(&["inspect", "--format", format, runtime]).unwrap().trim().to_owned()
}

#[test]
fn containers_of_a_bridge_reach_each_other_and_are_reached() {
    let docker = Docker::shared().unwrap();
    let ours = serve(&docker, "bulkhead", &["--publish", "127.0.0.1:8080:80"]);
    let theirs = serve(&docker, "runc", &[]);
    assert_eq!(says("127.0.0.1:8080").unwrap(), "bulkhead");
    assert_eq!(says(&ours).unwrap(), "bulkhead");
    assert_eq!(says(&theirs).unwrap(), "runc");

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

/// A DNS query for the address of `two` over TCP: RFC 1035 §4.2.2.
const BY_CONNECTION: &str = "printf '\\000\\025\\022\\064\\001\\000\\000\\001\\000\\000\\000\\000\\000\\000\\003two\\000\\000\\001\\000\\001' \
     | nc -w 5 127.0.0.11 53 | od -A n -t x1";

#[test]
fn networks_of_a_daemon_have_names_and_are_joined_and_left_while_a_container_runs() {
    let docker = Docker::shared().unwrap();
    docker.ok(&["network", "create", "named"]).unwrap();
    let serve = |runtime: &str, name: &str, network: &str| {
        let fixed = ["run", "-d", "--runtime", runtime, "--name", name, "--hostname", name];
        let line = [&fixed[..], &["--network", network, "box", "sh", "-c", SERVES]].concat();
        docker.ok(&line).unwrap();
    };
    serve("bulkhead", "one", "named");
    serve("runc", "two", "named");
    let inside = |name: &str, line: &str| {
        let (_, out, err) = told(&docker.call(&["exec", name, "sh", "-c", line]).unwrap());
        (out + &err).trim().to_owned()
    };
    let asks = |who: &str, whom: &str| inside(who, &format!("wget -q -O - http://{whom}/"));
    assert_eq!((asks("one", "two"), asks("two", "one")), ("two".to_owned(), "one".to_owned()));
    for line in
        ["nslookup two | sort", "nslookup one.named | sort", "cat /etc/resolv.conf", BY_CONNECTION]
    {
        assert_eq!(inside("one", line), inside("two", line), "{line}");
    }
    // Port 53 is free for a name server in the container.
    assert_eq!(inside("one", "httpd -p 53 -h / && wget -q -O - http://127.0.0.1:53/"), "one");

    serve("bulkhead", "late", "bridge");
    let interfaces = || inside("late", "ls /sys/class/net | grep eth");
    assert_eq!(interfaces(), "eth0");
    // The daemon uses a new number for each interface.
    for added in ["eth1", "eth2"] {
        docker.ok(&["network", "connect", "named", "late"]).unwrap();
        assert_eq!(interfaces(), format!("eth0\n{added}"));
        assert_eq!(
            (asks("late", "two"), asks("two", "late")),
            ("two".to_owned(), "late".to_owned())
        );
        docker.ok(&["network", "disconnect", "named", "late"]).unwrap();
        assert_eq!(interfaces(), "eth0");
    }
    docker.ok(&["rm", "--force", "one", "two", "late"]).unwrap();
    docker.ok(&["network", "rm", "named"]).unwrap();
    wait_for_nothing(docker.directory());
}
