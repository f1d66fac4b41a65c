//! Opens `/dev/kvm`, and refuses a KVM that is too slow to boot a guest.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use bulkhead_vmm::kvm_probe::{self, ProbeError, Speed};
use thiserror::Error;

/// The environment variable that, set to `1`, allows a KVM of any speed.
const ALLOW_SLOW: &str = "BULKHEAD_ALLOW_SLOW_KVM";
const DEVICE: &str = "/dev/kvm";

/// Why this host cannot run a machine.
#[derive(Debug, Error)]
pub enum KvmError {
    /// There is no device.
    #[error(
        "{0} does not exist: load kvm_intel or kvm_amd, or switch on virtualization in the \
         firmware (nested virtualization, if this host is itself a virtual machine)"
    )]
    Missing(String),
    /// The device cannot be opened.
    #[error("cannot open {0}: bulkhead must be run as root")]
    Open(String, #[source] io::Error),
    /// KVM is emulated in software.
    #[error(
        "KVM on this host is emulated in software and too slow to boot a guest ({0} supervisor \
         loops/s measured, {least} needed): use a host with hardware virtualization, or the test \
         host (\"cargo xtask host\"); {ALLOW_SLOW}=1 tries all the same",
        least = kvm_probe::LOOPS_PER_SECOND_MIN
    )]
    Slow(u64),
    /// KVM does not work.
    #[error("KVM does not work on this host")]
    Broken(#[from] ProbeError),
}

/// Opens the device.
///
/// # Errors
/// Says what the user can do about it.
pub fn open() -> Result<File, KvmError> {
    open_at(Path::new(DEVICE))
}

fn open_at(path: &Path) -> Result<File, KvmError> {
    let name = path.display().to_string();
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => KvmError::Missing(name),
            _ => KvmError::Open(name, error),
        }
    })
}

/// Checks that a guest's kernel-mode code runs at hardware speed. Costs nothing if the processor
/// reports hardware virtualization; otherwise a short loop in a guest is timed.
///
/// # Errors
/// When KVM is emulated, unless the user allows that.
pub fn check_speed(kvm: &File) -> Result<(), KvmError> {
    if kvm_probe::processor_virtualizes() || std::env::var_os(ALLOW_SLOW).is_some_and(|v| v == "1")
    {
        return Ok(());
    }
    match kvm_probe::measure(kvm)? {
        Speed::Hardware => Ok(()),
        Speed::Emulated { loops_per_second } => Err(KvmError::Slow(loops_per_second)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_brings_it() {
        let words = open_at(Path::new("/nonexistent/kvm")).unwrap_err().to_string();
        assert!(words.starts_with("/nonexistent/kvm does not exist: load kvm_intel"), "{words}");
    }

    #[test]
    fn a_device_that_cannot_be_opened_says_so() {
        let words = open_at(Path::new("/")).unwrap_err().to_string();
        assert_eq!(words, "cannot open /: bulkhead must be run as root");
    }

    #[test]
    fn a_slow_device_is_named_with_the_measure_and_the_way_out() {
        let words = KvmError::Slow(700_000).to_string();
        assert!(words.contains("(700000 supervisor loops/s") && words.contains("xtask host"));
    }
}
