//! The messages between the two sides of the test host over the control port: one JSON line from
//! the outer side, two from the inner one, and empty lines from the outer side, which keep the
//! inner one awake.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The names of the virtio-serial ports.
pub(crate) const CONTROL_PORT: &str = "control";
/// The command's standard output.
pub(crate) const STDOUT_PORT: &str = "stdout";
/// The command's standard error, unless it is the same file as its output.
pub(crate) const STDERR_PORT: &str = "stderr";
/// The mount tag of the machine's root.
pub(crate) const ROOT_TAG: &str = "root";
/// How the machine's root is mounted.
pub(crate) const ROOT_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=1048576,cache=loose";
/// The prefix of modules' names in the initramfs; the position in the order of loading follows.
pub(crate) const MODULE: &str = "test-host-module-";
/// The mount tag of the shared directory.
pub(crate) const SHARE_TAG: &str = "share";
/// Where the shared directory is mounted inside.
pub(crate) const SHARE_DIRECTORY: &str = "/run/share-out";

/// What to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The program and its arguments; empty for a shell on the terminal.
    pub(crate) command: Vec<String>,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) directory: String,
    /// Both streams go to the output port, in the order they are written.
    pub(crate) merged: bool,
    pub(crate) share: bool,
    /// The directory of the kernel's modules, if it has any.
    pub(crate) modules: Option<PathBuf>,
    pub(crate) hosted: Hosted,
    /// Rows and columns of the terminal.
    pub(crate) window: (u16, u16),
}

/// The environment in which the command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Hosted {
    /// cgroup v2, and no other process.
    Alone,
    /// The hierarchies of cgroup v1, and no other process.
    OnCgroupV1,
    /// cgroup v2, systemd as the first process, and the system's message bus.
    BySystemd,
}

/// The answers of the inner side.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The host is up; from here on the command may have had effects.
    Ready,
    /// The command ended with this exit status, 128 and the number for a signal.
    Ended(u8),
    /// It could not be run, and why.
    NotRun(String),
}
