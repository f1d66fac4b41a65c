//! ID-mapped mounts, beside crun (Debian's runc silently ignores such mappings), and the
//! propagation of the root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

/// Shows the owners of the files in `/mnt`, and tries to create and change files.
const PROBE: &str = r#"
stat -c '%n %u %g' /mnt/* /mnt/*/*
try() { "$@" 2> /dev/null; echo "$* $?"; }
try touch /mnt/m/new; try mkdir /mnt/m/dir; try chown 3:4 /mnt/m/mine; try chmod 600 /mnt/m/mine
try mv /mnt/m/new /mnt/m/moved; try sh -c 'echo more >> /mnt/m/mine'
"#;
/// The first host user that users of a container are mapped to.
const FIRST: u32 = 100_000;

/// Maps users 0 to 999 of the container to host users from [`FIRST`].
fn mapping() -> Value {
    json!([{"containerID": 0, "hostID": FIRST, "size": 1000}])
}

/// A directory with files of several owners.
fn given(bundle: &Bundle) -> PathBuf {
    let directory = bundle.path().join("m");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    for (name, owner) in [("root", 0), ("mine", 5), ("outside", FIRST + 3), ("nobodys", 5000)] {
        fs::write(directory.join(name), name).unwrap();
        chown(directory.join(name), Some(owner), Some(owner)).unwrap();
    }
    directory
}

/// A bundle whose container has a user namespace, as [`with_user_namespace`] gives it.
pub(crate) fn mapped(bundle: Bundle) -> Bundle {
    bundle.with_own(with_user_namespace).unwrap()
}

/// Gives a container a user namespace, and makes its root user own its root file system.
fn with_user_namespace(bundle: &Bundle, spec: &mut Value) {
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = mapping();
    spec["linux"]["gidMappings"] = mapping();
    // A user namespace that does not own the network namespace cannot mount sysfs.
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "sysfs");
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "cgroup");
    chown(bundle.path(), Some(FIRST), Some(FIRST)).unwrap();
    let mut next = vec![bundle.rootfs()];
    while let Some(path) = next.pop() {
        std::os::unix::fs::lchown(&path, Some(FIRST), Some(FIRST)).unwrap();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            next.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

/// Everything in a directory, with the owners on the host.
fn owners(directory: &Path) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let data = entry.metadata().unwrap();
            format!("{} {} {}", entry.file_name().to_string_lossy(), data.uid(), data.gid())
        })
        .collect();
    found.sort();
    found
}

