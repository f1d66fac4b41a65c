//! The configuration of one virtual machine, in its only form.
//!
//! The supervisor sends it as JSON in the first message on the control socket, with every
//! descriptor that the monitor will ever use beside it. A [`Fd`] is the index of a descriptor in
//! that message. Nothing in here is a path: the monitor opens nothing.

use serde::{Deserialize, Serialize};
use thiserror::Error;

mod net;

pub use net::{NetConfig, PAIRS_MAX, RateLimit};

/// The version of this shape; the monitor refuses any other.
pub const VERSION: u32 = 1;
/// The number of virtio-mmio slots of a machine, devices and placeholders together.
pub const SLOT_COUNT: u8 = 17;
/// The most vCPUs that a machine can declare; the guest's kernel is built for as many.
pub const VCPUS_MAX: u8 = 64;
/// The least memory that the guest kernel boots in.
pub const MEMORY_MIB_MIN: u32 = 32;
/// The most memory that can be plugged into a machine, 64 TiB: no processor addresses more than
/// some bits above.
pub const PLUGGED_MIB_MAX: u32 = 64 << 20;
/// The longest kernel command line, as the guest kernel limits it.
pub const CMDLINE_MAX: usize = 2047;

/// The place of a descriptor among those that came with the message, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd(pub u8);

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Must be [`VERSION`].
    pub version: u32,
    /// The identity that the monitor takes before it handles anything from the guest.
    pub jail: JailConfig,
    /// `/dev/kvm`.
    pub kvm: Fd,
    /// The guest kernel: an ELF vmlinux.
    pub kernel: Fd,
    /// The initial root file system: a cpio archive.
    pub initramfs: Fd,
    /// Receives what the guest writes to its serial console.
    pub console: Fd,
    /// Added to the command line that the monitor builds itself.
    pub cmdline: String,
    /// vCPUs that exist from the start. The guest boots with the first and may bring the others
    /// online.
    pub vcpus: u8,
    /// vCPUs that the guest is told about; those above [`VmConfig::vcpus`] can be created later.
    pub vcpus_max: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// Devices present from the start; other slots are placeholders.
    pub devices: Vec<SlotDevice>,
}

/// An unprivileged identity, different for each pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// Neither 0 nor shared with another process of the host.
    pub uid: u32,
    /// Neither 0 nor shared with another process of the host.
    pub gid: u32,
}

/// A device and the slot it sits in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotDevice {
    /// Below [`SLOT_COUNT`].
    pub slot: u8,
    /// What sits there.
    pub device: DeviceConfig,
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceConfig {
    /// Host-initiated streams to the guest.
    Vsock {
        /// The guest's context id, 3 or more.
        guest_cid: u32,
    },
    /// Randomness from the host.
    Rng {
        /// `/dev/urandom`.
        source: Fd,
    },
    /// A shared file system, served by another process.
    Fs {
        /// The name under which the guest mounts it, at most 36 bytes.
        tag: String,
        /// A SEQPACKET socket to the file server; one FUSE message a packet.
        server: Fd,
    },
    /// A disk.
    Blk {
        /// A regular file or a block device.
        disk: Fd,
        /// The guest cannot write.
        read_only: bool,
        /// What the guest sees as the serial number, at most 20 bytes.
        serial: String,
    },
    /// A network interface.
    Net(NetConfig),
    /// Gives guest memory back to the host.
    Balloon,
    /// Memory that is plugged while the machine runs; at most one, which cannot be removed.
    Mem {
        /// The most that can be plugged; rounded up to whole steps. It costs nothing until then.
        region_mib: u32,
    },
    /// Memory that is plugged while the machine runs, and that huge pages of the host's pool hold;
    /// at most one, which cannot be removed.
    HugeMem {
        /// The most that can be plugged, spare memory included; rounded up to whole steps.
        region_mib: u32,
        /// The room that is left before it for [`DeviceConfig::Mem`], as that device gets it.
        behind_mib: u32,
    },
}

/// A field whose value cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("field {field}: {reason}")]
pub struct ConfigError {
    /// The field's path, such as `devices[2].serial`.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub reason: String,
}

impl ConfigError {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

impl JailConfig {
    /// Checks that both are unprivileged.
    ///
    /// # Errors
    /// Names the one that is not.
    pub fn validate(self) -> Result<(), ConfigError> {
        for (field, id) in [("jail.uid", self.uid), ("jail.gid", self.gid)] {
            if id == 0 || id == u32::MAX {
                return Err(ConfigError::new(field, format!("{id} is not an unprivileged id")));
            }
        }
        Ok(())
    }
}

impl VmConfig {
    /// Reads a configuration out of a message that brought `descriptors` descriptors.
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn from_json(json: &[u8], descriptors: usize) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(json)
            .map_err(|error| ConfigError::new("(message)", error.to_string()))?;
        config.validate(descriptors)?;
        Ok(config)
    }

