//! The directories above a container's devices: libcontainer makes those that do not exist with all
//! permissions for everybody, runc with the usual ones.
//!
//! This is only about a `/dev` that was mounted for the container: nothing else can have made them
//! there.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

const DEV: &str = "/dev";
/// The mode that libcontainer gives them.
const EVERYTHING: u32 = 0o777;
/// The mode that they should have.
const USUAL: u32 = 0o755;

/// The directories above the devices of a specification.
pub(crate) fn of(spec: &Spec) -> BTreeSet<PathBuf> {
    let mut mounts = spec.mounts().iter().flatten();
    let fresh = mounts.any(|mount| {
        mount.destination() == Path::new(DEV) && mount.typ().as_deref() == Some("tmpfs")
    });
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref());
    let devices = devices.filter(|_| fresh).unwrap_or_default();
    let above = devices.iter().flat_map(|device| device.path().ancestors().skip(1));
    let below_dev = |path: &&Path| path.starts_with(DEV) && *path != Path::new(DEV);
    above.filter(below_dev).map(Path::to_owned).collect()
}

/// Gives them their usual mode. This process is in the container's mount namespace.
///
/// # Errors
/// Names the directory.
pub(crate) fn set_right(directories: BTreeSet<PathBuf>) -> Result<(), (PathBuf, io::Error)> {
    for directory in directories {
        set_mode(&directory).map_err(|error| (directory, error))?;
    }
    Ok(())
}

fn set_mode(directory: &Path) -> io::Result<()> {
    let (own, dev) = (fs::symlink_metadata(directory)?, fs::metadata(DEV)?);
    // Another file system was mounted there, and has modes of its own.
    if own.dev() != dev.dev() || !own.is_dir() || own.mode() & 0o7777 != EVERYTHING {
        return Ok(());
    }
    match fs::set_permissions(directory, Permissions::from_mode(USUAL)) {
        // On a read-only file system nobody can use the permissions.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        set => set,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn directories(kind: &str) -> Vec<PathBuf> {
        let spec = json!({
            "ociVersion": "1.0.2",
            "mounts": [{"destination": "/dev", "type": kind}],
            "linux": {"devices": [
                {"path": "/dev/a/b/c", "type": "c", "major": 1, "minor": 3},
                {"path": "/dev/plain", "type": "c", "major": 1, "minor": 3},
                {"path": "/dev/a/other", "type": "p"}
            ]}
        });
        of(&serde_json::from_value(spec).unwrap()).into_iter().collect()
    }

    #[test]
    fn the_directories_of_a_fresh_dev_are_those_above_its_devices() {
        assert_eq!(directories("tmpfs"), ["/dev/a", "/dev/a/b"].map(PathBuf::from));
        assert!(directories("bind").is_empty());
    }
}