/// Runs the probe under both runtimes after `change`. Its output and the files that it leaves must
/// be the same, and contain `seen` and `left`.
fn same(change: impl Fn(&Bundle, &mut Value), seen: &[&str], left: &[&str]) {
    let runtimes = [Runtime::new().unwrap(), Runtime::crun().unwrap()];
    let [ours, theirs] = runtimes.map(|runtime| {
        let bundle = Bundle::script(PROBE).unwrap();
        fs::set_permissions(bundle.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let directory = given(&bundle);
        let bundle = bundle.with_own(&change).unwrap();
        let told = told(&runtime.run("mapped", &bundle).unwrap());
        runtime.assert_clean().unwrap();
        (told, owners(&directory))
    });
    assert_eq!(ours, theirs);
    for line in seen {
        assert!(ours.0.1.lines().any(|found| found == *line), "{line}: {ours:?}");
    }
    for line in left {
        assert!(ours.1.iter().any(|found| found == line), "{line}: {ours:?}");
    }
}

/// Adds a bind mount with further fields.
fn add(spec: &mut Value, mut mount: Value, fields: Value) {
    mount.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn the_owners_of_a_mount_are_mapped_as_the_container_is() {
    let seen =
        ["/mnt/m/root 0 0", "/mnt/m/mine 5 5", "/mnt/m/nobodys 65534 65534", "mkdir /mnt/m/dir 0"];
    let left = ["moved 0 0", "dir 0 0", "mine 3 4", "root 0 0"];
    let option = |bundle: &Bundle, spec: &mut Value| {
        with_user_namespace(bundle, spec);
        add(spec, bind(&bundle.path().join("m"), "/mnt/m", &["idmap"]), json!({}));
    };
    same(option, &seen, &left);
    let own = |bundle: &Bundle, spec: &mut Value| {
        with_user_namespace(bundle, spec);
        let fields = json!({"uidMappings": mapping(), "gidMappings": mapping()});
        add(spec, bind(&bundle.path().join("m"), "/mnt/m", &["idmap"]), fields);
    };
    same(own, &seen, &left);
}

#[test]
fn the_owners_of_a_mount_are_mapped_for_a_container_that_is_not() {
    let seen = ["/mnt/m/mine 100005 100005", "/mnt/m/outside 65534 65534", "touch /mnt/m/new 1"];
    let change = |bundle: &Bundle, spec: &mut Value| {
        let fields = json!({"uidMappings": mapping(), "gidMappings": mapping()});
        add(spec, bind(&bundle.path().join("m"), "/mnt/m", &["idmap"]), fields);
    };
    same(change, &seen, &["mine 5 5"]);
}

#[test]
fn without_a_mapping_owners_are_as_they_are() {
    let change = |bundle: &Bundle, spec: &mut Value| {
        with_user_namespace(bundle, spec);
        add(spec, bind(&bundle.path().join("m"), "/mnt/m", &[]), json!({}));
    };
    same(change, &["/mnt/m/outside 3 3", "/mnt/m/mine 65534 65534"], &["moved 100000 100000"]);
}

/// A file system on a directory; it is unmounted when this is dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn on(directory: &Path, kind: &str) -> Self {
        mount(kind, directory, kind, MountFlags::empty(), None).unwrap();
        Self(directory.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Fails only when it is already unmounted.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn mounts_below_are_mapped_when_that_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let below = directory.path().join("below");
    fs::create_dir(&below).unwrap();
    let _mounted = Mounted::on(&below, "tmpfs");
    fs::write(below.join("file"), "").unwrap();
    let runtime = Runtime::new().unwrap();
    for (option, expected) in [("idmap", "100000\n0\n"), ("ridmap", "100000\n100000\n")] {
        let fields = json!({"uidMappings": mapping(), "gidMappings": mapping()});
        let bundle = Bundle::script("stat -c %u /mnt /mnt/below/file").unwrap();
        let mount = bind(directory.path(), "/mnt", &["rbind", option]);
        let bundle = bundle.with(|spec| add(spec, mount, fields)).unwrap();
        let output = told(&runtime.run("below", &bundle).unwrap());
        assert_eq!(output, (Some(0), expected.to_owned(), String::new()), "{option}");
    }
    runtime.assert_clean().unwrap();
}

#[test]
fn a_file_system_that_cannot_be_mapped_is_named() {
    let runtime = Runtime::new().unwrap();
    let fields = json!({"uidMappings": mapping(), "gidMappings": mapping()});
    let mount = bind(Path::new("/proc"), "/mnt", &["ro"]);
    let bundle = Bundle::new(&["/bin/true"]).unwrap().with(|spec| add(spec, mount, fields));
    let bundle = bundle.unwrap();
    let (status, _, errors) = told(&runtime.run("refused", &bundle).unwrap());
    assert_eq!(status, Some(1));
    assert!(errors.contains("cannot map the owners of /proc, its file system"), "{errors}");
    runtime.assert_clean().unwrap();
}

#[test]
fn the_root_has_the_propagation_that_is_asked_for() {
    let pod = Pod::of(Runtime::new().unwrap()).unwrap();
    for (name, expected) in [
        ("shared", "shared\n"),
        ("rshared", "shared\n"),
        ("runbindable", "unbindable\n"),
        ("rprivate", ""),
        ("rslave", ""),
    ] {
        let script = "while read -r _ _ _ _ at _ tag _; do
            test $at = / && test $tag != - && echo ${tag%:*}; done < /proc/self/mountinfo; true";
        let bundle = Bundle::script(script).unwrap();
        let change = |spec: &mut Value| spec["linux"]["rootfsPropagation"] = json!(name);
        let output = told(&pod.run("root", &mut bundle.with(change).unwrap()).unwrap());
        assert_eq!(output, (Some(0), expected.to_owned(), String::new()), "{name}");
    }
    pod.end().unwrap();
}
