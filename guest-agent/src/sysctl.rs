//! Settings that all containers of the guest share: sysctl(8). A caller names those of the network;
//! the host names those that no namespace has, with its own values.
//!
//! libcontainer makes the settings of the container's own namespaces; the network is the machine's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A setting by its path below `/proc/sys`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    path: PathBuf,
    value: String,
}

/// A setting that cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingError {
    #[error("linux.sysctl: {0:?} is not the name of a network setting")]
    Name(String),
    #[error("linux.sysctl: {}: {source}", .path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl Setting {
    /// A setting of the network, whose name begins with `net.`.
    ///
    /// # Errors
    /// [`SettingError::Name`] for a name that could lead elsewhere.
    pub(crate) fn new(name: &str, value: String) -> Result<Self, SettingError> {
        let setting = Self::of_the_machine(name, value)?;
        if !name.starts_with("net.") {
            return Err(SettingError::Name(name.to_owned()));
        }
        Ok(setting)
    }

    /// A setting with any name.
    ///
    /// # Errors
    /// [`SettingError::Name`] for a name that could lead elsewhere.
    pub(crate) fn of_the_machine(name: &str, value: String) -> Result<Self, SettingError> {
        // Without a slash of its own, a name cannot lead elsewhere.
        if name.is_empty() || name.contains('/') || name.ends_with('.') || name.starts_with('.') {
            return Err(SettingError::Name(name.to_owned()));
        }
        Ok(Self { path: name.replace('.', "/").into(), value })
    }

    /// Applies the setting.
    ///
    /// # Errors
    /// [`SettingError::Write`] when the kernel has no such setting, or not this value.
    pub(crate) fn make(self) -> Result<(), SettingError> {
        let made = fs::write(Path::new("/proc/sys").join(&self.path), self.value);
        made.map_err(|source| SettingError::Write { path: self.path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_below_the_settings_of_the_network_only() {
        let setting = Setting::new("net.ipv4.ip_forward", "1".to_owned()).unwrap();
        assert_eq!(setting.path, Path::new("net/ipv4/ip_forward"));
        for name in ["kernel.shmmax", "net.", "net./x", "net.ipv4/../kernel/x", "net"] {
            let error = Setting::new(name, String::new()).unwrap_err();
            assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        }
        let error = Setting::new("net.no_such", "1".to_owned()).unwrap().make().unwrap_err();
        assert!(error.to_string().starts_with("linux.sysctl: net/no_such: "), "{error}");
    }
}
