//! Mount options that libcontainer reads differently from runc, and a `/dev` that is read-only.
//!
//! libcontainer takes each flag that it knows for a flag of the mount, but some are flags of the
//! file system. The kernel also accepts those as parameters of the file system, fsconfig(2), and
//! libcontainer passes on as a parameter what has a value: so `sync` is written as `sync=`.

use std::io;
use std::path::Path;

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{OFlags, StatVfsMountFlags, fstat, statvfs};
use rustix::mount::{MountFlags, mount_remount};

use crate::copy_up;

const DEV: &str = "/dev";
/// Flags of file systems that libcontainer takes for flags of mounts, and drops.
const OF_FILE_SYSTEM: [&str; 2] = ["sync", "dirsync"];
/// File systems that runc mounts read-only as a whole. It makes a tmpfs read-only only afterwards,
/// and of the others the machine has only one.
const READ_ONLY_AS_A_WHOLE: [&str; 2] = ["proc", "devpts"];

/// Changes the options of a specification whose root is `root`.
pub(crate) fn fit(spec: &mut Spec, root: &Path) {
    let mounts = spec.mounts().clone().unwrap_or_default();
    for (number, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        settle_access_times(mount);
        let mut options = mount.options().clone().unwrap_or_default();
        let kind = mount.typ().clone().unwrap_or_default();
        // A mount that is copied up is the agent's own.
        if is_bind(mount) || options.iter().any(|option| option == copy_up::OPTION) {
            continue;
        }
        if kind == "tmpfs" && !options.iter().any(|option| option.starts_with("mode=")) {
            let mode = mode_of_covered(&mounts[..number], mount.destination(), root);
            options.extend(mode.map(|mode| format!("mode={mode:o}")));
        }
        if READ_ONLY_AS_A_WHOLE.contains(&kind.as_str()) && is_read_only(mount) {
            options.push("ro=".to_owned());
        }
        for option in &mut options {
            if OF_FILE_SYSTEM.contains(&option.as_str()) {
                option.push('=');
            }
        }
        mount.set_options(Some(options));
    }
}

/// Whether `/dev` is to be read-only, once its devices are there.
pub(crate) fn has_read_only_dev(spec: &Spec) -> bool {
    let mut mounts = spec.mounts().iter().flatten();
    mounts.any(|mount| mount.destination() == Path::new(DEV) && is_read_only(mount))
}

/// Makes `/dev` read-only. This process is in the container's mount namespace.
///
/// # Errors
/// Nothing is mounted there.
pub(crate) fn close_dev() -> io::Result<()> {
    let is = statvfs(DEV)?.f_flag;
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    // The kernel keeps only the flags of access times by itself.
    for (set, flag) in [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    ] {
        if is.contains(set) {
            flags |= flag;
        }
    }
    Ok(mount_remount(DEV, flags, "")?)
}

/// Leaves one option for access times, as libcontainer accepts only one. Of several, mount(2) takes
/// the strictest.
fn settle_access_times(mount: &mut Mount) {
    if has_last(mount, "strictatime", "nostrictatime") && has_last(mount, "noatime", "atime") {
        let options = mount.options().iter().flatten();
        let others = options.filter(|option| *option != "noatime").cloned().collect();
        mount.set_options(Some(others));
    }
}

pub(crate) fn is_bind(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind")
        || options.any(|option| option == "bind" || option == "rbind")
}

fn is_read_only(mount: &Mount) -> bool {
    has_last(mount, "ro", "rw")
}

/// Whether `set` comes after `unset`, which contradicts it: the last one counts.
fn has_last(mount: &Mount, set: &str, unset: &str) -> bool {
    let mut options = mount.options().iter().flatten().rev();
    options.find(|option| *option == set || *option == unset).is_some_and(|last| last == set)
}

/// The mode that the directory below a mount has now; `None` if the directory is made only later,
/// in a file system that is mounted `before`.
fn mode_of_covered(before: &[Mount], destination: &Path, root: &Path) -> Option<u32> {
    let below = |mount: &&Mount| destination.starts_with(mount.destination());
    let Some(upper) = before.iter().rev().find(below) else { return mode(root, destination) };
    let rest = destination.strip_prefix(upper.destination()).ok()?;
    let source = upper.source().as_deref().filter(|_| is_bind(upper))?;
    mode(source, &Path::new("/").join(rest))
}

