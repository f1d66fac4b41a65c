//! What the guest's kernel has: what programs look at, modules, which are loaded when a container asks
//! for them, and 32-bit programs. The test host's kernel has little of it, so this is tried in the
//! guest alone; the answers are those of a kernel of Debian.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use bulkhead_tests::tools;
use bulkhead_tests::vm::dist;
use serde_json::{Value, json};

/// Runs commands; says the name of the check if all of them succeed, and otherwise what they wrote.
const CHECK: &str = r#"
check() {
    if words=$(dash -ec "$2" 2>&1); then echo "$1"; else echo "$1 FAILED: $words"; fi
}
"#;

/// One check: its name and the commands.
type Check = (&'static str, &'static str);

const FILE_SYSTEMS: &[Check] = &[
    (
        "vfat",
        "truncate -s 4M /tmp/vfat
        mkfs.vfat /tmp/vfat
        mount -o loop /tmp/vfat /mnt
        echo x > /mnt/Long.name
        umount /mnt
        mount -o loop,ro /tmp/vfat /mnt
        cat /mnt/Long.name
        umount /mnt",
    ),
    (
        "squashfs",
        "for with in gzip lz4 lzo xz zstd; do
            rm -f /tmp/squash
            mksquashfs /etc/passwd /tmp/squash -quiet -no-progress -comp $with
            mount -o loop /tmp/squash /mnt
            cmp /etc/passwd /mnt/passwd
            umount /mnt
        done",
    ),
    (
        "ext4 and xfs",
        "for type in ext4 xfs; do
            truncate -s 32M /tmp/$type
            case $type in
                ext4) mkfs.ext4 -q /tmp/ext4;;
                xfs) mkfs.xfs -q --unsupported /tmp/xfs;;
            esac
            mount -o loop /tmp/$type /mnt
            echo x > /mnt/y
            umount /mnt
        done",
    ),
    (
        "others by their types",
        "for type in exfat btrfs f2fs ntfs3 iso9660 udf erofs cramfs nfs nfs4 nfsd cifs 9p autofs; do
            if mount -i -t $type none /mnt 2> /dev/null; then umount /mnt; fi
            grep -qw $type /proc/filesystems || { echo no $type; exit 1; }
        done",
    ),
    (
        "a core for a program",
        "echo '|/bin/busybox touch /tmp/helped' > /proc/sys/kernel/core_pattern
        status=0
        busybox sh -c 'ulimit -c unlimited; kill -SEGV $$' || status=$?
        echo core > /proc/sys/kernel/core_pattern
        test $status = 139",
    ),
    ("no path is a type", "! mount -i -t ../../../tmp/x none /mnt"),
    (
        "binfmt_misc",
        "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
        echo ':mine:M::mine!::/usr/bin/cat:' > /proc/sys/fs/binfmt_misc/register
        echo 'mine! told' > /tmp/mine
        chmod +x /tmp/mine
        test \"$(/tmp/mine)\" = 'mine! told'
        echo -1 > /proc/sys/fs/binfmt_misc/mine
        umount /proc/sys/fs/binfmt_misc",
    ),
];

