//! Disks of a container: block devices of the host (`linux.devices` of type `b`), and block devices
//! and images of the host whose file system it mounts ([`super::volumes`]). Each becomes a virtio-blk
//! device of the machine, to which the guest binds a driver after it has booted. The agent finds it
//! by its serial number.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use rustix::fs::{major, minor};

use super::{BundleError, refuse, volumes};

/// The most disks that a machine has slots for.
pub const DISKS_MAX: usize = 8;

/// A block device or an image of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its path in the container, or where its file system is mounted there.
    pub path: PathBuf,
    /// Its path on the host.
    pub source: PathBuf,
    /// The container may not write to it, so it is read-only for the whole guest.
    pub read_only: bool,
    /// The file system that the container gets instead of the device.
    pub file_system: Option<FileSystem>,
}

/// The file system on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its type, as mount(8) names it.
    pub kind: &'static str,
    /// An empty disk gets one first.
    pub make: bool,
}

impl Disk {
    /// Opens the disk with the access that the container has.
    ///
    /// # Errors
    /// When the host does not allow it.
    pub fn open(&self) -> io::Result<File> {
        File::options().read(true).write(!self.read_only).open(&self.source)
    }
}

/// The disks that a specification names. A relative path is relative to the bundle.
///
/// # Errors
/// The host does not have one of them.
pub(super) fn of(spec: &Spec, bundle: &Path) -> Result<Vec<Disk>, BundleError> {
    let mut disks = devices(spec.linux().as_ref())?;
    disks.extend(volumes::of(spec, bundle)?);
    Ok(disks)
}

/// The block devices that a specification lists. A container that may use every device gets none: its
/// caller lists all devices of the host, and asks for none in particular.
fn devices(linux: Option<&Linux>) -> Result<Vec<Disk>, BundleError> {
    let Some(linux) = linux.filter(|linux| !refuse::every_device_allowed(linux)) else {
        return Ok(Vec::new());
    };
    let rules = linux.resources().as_ref().and_then(|it| it.devices().as_deref());
    let listed = linux.devices().iter().flatten();
    let disks = listed.filter(|device| device.typ() == LinuxDeviceType::B);
    disks
        .map(|device| {
            let number = (device.major(), device.minor());
            let path = device.path().clone();
            let source = find(number, Path::new("/sys/dev/block"), Path::new("/dev"))
                .map_err(|source| BundleError::Device { path: path.clone(), number, source })?;
            let read_only = !may_write(rules.unwrap_or_default(), number);
            Ok(Disk { path, source, read_only, file_system: None })
        })
        .collect()
}

/// The device node of a block device, found by the kernel's name for its number.
fn find(number: (i64, i64), sys: &Path, dev: &Path) -> io::Result<PathBuf> {
    let about = sys.join(format!("{}:{}", number.0, number.1)).join("uevent");
    let about = fs::read_to_string(about)?;
    let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let path = dev.join(name.ok_or(io::ErrorKind::NotFound)?);
    let data = fs::metadata(&path)?;
    let own = (major(data.rdev()).into(), minor(data.rdev()).into());
    match data.file_type().is_block_device() && own == number {
        true => Ok(path),
        false => Err(io::Error::other(format!("{} is another device", path.display()))),
    }
}

/// Whether device rules let a container write: the last rule that matches counts, and without one
/// the container may not.
fn may_write(rules: &[LinuxDeviceCgroup], number: (i64, i64)) -> bool {
    let fits = |rule: &&LinuxDeviceCgroup| {
        let kind =
            rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A || kind == LinuxDeviceType::B);
        let is = |own: Option<i64>, number: i64| own.is_none_or(|own| own < 0 || own == number);
        let access = rule.access().as_deref().is_none_or(|access| access.contains('w'));
        kind && access && is(rule.major(), number.0) && is(rule.minor(), number.1)
    };
    rules.iter().rev().find(fits).is_some_and(LinuxDeviceCgroup::allow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn the_last_rule_that_fits_says_who_writes() {
        let writes =
            |rules: Value| may_write(&serde_json::from_value::<Vec<_>>(rules).unwrap(), (7, 1));
        let none = json!({"allow": false, "access": "rwm"});
        let own = |access: &str| json!({"allow": true, "type": "b", "major": 7, "minor": 1, "access": access});
        assert!(!writes(json!([])));
        assert!(!writes(json!([none])));
        assert!(writes(json!([none, own("rwm")])));
        assert!(!writes(json!([none, own("r")])));
        assert!(!writes(json!([own("rwm"), none])));
        let other = json!({"allow": true, "type": "b", "major": 7, "minor": 2, "access": "rwm"});
        assert!(!writes(json!([none, other])));
    }

    #[test]
    fn what_is_not_that_device_is_not_taken() {
        let root = tempfile::tempdir().unwrap();
        let (sys, dev) = (root.path().join("sys"), root.path().join("dev"));
        fs::create_dir_all(sys.join("7:1")).unwrap();
        fs::create_dir(&dev).unwrap();
        fs::write(sys.join("7:1/uevent"), "MAJOR=7\nMINOR=1\nDEVNAME=loop1\n").unwrap();
        assert_eq!(find((7, 2), &sys, &dev).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(find((7, 1), &sys, &dev).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(dev.join("loop1"), "").unwrap();
        let error = find((7, 1), &sys, &dev).unwrap_err().to_string();
        assert!(error.contains("loop1 is another device"), "{error}");
    }
}
