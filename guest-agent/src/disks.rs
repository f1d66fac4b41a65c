//! Block devices of the host: virtio-blk devices that the monitor has attached for a container. They
//! are bound here, found by their serial numbers, and put into its specification under the numbers
//! that the guest's kernel has given them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::Disk;
use oci_spec::runtime::{Linux, LinuxDeviceType};

use crate::hotplug;

/// Block devices in sysfs.
const BLOCK: &str = "/sys/block";

/// A disk that a container cannot be given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("cannot bind a disk")]
    Bind(#[source] io::Error),
    #[error("the machine has no disk for {0}")]
    Missing(String),
}

/// A disk that the kernel knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BoundDisk {
    /// Its path in the container.
    path: PathBuf,
    /// Major and minor number in this guest.
    number: (i64, i64),
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
    let find = |disk: Disk| match numbered(Path::new(BLOCK), &disk.serial) {
        Some(number) => Ok(BoundDisk { path: disk.path.into(), number }),
        None => Err(DiskError::Missing(disk.path)),
    };
    disks.into_iter().map(find).collect()
}

/// The number of the disk with this serial number.
fn numbered(block: &Path, serial: &str) -> Option<(i64, i64)> {
    let disks = fs::read_dir(block).ok()?.flatten().map(|entry| entry.path());
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    let disk = disks.into_iter().find(|disk| read(disk.join("serial")).trim() == serial)?;
    let number = read(disk.join("dev"));
    let (major, minor) = number.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

impl BoundDisk {
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
        assert_eq!(numbered(block.path(), "mine"), Some((254, 16)));
        assert_eq!(numbered(block.path(), "none"), None);
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
        BoundDisk { path: "/dev/b".into(), number: (254, 16) }.renumber(&mut linux);
        let linux = serde_json::to_value(linux).unwrap();
        assert_eq!(
            (&linux["devices"][0]["major"], &linux["devices"][1]["major"]),
            (&json!(7), &json!(254))
        );
        let rules = &linux["resources"]["devices"];
        assert_eq!((&rules[1]["minor"], &rules[2]["minor"]), (&json!(1), &json!(16)));
    }
}