const NETWORK: &[Check] = &[
    (
        "links",
        "ip link add base type dummy
        for type in wireguard bond team ifb nlmon vcan; do ip link add $type type $type; done
        for type in gre ipip sit vti; do
            ip link add my$type type $type local 10.1.1.1 remote 10.1.1.2
        done
        ip link add mygre6 type ip6gre local fd00::1 remote fd00::2
        ip link add secret type xfrm if_id 7
        ip link add red type vrf table 10
        ip link add vxlan type vxlan id 1 dev base dstport 4789
        ip link add geneve type geneve id 1 remote 10.1.1.2
        for type in macsec macvlan ipvlan; do
            ip link add on$type type dummy
            ip link add link on$type name my$type type $type
        done
        ip -br link show type wireguard | grep -q wireguard",
    ),
    (
        "tc",
        "tc qdisc add dev base root handle 1: htb default 10
        tc class add dev base parent 1: classid 1:10 htb rate 1mbit
        tc qdisc add dev base parent 1:10 netem delay 10ms loss 1%
        tc filter add dev base parent 1: protocol ip u32 match ip dport 80 0xffff flowid 1:10
        tc qdisc add dev base clsact
        tc filter add dev base ingress protocol ip flower ip_proto tcp action drop
        tc qdisc replace dev ifb root tbf rate 1mbit burst 10k latency 1s
        for kind in sfq prio fq fq_codel cake; do tc qdisc replace dev ifb root $kind; done
        tc qdisc show dev base | grep -q netem",
    ),
    (
        "netem delays",
        "ip address add 10.1.2.1/24 dev lo
        tc qdisc add dev lo root netem delay 150ms
        ping=$(busybox ping -c 1 10.1.2.1)
        tc qdisc del dev lo root
        echo \"$ping\" | grep -q 'time=[3-9][0-9][0-9]'",
    ),
    (
        "iptables",
        "ipset create some hash:net
        ipset add some 10.1.0.0/16
        ipset test some 10.1.2.3
        ipset create ports bitmap:port range 1-9
        ipset create both hash:ip,port
        ipset create sets list:set
        iptables -A INPUT -m set --match-set some src -j ACCEPT
        iptables -A INPUT -m hashlimit --hashlimit-above 5/sec --hashlimit-name x -j DROP
        iptables -A INPUT -p udp --dport 9 -j NFQUEUE --queue-num 3
        iptables -A INPUT -m connlimit --connlimit-above 3 -j NFLOG
        iptables -t mangle -A OUTPUT -m dscp --dscp 3 -j TTL --ttl-set 7
        ip6tables -A INPUT -m rt --rt-type 0 -j DROP
        iptables -S INPUT | grep -q 'match-set some src'",
    ),
    (
        "nft",
        "nft add table inet t
        nft add chain inet t c '{ type filter hook input priority 0; }'
        nft add rule inet t c udp dport 9 queue num 4
        nft add rule inet t c numgen random mod 2 0 counter
        nft add rule inet t c ct count over 9 drop
        nft add rule inet t c meta ipsec exists counter
        nft add flowtable inet t f '{ hook ingress priority 0; devices = { base }; }'
        nft list ruleset | grep -q 'queue'",
    ),
    (
        "ipsec",
        "from='src 10.1.1.1 dst 10.1.1.2'
        ip xfrm state add $from proto esp spi 1 mode tunnel \\
            aead 'rfc4106(gcm(aes))' 0x000102030405060708090a0b0c0d0e0f10111213 128
        ip xfrm state add $from proto ah spi 2 mode transport \\
            auth 'hmac(sha256)' 0x0001020304050607
        ip xfrm state | grep -q rfc4106",
    ),
];

/// What programs look at to find out where they run.
const FACTS: &[Check] = &[
    // Java takes the limits of its container only when it finds these.
    (
        "controllers",
        "for name in cpuset cpu cpuacct blkio memory devices freezer perf_event hugetlb pids; do
            grep -qE \"^$name[[:space:]]+0[[:space:]]+[0-9]+[[:space:]]+1\\$\" /proc/cgroups
        done",
    ),
    (
        "counters",
        "for name in pgfault pgpgin pswpout oom_kill; do grep -q \"^$name [0-9]\" /proc/vmstat; done
        for file in /proc/self/schedstat /proc/schedstat /proc/net/xfrm_stat; do
            grep -q '[0-9]' $file
        done",
    ),
    (
        "one NUMA node",
        "[ $(cat /sys/devices/system/node/online) = 0 ]
        grep -q ' N0=' /proc/self/numa_maps
        python3 -c '
import ctypes, mmap
call, nodes = ctypes.CDLL(None).syscall, ctypes.byref(ctypes.c_ulong(1))
memory = mmap.mmap(-1, 1 << 20)
start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
bind, interleave = 2, 3
assert call(237, start, 1 << 20, bind, nodes, 64, 0) == 0, \"mbind\"
assert call(238, interleave, nodes, 64) == 0, \"set_mempolicy\"
assert call(239, None, None, 0, None, 0) == 0, \"get_mempolicy\"
memory.write(bytes(1 << 20))'",
    ),
];

/// Sockets: their kinds, and bytes that pass through kTLS.
const SOCKETS: &str = r#"
import socket, struct
def pair(protocol):
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    server.bind(("127.0.0.1", 0)); server.listen()
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    client.connect(server.getsockname())
    return client, server.accept()[0]
for name, protocol in ("sctp", 132), ("mptcp", 262):
    a, b = pair(protocol); a.send(b"hello"); print(name, b.recv(9).decode())
a, b = pair(0)
for end in a, b: end.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
crypto = struct.pack("HH", 0x0303, 51) + bytes(8 + 16 + 4 + 8)
a.setsockopt(282, 1, crypto); b.setsockopt(282, 2, crypto)
a.send(b"hello"); print("tls", b.recv(9).decode())
algorithm = socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET, 0)
algorithm.bind(("hash", "sha512"))
operation, _ = algorithm.accept(); operation.sendall(b"abc"); print("alg", operation.recv(64).hex()[:8])
socket.socket(29, socket.SOCK_RAW, 1); print("can")
"#;