    /// Checks every field against what the monitor can do.
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn validate(&self, descriptors: usize) -> Result<(), ConfigError> {
        if self.version != VERSION {
            let reason = format!("is {}, this monitor speaks {VERSION}", self.version);
            return Err(ConfigError::new("version", reason));
        }
        self.jail.validate()?;
        let fixed = [
            ("kvm", self.kvm),
            ("kernel", self.kernel),
            ("initramfs", self.initramfs),
            ("console", self.console),
        ];
        for (field, fd) in fixed {
            check_fd(field, fd, descriptors)?;
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            let reason = format!("{} is not between 1 and {VCPUS_MAX}", self.vcpus);
            return Err(ConfigError::new("vcpus", reason));
        }
        if !(self.vcpus..=VCPUS_MAX).contains(&self.vcpus_max) {
            let reason =
                format!("{} is not between {} and {VCPUS_MAX}", self.vcpus_max, self.vcpus);
            return Err(ConfigError::new("vcpus_max", reason));
        }
        if self.memory_mib < MEMORY_MIB_MIN {
            let reason = format!("{} is below {MEMORY_MIB_MIN}", self.memory_mib);
            return Err(ConfigError::new("memory_mib", reason));
        }
        if self.cmdline.len() > CMDLINE_MAX || !self.cmdline.is_ascii() {
            let reason = format!("must be ASCII and at most {CMDLINE_MAX} bytes");
            return Err(ConfigError::new("cmdline", reason));
        }
        self.validate_devices(descriptors)
    }

    fn validate_devices(&self, descriptors: usize) -> Result<(), ConfigError> {
        let mut taken = [false; SLOT_COUNT as usize];
        for (index, entry) in self.devices.iter().enumerate() {
            let field = format!("devices[{index}]");
            match taken.get_mut(usize::from(entry.slot)) {
                None => {
                    let reason = format!("{} is not below {SLOT_COUNT}", entry.slot);
                    return Err(ConfigError::new(format!("{field}.slot"), reason));
                }
                Some(true) => {
                    let reason = format!("{} is taken by an earlier device", entry.slot);
                    return Err(ConfigError::new(format!("{field}.slot"), reason));
                }
                Some(free) => *free = true,
            }
            entry.device.validate(&field, descriptors)?;
        }
        Ok(())
    }
}

impl DeviceConfig {
    /// Checks the fields of one device; `field` is its place in the message.
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn validate(&self, field: &str, descriptors: usize) -> Result<(), ConfigError> {
        match self {
            Self::Vsock { guest_cid } if *guest_cid < 3 || *guest_cid == u32::MAX => {
                let reason = format!("{guest_cid} is reserved; take 3 or more");
                Err(ConfigError::new(format!("{field}.guest_cid"), reason))
            }
            Self::Fs { tag, .. } if tag.is_empty() || tag.len() > 36 || tag.contains('\0') => {
                Err(ConfigError::new(format!("{field}.tag"), "must have 1 to 36 bytes, no NUL"))
            }
            Self::Blk { serial, .. } if serial.len() > 20 => {
                Err(ConfigError::new(format!("{field}.serial"), "is longer than 20 bytes"))
            }
            Self::Rng { source } => check_fd(&format!("{field}.source"), *source, descriptors),
            Self::Fs { server, .. } => check_fd(&format!("{field}.server"), *server, descriptors),
            Self::Blk { disk, .. } => check_fd(&format!("{field}.disk"), *disk, descriptors),
            Self::Net(net) => net.validate(field, descriptors),
            Self::Mem { region_mib } | Self::HugeMem { region_mib, .. }
                if !(1..=PLUGGED_MIB_MAX).contains(region_mib) =>
            {
                let reason = format!("{region_mib} is not between 1 and {PLUGGED_MIB_MAX}");
                Err(ConfigError::new(format!("{field}.region_mib"), reason))
            }
            Self::HugeMem { behind_mib, .. } if *behind_mib > PLUGGED_MIB_MAX => {
                let reason = format!("{behind_mib} is above {PLUGGED_MIB_MAX}");
                Err(ConfigError::new(format!("{field}.behind_mib"), reason))
            }
            Self::Vsock { .. } | Self::Balloon | Self::Mem { .. } | Self::HugeMem { .. } => Ok(()),
        }
    }
}

fn check_fd(field: &str, fd: Fd, descriptors: usize) -> Result<(), ConfigError> {
    if usize::from(fd.0) < descriptors {
        return Ok(());
    }
    let reason = format!("names descriptor {}, the message brought {descriptors}", fd.0);
    Err(ConfigError::new(field, reason))
}

#[cfg(test)]
mod tests;
