//! Runs the same bundle under runc and under Bulkhead and compares what a probe reads inside, its
//! exit status, and the files that it leaves. Each accepted difference has a name here and its
//! reason in `docs/COMPATIBILITY.md`; any other difference fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Output;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

/// The probe, in sections. The meaning of its lines is compared, not the numbers in them.
const PROBE: &str = r#"
section() { echo "== $1"; }
section status; grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|Umask)' /proc/self/status
section limits; cat /proc/self/limits
section mounts; cat /proc/self/mountinfo
section environment; env | sort
section place; pwd; hostname; cat /proc/self/oom_score_adj /proc/self/cgroup /proc/1/comm
section cgroup; for file in memory.max memory.low memory.swap.max pids.max cpu.max cpu.weight; do
    echo $file $(cat /sys/fs/cgroup/$file); done
section devices; stat -c '%n %A %u %g %t:%T' /dev /dev/* /dev/pts/*
section links; for name in fd stdin stdout stderr core ptmx; do readlink /dev/$name; done
section descriptors; ls /proc/self/fd
section settings; cat /proc/sys/kernel/msgmax /proc/sys/kernel/shm_rmid_forced \
    /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/ping_group_range
section root; stat -c '%n %A %u %g' / /* /root/* /mnt/* 2>&1
section attempts
try() { "$@" > /dev/null 2>&1; echo "$* $?"; }
try touch /file; try chmod 4755 /file; try mkdir /run/dir; try mknod /tmp/null c 1 3
try mknod /tmp/disk b 8 0; try mount -t tmpfs none /mnt; try hostname other; try chown 7 /file
try cat /proc/kcore; try cat /proc/keys; try cat /proc/timer_list; try ls /sys/firmware
for file in /proc/sys/kernel/msgmax /proc/sysrq-trigger /proc/irq/0/smp_affinity; do
    (echo 1 > $file) 2> /dev/null; echo "write $file $?"; done
try sh -c 'echo > /dev/null'; try head -c 1 /dev/zero; try head -c 1 /dev/urandom
try sh -c 'kill -0 1'; try dd if=/dev/zero of=/dev/shm/f bs=1M count=1
exit 42
"#;

/// The differences that are accepted; `docs/COMPATIBILITY.md` has each with its reason, and
/// [`meaning`] leaves it out.
const ACCEPTED: [&str; 8] = [
    "file system of the host",
    "peer group of the host",
    "propagation of the root",
    "flags of read-only paths",
    "superblock of sysfs and cgroup2",
    "cpu.weight",
    "mode of a file that is made to mount on",
    "path of the cgroup",
];

/// The result of a bundle under one runtime.
#[derive(Debug)]
struct Told {
    status: Option<i32>,
    errors: String,
    sections: BTreeMap<String, BTreeSet<String>>,
    left: BTreeSet<String>,
}

fn told_by(output: &Output, bundle: &Bundle) -> Told {
    let (status, output, errors) = told(output);
    let mut sections: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut section = String::new();
    let host = host(&output);
    for line in output.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            section = name.to_owned();
            sections.entry(section.clone()).or_default();
        } else if let Some(line) = meaning(&section, line, &host) {
            sections.entry(section.clone()).or_default().insert(line);
        }
    }
    Told { status, errors, sections, left: files(&bundle.rootfs()) }
}

/// A line without the numbers that change in every run, and without accepted differences. `host` is
/// the device number of the file system that the bundle is on.
fn meaning(section: &str, line: &str, host: &str) -> Option<String> {
    match section {
        "mounts" => Some(mount(line, host)),
        // "path of the cgroup"
        "place" => Some(line.replacen("0::/containers/", "0::/", 1)),
        // Computed with another formula: "cpu.weight".
        "cgroup" if line.starts_with("cpu.weight") => None,
        _ => Some(line.to_owned()),
    }
}

/// A line of `/proc/self/mountinfo`, proc(5).
fn mount(line: &str, host: &str) -> String {
    let (own, file_system) = line.split_once(" - ").unwrap();
    let own: Vec<&str> = own.split(' ').collect();
    let [_, _, number, _, point, options, tags @ ..] = &own[..] else { panic!("{line}") };
    let [kind, source, superblock] = file_system.splitn(3, ' ').collect::<Vec<_>>()[..] else {
        panic!("{line}")
    };
    // "peer group of the host"
    let tags = tags.iter().map(|tag| tag.split(':').next().unwrap_or(tag));
    let tags = tags.filter(|tag| *tag != "master");
    // "propagation of the root"
    let tags: Vec<_> = tags.filter(|_| *point != "/").collect();
    // "flags of read-only paths"
    let closed = ["/proc/", "/run"].iter().any(|path| point.starts_with(path));
    let flags =
        options.split(',').filter(|flag| !(closed && ["nosuid", "nodev", "noexec"].contains(flag)));
    let flags: Vec<_> = flags.collect();
    let mut about: Vec<&str> = superblock.split(',').collect();
    about.sort_unstable();
    let about = match kind {
        // "file system of the host"
        _ if *number == host || kind == "virtiofs" => "of the host".to_owned(),
        // "superblock of sysfs and cgroup2"
        "sysfs" | "cgroup2" => format!("{kind} {source}"),
        _ => format!("{kind} {source} {}", about.join(",")),
    };
    format!("{point} {} {} {about}", flags.join(","), tags.join(" "))
}

/// The device number of the root file system.
fn host(output: &str) -> String {
    let root = output.lines().filter(|line| line.contains(" - ")).find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        (words.get(4) == Some(&"/")).then(|| words[2].to_owned())
    });
    root.unwrap_or_default()
}

/// Everything below a directory, with all metadata except times.
fn files(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut next = vec![directory.to_owned()];
    while let Some(directory_now) = next.pop() {
        for entry in fs::read_dir(&directory_now).unwrap() {
            let path = entry.unwrap().path();
            let data = fs::symlink_metadata(&path).unwrap();
            let (mode, uid, gid) = (data.mode(), data.uid(), data.gid());
            let size = if data.is_dir() { 0 } else { data.len() };
            let name = path.strip_prefix(directory).unwrap().display();
            // "mode of a file that is made to mount on"
            let made = name.to_string().starts_with("mnt/") && data.is_file() && size == 0;
            let mode = if made { 0 } else { mode };
            found.insert(format!("{name} {mode:o} {uid} {gid} {size} {:x}", data.rdev()));
            if data.is_dir() {
                next.push(path);
            }
        }
    }
    found
}

/// All lines in which the two differ.
fn differences(ours: &Told, theirs: &Told) -> String {
    let mut words = String::new();
    if ours.status != theirs.status || ours.errors != theirs.errors {
        writeln!(words, "status {:?}, runc {:?}", ours.status, theirs.status).unwrap();
        writeln!(words, "errors {:?}, runc {:?}", ours.errors, theirs.errors).unwrap();
    }
    let names: BTreeSet<_> = ours.sections.keys().chain(theirs.sections.keys()).collect();
    let none = BTreeSet::new();
    let section = |told: &Told, name: &str| told.sections.get(name).unwrap_or(&none).clone();
    let lists =
        names.into_iter().map(|name| (name.as_str(), section(ours, name), section(theirs, name)));
    let left = ("files left", ours.left.clone(), theirs.left.clone());
    for (name, ours, theirs) in lists.chain([left]) {
        for line in theirs.difference(&ours) {
            writeln!(words, "{name}: runc has   {line}").unwrap();
        }
        for line in ours.difference(&theirs) {
            writeln!(words, "{name}: we have    {line}").unwrap();
        }
    }
    words
}

/// A bundle that runs the probe, after `change`.
fn probing(change: impl Fn(&Bundle, &mut Value)) -> Bundle {
    let bundle = Bundle::script(PROBE).unwrap();
    fs::create_dir(bundle.path().join("given")).unwrap();
    fs::write(bundle.path().join("given/file"), "given\n").unwrap();
    bundle.with_own(change).unwrap()
}

/// Fails on any difference between Bulkhead and runc.
fn compare([ours, theirs]: [Told; 2]) {
    let words = differences(&ours, &theirs);
    assert!(words.is_empty(), "\n{words}");
    assert_eq!(ours.status, Some(42), "{ours:?}");
}

/// Compares a container that has its machine for itself.
fn same_alone(change: impl Fn(&Bundle, &mut Value)) {
    compare([Runtime::new().unwrap(), Runtime::runc().unwrap()].map(|runtime| {
        let bundle = probing(&change);
        let output = runtime.run("probe", &bundle).unwrap();
        runtime.assert_clean().unwrap();
        told_by(&output, &bundle)
    }));
}

/// Compares a container that joins a pod.
fn same(pods: &[Pod; 2], change: impl Fn(&Bundle, &mut Value)) {
    compare(pods.each_ref().map(|pod| {
        let mut bundle = probing(&change);
        let output = pod.run("probe", &mut bundle).unwrap();
        told_by(&output, &bundle)
    }));
}

#[test]
fn accepted_differences_have_their_reasons() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/COMPATIBILITY.md");
    let document = fs::read_to_string(document).unwrap();
    for name in ACCEPTED {
        assert!(document.contains(&format!("| {name} |")), "{name}");
    }
}

#[test]
fn a_plain_container() {
    same_alone(|_, _| {});
}

#[test]
fn containers_of_a_pod() {
    Pod::share_beside_runc(&[
        identity_and_rights,
        environment_place_and_limits,
        resources_inside,
        paths_that_are_closed,
        mounts_of_all_kinds,
        devices_that_are_named,
        propagation_of_the_root,
        propagation_of_mounts,
        a_filter_of_system_calls,
        namespaces_that_are_left_out,
    ])
    .unwrap();
}

fn identity_and_rights(pods: &[Pod; 2]) {
    same(pods, |_, spec| {
        let some = json!(["CAP_KILL", "CAP_NET_RAW", "CAP_CHOWN"]);
        spec["process"]["user"] =
            json!({"uid": 5, "gid": 6, "additionalGids": [7, 8, 6], "umask": 0o27});
        spec["process"]["capabilities"] = json!({
            "bounding": some, "effective": ["CAP_KILL"], "permitted": some, "inheritable": some,
            "ambient": ["CAP_KILL"],
        });
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["process"]["oomScoreAdj"] = json!(321);
    });
}

fn environment_place_and_limits(pods: &[Pod; 2]) {
    same(pods, |_, spec| {
        spec["process"]["env"] = json!(["PATH=/bin", "A=1", "B=two words", "A=2", "EMPTY="]);
        spec["process"]["cwd"] = json!("/made/by/runtime");
        spec["hostname"] = json!("a-name");
        spec["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NPROC", "soft": 500, "hard": 600},
            {"type": "RLIMIT_STACK", "soft": 4 << 20, "hard": 8 << 20},
            {"type": "RLIMIT_MEMLOCK", "soft": 65536, "hard": 65536},
            {"type": "RLIMIT_FSIZE", "soft": 8 << 20, "hard": 8 << 20},
        ]);
    });
}

fn resources_inside(pods: &[Pod; 2]) {
    same(pods, |_, spec| {
        spec["linux"]["resources"] = json!({
            "devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rw"},
            ],
            "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20},
            "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
            "pids": {"limit": 77},
        });
    });
}

fn paths_that_are_closed(pods: &[Pod; 2]) {
    same(pods, |_, spec| {
        spec["root"]["readonly"] = json!(true);
        spec["linux"]["maskedPaths"] =
            json!(["/proc/kcore", "/proc/keys", "/sys/firmware", "/nosuch"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/proc/irq", "/run", "/nosuch"]);
    });
}

fn mounts_of_all_kinds(pods: &[Pod; 2]) {
    same(pods, |bundle, spec| {
        let given = bundle.path().join("given");
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.extend([
            json!({"destination": "/mnt/small", "type": "tmpfs", "source": "tmpfs",
                "options": ["size=1m", "mode=1700", "uid=5", "gid=6", "noexec", "nosuid"]}),
            json!({"destination": "/mnt/ro", "type": "tmpfs", "options": ["ro", "nodev", "noatime"]}),
            bind(&given, "/mnt/host", &["ro"]),
            bind(&given, "/mnt/host-rw", &["rw", "nosuid", "nodev", "noexec"]),
            bind(&given.join("file"), "/mnt/host-file", &["ro"]),
            json!({"destination": "/mnt/host-deep/er", "type": "bind", "source": given,
                "options": ["rbind", "rslave"]}),
        ]);
    });
}

#[test]
fn settings_of_the_kernel() {
    same_alone(|_, spec| {
        spec["linux"]["sysctl"] = json!({
            "kernel.msgmax": "9000",
            "kernel.shm_rmid_forced": "1",
            "net.ipv4.ip_forward": "1",
            "net.ipv4.ping_group_range": "0 5",
        });
    });
}

fn devices_that_are_named(pods: &[Pod; 2]) {
    same(pods, |_, spec| {
        spec["linux"]["devices"] = json!([
            {"path": "/dev/also-null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600,
             "uid": 5, "gid": 6},
            {"path": "/dev/deep/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o622},
        ]);
    });
}

fn propagation_of_the_root(pods: &[Pod; 2]) {
    same(pods, |_, spec| spec["linux"]["rootfsPropagation"] = json!("private"));
    same(pods, |_, spec| spec["linux"]["rootfsPropagation"] = json!("slave"));
    same(pods, |_, spec| spec["linux"]["rootfsPropagation"] = json!("rshared"));
}

fn propagation_of_mounts(pods: &[Pod; 2]) {
    same(pods, |bundle, spec| {
        let given = bundle.path().join("given");
        fs::create_dir(given.join("deep er")).unwrap();
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for (place, options) in [
            ("shared", vec!["shared"]),
            ("shared/below", vec!["nosuid"]),
            ("rshared", vec!["rshared"]),
            ("rshared/below", vec![]),
            ("rshared/below/own", vec!["private"]),
            ("rshared/below/own/below", vec![]),
            ("slave", vec!["slave"]),
            ("rslave", vec!["rslave", "ro"]),
            ("private", vec!["private"]),
            ("rprivate", vec!["rprivate"]),
            ("unbindable", vec!["unbindable"]),
            ("runbindable", vec!["runbindable"]),
            ("runbindable/below", vec![]),
            ("several", vec!["slave", "shared"]),
            ("the other way", vec!["shared", "private"]),
        ] {
            mounts.push(json!({"destination": format!("/mnt/{place}"), "type": "tmpfs",
                "source": "tmpfs", "options": options}));
        }
        mounts.extend([
            bind(&given, "/mnt/host-shared", &["rshared", "ro"]),
            bind(&given, "/mnt/host-shared/deep er", &["rw"]),
            bind(&given, "/mnt/host-slave", &["slave"]),
            bind(&given, "/mnt/host-unbindable", &["unbindable"]),
        ]);
        // A masked path is covered by a mount, here on top of a shared mount.
        spec["linux"]["maskedPaths"] = json!(["/mnt/host-shared/file", "/proc/kcore"]);
    });
}

fn a_filter_of_system_calls(pods: &[Pod; 2]) {
    same(pods, |_, spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": [
                    {"index": 1, "value": 0, "op": "SCMP_CMP_EQ"},
                ]},
            ],
        });
    });
}

fn namespaces_that_are_left_out(pods: &[Pod; 2]) {
    same(pods, |_, spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|entry| entry["type"] != "cgroup");
        // The default path has the runtime's name, so set one.
        spec["linux"]["cgroupsPath"] = json!("/probe");
    });
}
