//! The host's policy: what an administrator decides for all containers. It is the file
//! `/etc/bulkhead/config.toml`, with a section for each name that the runtime is called by. What the
//! file does not say is as in [`Policy::default`].
//!
//! A pod follows the policy that was in force when it was created, and containers that join it do
//! too. Only what creates a container insists on a policy: a file with a mistake keeps no container
//! from being ended.

mod document;
mod error;
mod in_force;
mod keys;
mod runtime_name;
mod trusted;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::error::PolicyError;
pub use self::in_force::{InForce, Origin};
pub use self::runtime_name::RuntimeName;
use crate::logging::LogLevel;

/// What an administrator decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// How large machines are.
    pub size: SizePolicy,
    /// How frames of a machine's network move.
    pub network: NetworkPolicy,
    /// Sockets of the host.
    pub sockets: SocketPolicy,
    /// What runs in a machine.
    pub guest: GuestPolicy,
    /// What is logged.
    pub log: LogPolicy,
}

/// How large the machine of a container without limits is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizePolicy {
    /// Memory at the start, in MiB.
    pub memory_start_mib: u32,
    /// The most memory, in MiB; none for what the host has.
    pub memory_max_mib: Option<u32>,
    /// The most processors.
    pub processors_max: u8,
}

/// How frames of a machine's network move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPolicy {
    /// The host's kernel may move them.
    pub vhost: bool,
}

/// What a container may do with sockets of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketPolicy {
    /// Whether a socket of the host may be bound into a container by its name.
    pub host: HostSocketRule,
}

/// What happens to a bind mount whose source is a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostSocketRule {
    /// It is made.
    #[default]
    Allow,
    /// The container is refused.
    Refuse,
}

/// What runs in a machine. A relative path starts at the directory of this program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPolicy {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// How long it may take to boot.
    pub boot_timeout: Duration,
}

/// What is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPolicy {
    /// What is logged of a creation and by a pod's supervisor.
    pub level: LogLevel,
    /// The most that a pod's supervisor logs, in MiB.
    pub supervisor_max_mib: u32,
}

impl Default for SizePolicy {
    fn default() -> Self {
        Self { memory_start_mib: 128, memory_max_mib: None, processors_max: 8 }
    }
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self { vhost: true }
    }
}

impl Default for GuestPolicy {
    fn default() -> Self {
        Self {
            kernel: "../share/bulkhead/vmlinux".into(),
            modules: "../share/bulkhead/modules".into(),
            initramfs: "../share/bulkhead/initramfs.cpio".into(),
            boot_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for LogPolicy {
    fn default() -> Self {
        Self { level: LogLevel::Warning, supervisor_max_mib: 1 }
    }
}

#[cfg(test)]
mod tests;
