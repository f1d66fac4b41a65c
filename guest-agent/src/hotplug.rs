//! Late binding of virtio-mmio slots (virtio 1.2 §4.2.2): a slot whose `DeviceID` read 0 when the
//! guest booted was left without a driver; once the monitor has given it an identity, writing its
//! name to the driver's `bind` file makes Linux look again. It knows nothing of what is bound.

use std::fs;
use std::io;
use std::path::Path;

/// The platform bus in sysfs.
pub(crate) const PLATFORM_BUS: &str = "/sys/bus/platform";

/// Tries every unbound virtio-mmio slot of `bus` and returns the names of those that were bound.
///
/// # Errors
/// The bus cannot be listed, or a slot has a device and its driver refuses it.
pub(crate) fn rescan(bus: &Path) -> io::Result<Vec<String>> {
    let bind = bus.join("drivers/virtio-mmio/bind");
    let mut bound = Vec::new();
    for entry in fs::read_dir(bus.join("devices"))? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("virtio-mmio.")) else {
            continue;
        };
        if fs::symlink_metadata(entry.path().join("driver")).is_ok() {
            continue;
        }
        match fs::write(&bind, name) {
            Ok(()) => bound.push(name.to_owned()),
            // Still a placeholder.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("{name}: {error}"))),
        }
    }
    bound.sort();
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unbound_slots_are_bound() {
        let bus = tempfile::tempdir().unwrap();
        for device in ["virtio-mmio.0/driver", "virtio-mmio.3", "serial8250", "virtio-mmio.1"] {
            fs::create_dir_all(bus.path().join("devices").join(device)).unwrap();
        }
        fs::create_dir_all(bus.path().join("drivers/virtio-mmio")).unwrap();
        assert_eq!(rescan(bus.path()).unwrap(), ["virtio-mmio.1", "virtio-mmio.3"]);
    }

    #[test]
    fn a_bus_that_is_not_there_is_an_error() {
        assert!(rescan(Path::new("/nonexistent")).is_err());
    }
}
