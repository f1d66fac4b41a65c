//! Two containers on one network: measuring, watching, tunnels, files and time.

use crate::room::{Container, Debian, Lan, Room, alone, same};

/// Two containers on a network, which may change it.
fn pair<'a>(room: &'a Room, lan: &Lan) -> [Container<'a>; 2] {
    let [first, second] = [("first", 0), ("second", 1)].map(|(id, end)| {
        let container = room.waiting(id).on(&lan.ends[end]).privileged().with_tun();
        container.start();
        container
    });
    first.until("ping -c 1 -W 1 10.8.0.2");
    [first, second]
}

#[test]
#[ignore = "long: --suite week"]
fn iperf_and_tcpdump() {
    let right = "tcp: received more than a MiB True\nudp: lost less than all True\nbidirectional True\n\
                 seen: Flags [S] Flags [S.] Flags [.]";
    same("iperf3 and tcpdump between two", Debian::More, right, |room| {
        let lan = Lan::new();
        let [first, second] = pair(room, &lan);
        second.exec("iperf3 --server --daemon");
        second.until("ss -ltn | grep -q 5201");
        first.exec("iperf3 --client 10.8.0.2 --time 2 --json > /tmp/tcp");
        first.exec("iperf3 --client 10.8.0.2 --time 2 --udp --bitrate 5M --json > /tmp/udp");
        first.exec("iperf3 --client 10.8.0.2 --time 2 --bidir --parallel 2 --json > /tmp/both");
        let mut did = first.exec(
            r#"python3 -c '
import json
end = lambda name: json.load(open("/tmp/" + name))["end"]
print("tcp: received more than a MiB", end("tcp")["sum_received"]["bytes"] > 1 << 20)
print("udp: lost less than all", end("udp")["sum"]["lost_percent"] < 100)
both = end("both")
print("bidirectional", both["sum_received"]["bytes"] > 0 and both["sum_received_bidir_reverse"]["bytes"] > 0)'"#,
        );
        first.exec("tcpdump -Z root -l -n -i eth0 tcp port 7777 > /tmp/seen 2> /tmp/said & until grep -q listening /tmp/said; do sleep 0.1; done");
        second.exec("python3 -m http.server 7777 > /dev/null 2>&1 &");
        second.until("ss -ltn | grep -q 7777");
        first.exec(
            "python3 -c 'import urllib.request as u; u.urlopen(\"http://10.8.0.2:7777\").read()'",
        );
        first.until("[ $(wc -l < /tmp/seen) -ge 3 ]");
        let seen = first.exec("head -n 3 /tmp/seen | grep -o 'Flags [^,]*' | tr '\\n' ' '");
        did += &format!("\nseen: {seen}");
        second.end_by("KILL");
        first.end_by("KILL");
        did
    });
}

/// OpenVPN with a key that both have.
const TUNNEL: &str = "exec openvpn --dev tun --proto udp --secret /v/key --cipher AES-256-CBC --verb 1 \
                      --providers legacy default";

#[test]
#[ignore = "long: --suite week"]
fn openvpn() {
    let right =
        "3 received\n10.99.0.1/32 peer\nread through the tunnel: served\nended with the tunnel";
    same("OpenVPN over tun", Debian::More, right, |room| {
        let lan = Lan::new();
        let [first, second] = pair(room, &lan);
        first.exec("openvpn --genkey secret /v/key");
        first.exec(&format!(
            "({TUNNEL} --remote 10.8.0.2 --ifconfig 10.99.0.1 10.99.0.2) > /v/vpn1 2>&1 &"
        ));
        second.exec(&format!(
            "({TUNNEL} --remote 10.8.0.1 --ifconfig 10.99.0.2 10.99.0.1) > /v/vpn2 2>&1 &"
        ));
        first.until("ping -c 1 -W 1 10.99.0.2");
        let mut did = first.exec("ping -c 3 -i 0.2 10.99.0.2 | grep -o '[0-9]* received'") + "\n";
        did += &first.exec(
            "ip -o -4 address show dev tun0 | grep -o '10.99.0.1 peer' | sed 's| peer|/32 peer|'",
        );
        second.exec("mkdir -p /tmp/site; echo served > /tmp/site/page; cd /tmp/site; python3 -m http.server 80 > /dev/null 2>&1 &");
        second.until("ss -ltn | grep -q ':80 '");
        let read = "python3 -c 'import urllib.request as u; print(u.urlopen(\"http://10.99.0.2/page\").read().decode().strip())'";
        did += &format!("\nread through the tunnel: {}", first.exec(read));
        // Its first process does not reap it, so pgrep(1) would find it for ever.
        first.exec("pkill openvpn");
        first.until("! ip link show dev tun0");
        did += "\nended with the tunnel";
        second.end_by("KILL");
        first.end_by("KILL");
        did
    });
}

