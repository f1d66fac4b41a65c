//! Mount flags, beside runc: of every default mount of a container, of tmpfs and of bind mounts.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

use super::mounts::Mounted;

/// Prints the mounts, and tries to create and change files.
const PROBE: &str = "cat /proc/self/mountinfo; \
    for at in /mnt/* /dev /dev/shm /dev/mqueue; do touch $at/file 2>&1; echo made $at $?; done; \
    for at in /dev/null /dev/tty; do (echo > $at) 2>&1; echo written $at $?; done; \
    stat -c '%n %a %u %g' /dev /dev/shm /dev/mqueue /dev/pts /mnt/* 2>&1; exit 0";

/// The part of a line of mountinfo that is compared.
fn mount(line: &str) -> Option<String> {
    let (own, file_system) = line.split_once(" - ")?;
    let own: Vec<&str> = own.split(' ').collect();
    let [_, _, _, _, point, options, ..] = &own[..] else { return None };
    let words: Vec<&str> = file_system.splitn(3, ' ').collect();
    let [kind, source, superblock] = words[..] else { return None };
    let superblock = match kind {
        // These differ in a machine: docs/COMPATIBILITY.md.
        "sysfs" | "cgroup2" => "",
        _ => superblock,
    };
    let seen = point.starts_with("/mnt") || point.starts_with("/dev");
    let seen = seen || ["/proc", "/sys", "/sys/fs/cgroup"].contains(point);
    // runc 1.1 sets the mode after mounting, later versions while mounting, as here. Modes are
    // compared separately.
    let about = superblock.split(',').filter(|option| !option.starts_with("mode="));
    let mut about: Vec<&str> = about.collect();
    about.sort_unstable();
    seen.then(|| format!("{point} {options} {kind} {source} {}", about.join(",")))
}

/// Everything that is compared, one item for each line.
fn seen(output: &str) -> BTreeSet<String> {
    let lines = output.lines().map(|line| match line.contains(" - ") {
        true => mount(line),
        false => Some(line.to_owned()),
    });
    lines.flatten().collect()
}

/// Runs the probe in both pods after `change`, and fails on any difference.
fn same(pods: &[Pod; 2], change: impl Fn(&mut Value)) -> BTreeSet<String> {
    let [ours, theirs] = pods.each_ref().map(|pod| {
        let mut bundle = Bundle::script(PROBE).unwrap().with(|spec| change(spec)).unwrap();
        let told = told(&pod.run("flags", &mut bundle).unwrap());
        assert_eq!((told.0, told.2.as_str()), (Some(0), ""), "{told:?}");
        seen(&told.1)
    });
    let only = |one: &BTreeSet<String>, other| one.difference(other).cloned().collect::<Vec<_>>();
    let (own, runcs) = (only(&ours, &theirs), only(&theirs, &ours));
    assert!(own.is_empty() && runcs.is_empty(), "ours: {own:#?}\nrunc's: {runcs:#?}");
    ours
}

/// Changes the options of the mount at `at`.
fn set(spec: &mut Value, at: &str, change: impl Fn(&mut Vec<Value>)) {
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let mount = mounts.iter_mut().find(|mount| mount["destination"] == at).unwrap();
    if mount["options"].is_null() {
        mount["options"] = json!([]);
    }
    change(mount["options"].as_array_mut().unwrap());
}

const SPECIAL: [&str; 7] =
    ["/dev", "/proc", "/sys", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys/fs/cgroup"];

#[test]
fn a_read_only_dev_is_read_only_and_has_its_devices() {
    let pods = Pod::beside_runc().unwrap();
    for others in [&[][..], &["noexec"], &["noexec", "noatime"]] {
        let seen = same(&pods, |spec| {
            set(spec, "/dev", |options| {
                options.push(json!("ro"));
                options.extend(others.iter().map(|option| json!(option)));
            });
        });
        assert!(seen.contains("made /dev 1"), "{seen:?}");
        assert!(seen.contains("written /dev/null 0"), "{seen:?}");
    }
    Pod::end_all(pods).unwrap();
}

#[test]
fn every_flag_of_every_special_mount_is_kept() {
    let pods = Pod::beside_runc().unwrap();
    // Without options, as under runc.
    same(&pods, |spec| {
        for at in SPECIAL {
            set(spec, at, Vec::clear);
        }
    });
    for flags in [
        &["ro"][..],
        &["rw"],
        &["noexec", "nosuid"],
        &["exec", "suid"],
        &["noatime"],
        &["relatime", "nodiratime"],
        &["strictatime"],
        &["ro", "noexec", "nosuid", "noatime"],
    ] {
        same(&pods, |spec| {
            for at in SPECIAL {
                set(spec, at, |options| options.extend(flags.iter().map(|flag| json!(flag))));
            }
        });
    }
    Pod::end_all(pods).unwrap();
}

#[test]
fn a_file_system_in_memory_has_the_mode_of_what_it_covers() {
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let script = "stat -c '%n %a %u' /dev /mnt/* /mnt/b/below /mnt/given/below";
        let mut bundle = Bundle::script(script).unwrap();
        for (name, mode) in [("mnt/a", 0o711), ("mnt/b", 0o1770), ("mnt/b/below", 0o700)] {
            let path = bundle.rootfs().join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let given = bundle.path().join("given");
        fs::create_dir_all(given.join("below")).unwrap();
        fs::set_permissions(given.join("below"), fs::Permissions::from_mode(0o750)).unwrap();
        let memory = |at: &str| json!({"destination": at, "type": "tmpfs", "source": "tmpfs"});
        for mount in [
            memory("/mnt/a"),
            memory("/mnt/b"),
            memory("/mnt/b/below"),
            memory("/mnt/new"),
            bind(&given, "/mnt/given", &[]),
            memory("/mnt/given/below"),
        ] {
            bundle = bundle.mount(mount).unwrap();
        }
        let told = told(&runtime.run("flags", &bundle).unwrap());
        runtime.assert_clean().unwrap();
        told
    });
    assert_eq!(ours, theirs);
    assert!(ours.1.contains("/mnt/a 711 0\n"), "{ours:?}");
    assert!(ours.1.contains("/mnt/new 1777 0\n"), "{ours:?}");
}

