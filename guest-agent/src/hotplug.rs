//! Late binding of virtio-mmio slots (virtio 1.2 §4.2.2): a slot whose `DeviceID` read 0 when the
//! guest booted was left without a driver; once the monitor has given it an identity, writing its
//! name to the driver's `bind` file makes Linux look again. It knows nothing of what is bound.
//!
//! Processors: all that the machine may use are declared at boot, and only the first is started;
//! the others are brought online here.

use std::fs;
use std::io;
use std::path::Path;

/// The platform bus in sysfs.
pub(crate) const PLATFORM_BUS: &str = "/sys/bus/platform";

/// The processors in sysfs.
pub(crate) const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Starts every processor of `directory` that is declared and not running; gives how many it
/// started.
///
/// # Errors
/// The directory cannot be listed, or a processor does not start; those before it run.
pub(crate) fn start_processors(directory: &Path) -> io::Result<usize> {
    let mut started = 0;
    for entry in fs::read_dir(directory)? {
        // Only a processor that can be stopped has the file; the first cannot.
        let online = entry?.path().join("online");
        if fs::read_to_string(&online).is_ok_and(|state| state.trim() == "0") {
            fs::write(&online, "1").map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", online.display()))
            })?;
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
    fn stopped_processors_are_started_and_running_ones_left_alone() {
        let cpus = tempfile::tempdir().unwrap();
        for (name, state) in [("cpu1", "0\n"), ("cpu2", "1\n"), ("cpu3", "0\n")] {
            fs::create_dir(cpus.path().join(name)).unwrap();
            fs::write(cpus.path().join(name).join("online"), state).unwrap();
        }
        fs::create_dir(cpus.path().join("cpu0")).unwrap();
        fs::write(cpus.path().join("online"), "0-3\n").unwrap();
        assert_eq!(start_processors(cpus.path()).unwrap(), 2);
        assert_eq!(start_processors(cpus.path()).unwrap(), 0);
    }

    #[test]
    fn a_bus_that_is_not_there_is_an_error() {
        assert!(rescan(Path::new("/nonexistent")).is_err());
    }
}