#[test]
#[ignore = "long: --suite week"]
fn wireguard() {
    let right = "3 received\nhandshake true\nroamed: 3 received";
    alone("WireGuard between two", Debian::More, right, |room| {
        let lan = Lan::new();
        let [first, second] = pair(room, &lan);
        for (end, number) in [(&first, 1), (&second, 2)] {
            end.exec(&format!("wg genkey | tee /tmp/key | wg pubkey > /v/public{number}"));
        }
        for (end, number, other) in [(&first, 1, 2), (&second, 2, 1)] {
            end.exec(&format!(
                "ip link add wg0 type wireguard; ip address add 10.66.0.{number}/24 dev wg0; \
                 wg set wg0 private-key /tmp/key listen-port 5182{number} peer $(cat /v/public{other}) \
                 allowed-ips 10.66.0.{other}/32 endpoint 10.8.0.{other}:5182{other}; \
                 ip link set wg0 up"
            ));
        }
        first.until("ping -c 1 -W 1 10.66.0.2");
        let ping = "ping -c 3 -i 0.2 10.66.0.2 | grep -o '[0-9]* received'";
        let mut did = first.exec(ping);
        let shaken = "[ $(wg show wg0 latest-handshakes | cut -f 2) -gt 1000000000 ] && echo true";
        did += &format!("\nhandshake {}", first.exec(shaken));
        first.exec("wg set wg0 listen-port 51900");
        first.until("ping -c 1 -W 1 10.66.0.2");
        did += &format!("\nroamed: {}", first.exec(ping));
        second.end_by("KILL");
        first.end_by("KILL");
        did
    });
}

const EXPORT: &str = r#"
mkdir -p /run/sendsigs.omit.d /srv/export
mount -t tmpfs tmpfs /srv/export
echo 'from the server' > /srv/export/file
echo '/srv/export 10.8.0.0/24(rw,no_root_squash,fsid=0,no_subtree_check)' > /etc/exports
mount -t nfsd nfsd /proc/fs/nfsd
exportfs -ra
rpc.nfsd --no-nfs-version 3 --nfs-version 4 2
rpc.mountd --no-nfs-version 3 || true
cat /proc/fs/nfsd/threads
"#;
const CLIENT: &str = r#"
mkdir -p /mnt/nfs; mount -t nfs4 -o vers=4.2 10.8.0.2:/ /mnt/nfs
cat /mnt/nfs/file
echo 'from the client' > /mnt/nfs/new; mkdir /mnt/nfs/d; ln -s new /mnt/nfs/link; mv /mnt/nfs/new /mnt/nfs/d/moved
head -c 3000000 /dev/urandom > /mnt/nfs/large; sha256sum < /mnt/nfs/large > /mnt/nfs/sum
flock -n /mnt/nfs/file echo locked
ls /mnt/nfs /mnt/nfs/d
"#;

#[test]
#[ignore = "long: --suite week"]
fn nfs() {
    let right = "2\nfrom the server\nlocked\n/mnt/nfs:\nd\nfile\nlarge\nlink\nsum\n\n/mnt/nfs/d:\nmoved\n\
                 from the client\nequal\nseen after a change: changed\nunmounted";
    alone("NFS between two", Debian::More, right, |room| {
        let lan = Lan::new();
        let [client, server] = pair(room, &lan);
        let mut did = server.exec(EXPORT) + "\n" + &client.exec(CLIENT) + "\n";
        did += &server.exec("cat /srv/export/d/moved; sha256sum < /srv/export/large | cmp - /srv/export/sum && echo equal");
        server.exec("echo changed > /srv/export/file");
        client.until("grep -q changed /mnt/nfs/file");
        did += &format!("\nseen after a change: {}", client.exec("cat /mnt/nfs/file"));
        client.exec("umount /mnt/nfs");
        server.exec("rpc.nfsd 0; exportfs -ua; umount /proc/fs/nfsd");
        client.end_by("KILL");
        server.end_by("KILL");
        did + "\nunmounted"
    });
}

#[test]
#[ignore = "long: --suite week"]
fn chrony() {
    let right = "within 50 ms of the server: true\nof the host: true";
    same("chrony asks a server", Debian::More, right, |room| {
        let lan = Lan::new();
        let [client, server] = pair(room, &lan);
        server.exec("printf 'local stratum 5\\nallow 10.8.0.0/24\\ncmdport 0\\n' > /tmp/conf; chronyd -x -f /tmp/conf");
        server.until("ss -lun | grep -q ':123 '");
        // It measures and does not set, and says by how much the clock is wrong.
        let ask = "chronyd -Q -t 60 'server 10.8.0.2 iburst' 2>&1 | sed -n 's/.*wrong by \\(-\\?[0-9.]*\\) seconds.*/\\1/p'";
        let wrong: f64 = client.exec(ask).parse().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let inside: f64 = client.exec("date +%s.%N").parse().unwrap();
        // To ask takes time too.
        let apart = inside - now.as_secs_f64();
        let did = format!(
            "within 50 ms of the server: {}\nof the host: {}",
            wrong.abs() < 0.05,
            (0.0..5.0).contains(&apart)
        );
        client.end_by("KILL");
        server.end_by("KILL");
        did
    });
}
