//! Late binding of virtio-mmio slots (virtio 1.2 §4.2.2): a slot whose `DeviceID` read 0 when the
//! guest booted was left without a driver; once the monitor has given it an identity, writing its
//! name to the driver's `bind` file makes Linux probe it again. What is bound does not matter here.
//!
//! Processors: all that the machine may ever have are declared at boot, and only the first is
//! started. The others are brought online here when the host says how many exist.

use std::fs;
use std::io;
use std::path::Path;

/// The platform bus in sysfs.
pub(crate) const PLATFORM_BUS: &str = "/sys/bus/platform";

/// The processors in sysfs.
pub(crate) const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Starts processors of `directory` until the first `count` run; returns how many it started.
///
/// # Errors
/// A processor is not declared or does not start; those before it run.
pub(crate) fn start_processors(directory: &Path, count: u32) -> io::Result<usize> {
    let mut started = 0;
    // The first cannot be stopped, and has no such file.
    for number in 1..count {
        let online = directory.join(format!("cpu{number}/online"));
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", online.display()))
        };
        if fs::read_to_string(&online).map_err(named)?.trim() == "0" {
            fs::write(&online, "1").map_err(named)?;
            started += 1;
        }
    }
    Ok(started)
}

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
    fn as_many_processors_are_started_as_are_wanted_to_run() {
        let cpus = tempfile::tempdir().unwrap();
        for (name, state) in [("cpu1", "0\n"), ("cpu2", "1\n"), ("cpu3", "0\n")] {
            fs::create_dir(cpus.path().join(name)).unwrap();
            fs::write(cpus.path().join(name).join("online"), state).unwrap();
        }
        fs::create_dir(cpus.path().join("cpu0")).unwrap();
        fs::write(cpus.path().join("online"), "0-3\n").unwrap();
        assert_eq!(start_processors(cpus.path(), 1).unwrap(), 0);
        assert_eq!(start_processors(cpus.path(), 3).unwrap(), 1);
        assert_eq!(fs::read_to_string(cpus.path().join("cpu3/online")).unwrap(), "0\n");
        assert_eq!(start_processors(cpus.path(), 4).unwrap(), 1);
        let error = start_processors(cpus.path(), 5).unwrap_err();
        assert!(error.to_string().contains("cpu4/online"), "{error}");
    }

    #[test]
    fn a_bus_that_is_not_there_is_an_error() {
        assert!(rescan(Path::new("/nonexistent")).is_err());
    }
}
