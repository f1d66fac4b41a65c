//! Block devices and disk images of the host: virtio-blk devices that the monitor has attached for a
//! container. They are bound here and found by their serial numbers. A device is put into the
//! container's specification under the number that the guest's kernel has given it. A file system
//! is mounted here, and is a bind mount to libcontainer, so that a container needs neither the
//! device nor the right to mount it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::Disk;
use oci_spec::runtime::{Linux, LinuxDeviceType, Spec};
use rustix::mount::MountFlags;

use crate::copy_up;
use crate::hotplug;
use crate::mount_options::is_bind;
use crate::propagation;
use crate::staged::{self, Staged};

/// Block devices in sysfs.
const BLOCK: &str = "/sys/block";

/// A disk that a container cannot be given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("cannot bind a disk")]
    Bind(#[source] io::Error),
    #[error("the machine has no disk for {0}")]
    Missing(String),
    #[error(
        "cannot mount the {kind} on the disk for {}; \"x-bulkhead.makefs\" makes one on an empty disk",
        .path.display()
    )]
    Mount { kind: String, path: PathBuf, source: io::Error },
}

/// A disk that the kernel knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BoundDisk {
    /// Its path in the container, or where its file system is mounted there.
    path: PathBuf,
    /// Whether the container gets the file system on it and not the device.
    pub(crate) mounted: bool,
    /// Its name among the devices of this guest.
    name: OsString,
    /// Major and minor number in this guest.
    number: (i64, i64),
    /// The host lets nobody here write to it.
    read_only: bool,
}

/// Binds the slots that have got a disk, and finds these disks.
///
/// # Errors
/// One is not there.
pub(crate) fn bind(disks: Vec<Disk>) -> Result<Vec<BoundDisk>, DiskError> {
    if disks.is_empty() {
        return Ok(Vec::new());
    }
    hotplug::rescan(Path::new(hotplug::PLATFORM_BUS)).map_err(DiskError::Bind)?;
    let find = |disk: Disk| {
        find(Path::new(BLOCK), &disk).ok_or_else(|| DiskError::Missing(disk.path.clone()))
    };
    disks.into_iter().map(find).collect()
}

/// The disk with this serial number.
fn find(block: &Path, disk: &Disk) -> Option<BoundDisk> {
    let disks = fs::read_dir(block).ok()?.flatten().map(|entry| entry.path());
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    let found = disks.into_iter().find(|it| read(it.join("serial")).trim() == disk.serial)?;
    let number = read(found.join("dev"));
    let (major, minor) = number.trim().split_once(':')?;
    Some(BoundDisk {
        path: (&disk.path).into(),
        mounted: disk.mounted,
        name: found.file_name()?.to_owned(),
        number: (major.parse().ok()?, minor.parse().ok()?),
        read_only: read(found.join("ro")).trim() == "1",
    })
}

/// Mounts the file systems of disks below `directory`, and makes the specification bind them.
///
/// # Errors
/// One cannot be mounted.
pub(crate) fn mount_all(
    spec: &mut Spec,
    disks: &[BoundDisk],
    directory: &Path,
    staged: &mut Staged,
) -> Result<(), DiskError> {
    for (number, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let of_mount = |disk: &&BoundDisk| disk.mounted && disk.path == *mount.destination();
        let Some(disk) = disks.iter().find(of_mount).filter(|_| !is_bind(mount)) else { continue };
        let target = directory.join(format!("disk-{number}"));
        let kind = mount.typ().clone().unwrap_or_default();
        let failed =
            |source| DiskError::Mount { kind: kind.clone(), path: disk.path.clone(), source };
        let options = mount.options().clone().unwrap_or_default();
        let (options, parameters): (Vec<_>, Vec<_>) =
            options.into_iter().partition(|option| is_of_mount(option));
        let flags = match disk.read_only {
            true => MountFlags::RDONLY,
            false => MountFlags::empty(),
        };
        staged.mount((&disk.node(), &kind), &target, flags, &parameters).map_err(failed)?;
        staged::bind(mount, target, options);
    }
    Ok(())
}

/// Whether an option is one of the mount, and not a parameter of the file system.
fn is_of_mount(option: &str) -> bool {
    const FLAGS: [&str; 21] = [
        "ro",
        "rw",
        "rro",
        "rrw",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "exec",
        "noexec",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "nosymfollow",
        "symfollow",
        "defaults",
    ];
    FLAGS.contains(&option) || option == copy_up::OPTION || propagation::is_option(option)
}

impl BoundDisk {
    /// Its node among the devices of this guest.
    pub(crate) fn node(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Puts this guest's number where the host's is: at the device, and in the rules for it.
    pub(crate) fn renumber(&self, linux: &mut Linux) {
        let (major, minor) = self.number;
        let mut devices = linux.devices_mut().iter_mut().flatten();
        let same = |typ: LinuxDeviceType| typ == LinuxDeviceType::B;
        let Some(device) = devices.find(|it| same(it.typ()) && *it.path() == self.path) else {
            return;
        };
        let host = (device.major(), device.minor());
        device.set_major(major).set_minor(minor);
        let rules = linux.resources_mut().as_mut().and_then(|it| it.devices_mut().as_mut());
        for rule in rules.into_iter().flatten() {
            if rule.typ().is_some_and(same)
                && (rule.major(), rule.minor()) == (Some(host.0), Some(host.1))
            {
                rule.set_major(Some(major)).set_minor(Some(minor));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_disk_is_found_by_its_serial_number() {
        let block = tempfile::tempdir().unwrap();
        for (name, serial, number) in [("vda", "other\n", "254:0\n"), ("vdb", "mine", "254:16\n")] {
            fs::create_dir(block.path().join(name)).unwrap();
            fs::write(block.path().join(name).join("serial"), serial).unwrap();
            fs::write(block.path().join(name).join("dev"), number).unwrap();
        }
        fs::create_dir(block.path().join("loop0")).unwrap();
        fs::write(block.path().join("vdb/ro"), "1\n").unwrap();
        let disk = |serial: &str| Disk { path: "/d".into(), serial: serial.into(), mounted: true };
        let (path, name, number) = ("/d".into(), "vdb".into(), (254, 16));
        let mine = BoundDisk { path, mounted: true, name, number, read_only: true };
        assert_eq!(find(block.path(), &disk("mine")), Some(mine));
        assert!(!find(block.path(), &disk("other")).unwrap().read_only);
        assert_eq!(find(block.path(), &disk("none")), None);
    }

    #[test]
    fn its_number_takes_the_place_of_the_hosts() {
        let mut linux: Linux = serde_json::from_value(json!({
            "devices": [
                {"path": "/dev/a", "type": "b", "major": 7, "minor": 1},
                {"path": "/dev/b", "type": "b", "major": 7, "minor": 2},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "r"},
                {"allow": true, "type": "b", "major": 7, "minor": 2, "access": "rw"},
            ]},
        }))
        .unwrap();
        let (path, name, number) = ("/dev/b".into(), "vdb".into(), (254, 16));
        let disk = BoundDisk { path, mounted: false, name, number, read_only: false };
        disk.renumber(&mut linux);
        let linux = serde_json::to_value(linux).unwrap();
        assert_eq!(
            (&linux["devices"][0]["major"], &linux["devices"][1]["major"]),
            (&json!(7), &json!(254))
        );
        let rules = &linux["resources"]["devices"];
        assert_eq!((&rules[1]["minor"], &rules[2]["minor"]), (&json!(1), &json!(16)));
    }
}