/// The mode of a directory below `root`, which `path` cannot leave.
fn mode(root: &Path, path: &Path) -> Option<u32> {
    let found = copy_up::open_in(root, path, OFlags::PATH).ok()??;
    Some(fstat(&found).ok()?.st_mode & 0o7777)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use serde_json::{Value, json};

    /// The options of each mount once they are fit, in a root that has a directory `/a` of mode 711.
    fn fitted(mounts: Value) -> Vec<Vec<String>> {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("a")).unwrap();
        fs::set_permissions(root.path().join("a"), Permissions::from_mode(0o711)).unwrap();
        let spec = json!({"ociVersion": "1.0.2", "mounts": mounts});
        let mut spec = serde_json::from_value(spec).unwrap();
        fit(&mut spec, root.path());
        let options = |mount: &Mount| mount.options().clone().unwrap_or_default();
        spec.mounts().iter().flatten().map(options).collect()
    }

    #[test]
    fn a_file_system_in_memory_has_the_mode_of_what_it_covers() {
        let memory = |at: &str, options: Value| json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options});
        let fitted = fitted(json!([
            memory("/a", json!(["nosuid"])),
            memory("/a", json!(["mode=1700"])),
            memory("/b", json!([])),
            memory("/a/below", json!([])),
        ]));
        assert_eq!(fitted[0], ["nosuid", "mode=711"]);
        assert_eq!(fitted[1], ["mode=1700"]);
        assert!(fitted[2..].iter().all(Vec::is_empty), "{fitted:?}");
    }

    #[test]
    fn a_file_system_in_memory_on_a_bind_mount_has_the_mode_of_what_that_has() {
        let source = tempfile::tempdir().unwrap();
        fs::create_dir(source.path().join("below")).unwrap();
        fs::set_permissions(source.path().join("below"), Permissions::from_mode(0o700)).unwrap();
        let fitted = fitted(json!([
            {"destination": "/a", "source": source.path(), "options": ["rbind"]},
            {"destination": "/a/below", "type": "tmpfs", "source": "tmpfs"},
        ]));
        assert_eq!(fitted[1], ["mode=700"]);
    }

    #[test]
    fn flags_of_a_file_system_become_its_parameters() {
        let fitted = fitted(json!([
            {"destination": "/b", "type": "tmpfs", "options": ["sync", "noexec", "dirsync"]},
            {"destination": "/proc", "type": "proc", "options": ["nosuid", "ro"]},
            {"destination": "/dev/pts", "type": "devpts", "options": ["ro", "rw"]},
            {"destination": "/sys", "type": "sysfs", "options": ["ro"]},
            {"destination": "/c", "type": "bind", "options": ["ro", "sync"]},
        ]));
        assert_eq!(fitted[0], ["sync=", "noexec", "dirsync="]);
        assert_eq!(fitted[1], ["nosuid", "ro", "ro="]);
        assert_eq!(fitted[2], ["ro", "rw"]);
        assert_eq!(fitted[3], ["ro"]);
        assert_eq!(fitted[4], ["ro", "sync"]);
    }

    #[test]
    fn strict_access_times_are_stricter_than_none() {
        let fitted = fitted(json!([
            {"destination": "/b", "type": "proc", "options": ["strictatime", "noatime"]},
            {"destination": "/c", "type": "bind", "options": ["noatime", "strictatime", "ro"]},
            {"destination": "/d", "type": "proc", "options": ["noatime", "relatime"]},
            {"destination": "/e", "type": "proc", "options": ["noatime", "strictatime", "atime"]},
        ]));
        assert_eq!(fitted[0], ["strictatime"]);
        assert_eq!(fitted[1], ["strictatime", "ro"]);
        assert_eq!(fitted[2], ["noatime", "relatime"]);
        assert_eq!(fitted[3], ["noatime", "strictatime", "atime"]);
    }

    #[test]
    fn the_last_word_on_dev_counts() {
        let dev = |at: &str, options: Value| {
            let mounts = json!([{"destination": at, "type": "tmpfs", "options": options}]);
            let spec = json!({"ociVersion": "1.0.2", "mounts": mounts});
            has_read_only_dev(&serde_json::from_value(spec).unwrap())
        };
        assert!(dev("/dev", json!(["rw", "nosuid", "ro"])));
        assert!(dev("/dev/", json!(["ro"])));
        assert!(!dev("/dev", json!(["ro", "rw"])));
        assert!(!dev("/dev/shm", json!(["ro"])));
    }
}