/// Loads every module, in an order in which nothing is missing.
const EVERY: &str = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
archive = open("/modules", "rb").read()
size = int(archive[:32].split()[2])
lines = [line.split() for line in archive[32:size].decode().splitlines()]
place = {line[1]: (int(line[2]) + size, int(line[3])) for line in lines if line[0] == "module"}
failed, done = [], {line.split()[0] for line in open("/proc/modules")}
for line in lines:
    for name in line[2:] if line[0] == "alias" else []:
        if name in done: continue
        done.add(name)
        start, length = place[name]
        loaded = libc.syscall(175, archive[start:start + length], length, b"") == 0
        # The kernel may have loaded it by itself meanwhile.
        if not loaded and ctypes.get_errno() != 17:
            failed.append(name + ": " + os.strerror(ctypes.get_errno()))
print(f"{len(place)} modules", *failed, sep="\n")
"#;

/// A static 32-bit program for `int 0x80` that writes `32 bits`, as an assembler would put it.
fn program_of_32_bits() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const TEXT: &[u8] = b"32 bits\n";
    let code_at = BASE + 52 + 32;
    let mut code = vec![0xb8, 4, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9]; // eax = write, ebx = 1, ecx =
    let text_at = code_at + 34;
    code.extend(text_at.to_le_bytes());
    code.extend([0xba, 8, 0, 0, 0, 0xcd, 0x80]); // edx = 8, int 0x80
    code.extend([0xb8, 1, 0, 0, 0, 0xbb, 7, 0, 0, 0, 0xcd, 0x80]); // eax = exit, ebx = 7, int 0x80
    assert_eq!(code.len(), 34);
    code.extend(TEXT);
    let size = 52 + 32 + u32::try_from(code.len()).unwrap();
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |file: &mut Vec<u8>, values: &[u16]| {
        values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    };
    let words = |file: &mut Vec<u8>, values: &[u32]| {
        values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    };
    halves(&mut file, &[2, 3]); // ET_EXEC, EM_386
    words(&mut file, &[1, code_at, 52, 0, 0]); // version, entry, headers, no sections, flags
    halves(&mut file, &[52, 32, 1, 0, 0, 0]);
    words(&mut file, &[1, 0, BASE, BASE, size, size, 5, 0x1000]); // PT_LOAD, read and execute
    file.extend(code);
    file
}

/// A privileged container, which lists the loop devices as Docker does.
fn privileged(script: &str) -> Bundle {
    let device = |kind: &str, path: &str, major: u32, minor: u32| json!({"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o660});
    let mut devices: Vec<Value> =
        (0..3).map(|minor| device("b", &format!("/dev/loop{minor}"), 7, minor)).collect();
    devices.push(device("c", "/dev/loop-control", 10, 237));
    tools::privileged(script)
        .unwrap()
        .with(|spec| spec["linux"]["devices"] = devices.into())
        .unwrap()
}

/// Runs the checks in a pod; all must succeed.
fn succeed(pod: &Pod, checks: &[Check]) {
    let lines = checks
        .iter()
        .map(|(name, commands)| format!("check '{name}' '{}'\n", commands.replace('\'', r"'\''")));
    let script = format!("{CHECK}{}", lines.collect::<String>());
    let (_, out, errors) = told(&pod.run("checked", &mut privileged(&script)).unwrap());
    let expected: String = checks.iter().map(|(name, _)| format!("{name}\n")).collect();
    assert_eq!(out, expected, "{errors}");
}

#[test]
fn modules_are_loaded_when_a_container_asks_for_them() {
    let pod = Pod::of(Runtime::new().unwrap()).unwrap();
    let mut bundle = Bundle::new(&["/program"]).unwrap();
    let program = bundle.rootfs().join("program");
    fs::write(&program, program_of_32_bits()).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let ran = told(&pod.run("ia32", &mut bundle).unwrap());
    assert_eq!(ran, (Some(7), "32 bits\n".to_owned(), String::new()));

    succeed(&pod, FACTS);
    succeed(&pod, FILE_SYSTEMS);
    succeed(&pod, NETWORK);

    let mut sockets = privileged(&format!("exec python3 -c '{SOCKETS}'"));
    let (status, out, errors) = told(&pod.run("sockets", &mut sockets).unwrap());
    let expected = "sctp hello\nmptcp hello\ntls hello\nalg ddaf35a1\ncan\n";
    assert_eq!((status, out.as_str()), (Some(0), expected), "{errors}");
    pod.end().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn every_module_can_be_loaded() {
    let pod = Pod::of(Runtime::new().unwrap()).unwrap();
    let archive = dist().join("share/bulkhead/modules");
    let bundle = privileged(&format!("exec python3 -c '{EVERY}'"));
    let mut bundle = bundle.mount(bind(&archive, "/modules", &["bind", "ro"])).unwrap();
    let (status, out, errors) = told(&pod.run("every", &mut bundle).unwrap());
    let (count, failed) = out.split_once(" modules").unwrap_or_default();
    assert_eq!((status, failed), (Some(0), "\n"), "{errors}");
    assert!(count.parse::<u32>().unwrap() > 400, "{count}");
    pod.end().unwrap();
}