/// A directory of the host with a file, and a mount below it that has a file too.
struct Nested {
    // Dropped first.
    _mounted: Mounted,
    directory: tempfile::TempDir,
}

impl Nested {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Mount tables escape a space.
        let below = directory.path().join("a b/below");
        fs::create_dir_all(&below).unwrap();
        let mounted = Mounted::on(&below, "tmpfs");
        for old in [below.join("old"), directory.path().join("a b/old")] {
            fs::write(old, "old\n").unwrap();
        }
        Self { _mounted: mounted, directory }
    }

    /// The mount of this directory at `/mnt/` and a number.
    fn bind(&self, number: usize, options: &[&str]) -> Value {
        let options = [&["rbind"], options].concat();
        bind(&self.directory.path().join("a b"), &format!("/mnt/{number}"), &options)
    }

    /// Adds a mount of a directory of its own to a bundle for each of [`READ_ONLY`].
    fn mount_each(mut bundle: Bundle) -> (Bundle, Vec<Self>) {
        let mut all = Vec::new();
        for (number, (options, ..)) in READ_ONLY.iter().enumerate() {
            let nested = Self::new();
            bundle = bundle.mount(nested.bind(number, options)).unwrap();
            all.push(nested);
        }
        (bundle, all)
    }
}

/// Each way to request a read-only mount, and whether the mount itself and the mount below it are
/// writable.
const READ_ONLY: [(&[&str], bool, bool); 9] = [
    (&[], true, true),
    (&["ro"], false, true),
    (&["ro", "rw"], true, true),
    (&["rw", "ro"], false, true),
    (&["rro"], false, false),
    (&["ro", "rro"], false, false),
    (&["rro", "rw"], false, false),
    (&["rro", "rrw"], false, false),
    (&["ro", "rrw"], true, true),
];

#[test]
fn a_read_only_mount_has_writable_ones_below_it_unless_it_is_asked_for_recursively() {
    let script = "for at in /mnt/* /mnt/*/below; do for what in 'touch $at/new' 'mkdir $at/dir' \
        'echo x > $at/old' 'echo x >> $at/old' 'chmod 600 $at/old' 'mv $at/old $at/other' \
        'rm $at/*'; do (eval \"$what\") 2> /dev/null; echo $at $what $?; done; done; exit 0";
    let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let (bundle, _all) = Nested::mount_each(Bundle::script(script).unwrap());
        let told = told(&runtime.run("below", &bundle).unwrap());
        runtime.assert_clean().unwrap();
        told
    });
    assert_eq!(ours, theirs);
    for (number, (options, itself, below)) in READ_ONLY.iter().enumerate() {
        for (at, writable) in [("", *itself), ("/below", *below)] {
            let made = ours.1.contains(&format!("/mnt/{number}{at} touch $at/new 0\n"));
            assert_eq!(made, writable, "{options:?}{at}: {ours:?}");
        }
    }
}

/// The file server cannot write either, even if the guest is compromised.
#[test]
fn what_is_read_only_is_so_for_the_file_server_too() {
    let runtime = Runtime::new().unwrap();
    let (bundle, _all) = Nested::mount_each(Bundle::new(&["/bin/sleep", "1000"]).unwrap());
    runtime.create("below", &bundle).unwrap();
    for (number, (options, itself, below)) in READ_ONLY.iter().enumerate() {
        let writable = |end: &str| {
            let flags = runtime.shared_with("/mounts/", &format!("/{number}{end}")).unwrap();
            flags.iter().any(|flag| flag == "rw")
        };
        assert_eq!((writable(""), writable("/below")), (*itself, *below), "{options:?}");
    }
    runtime.ok(&["delete", "--force", "below"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn every_flag_of_a_file_system_in_memory_is_kept() {
    let lists: [&[&str]; 23] = [
        &["ro"],
        &["rw"],
        &["ro", "rw"],
        &["rw", "ro"],
        &["noexec"],
        &["nodev"],
        &["nosuid"],
        &["nosuid", "nodev", "noexec"],
        &["noexec", "exec"],
        &["noatime"],
        &["atime"],
        &["noatime", "atime"],
        &["nodiratime"],
        &["relatime"],
        &["strictatime"],
        &["norelatime"],
        &["sync"],
        &["dirsync"],
        &["async"],
        &["mode=0700", "uid=5", "gid=6"],
        &["size=1m", "nr_inodes=100"],
        &["ro", "size=64k", "noatime", "sync"],
        &[],
    ];
    let pods = Pod::beside_runc().unwrap();
    same(&pods, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for (number, options) in lists.iter().enumerate() {
            let at = format!("/mnt/{number:02}");
            mounts.push(json!({
                "destination": at, "type": "tmpfs", "source": "tmpfs", "options": options,
            }));
        }
    });
    Pod::end_all(pods).unwrap();
}
