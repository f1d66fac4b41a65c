//! The resource limits (rlimits) of a caller's process, which a container's process inherits as it
//! would on the host.

use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process};
use rustix::process::{Resource, Rlimit, getrlimit};
use serde::{Deserialize, Serialize};

/// The limits that a process inherits. The guest has its own limit of locked memory
/// (`guest-agent`).
const INHERITED: [(PosixRlimitType, Resource); 15] = [
    (PosixRlimitType::RlimitAs, Resource::As),
    (PosixRlimitType::RlimitCore, Resource::Core),
    (PosixRlimitType::RlimitCpu, Resource::Cpu),
    (PosixRlimitType::RlimitData, Resource::Data),
    (PosixRlimitType::RlimitFsize, Resource::Fsize),
    (PosixRlimitType::RlimitLocks, Resource::Locks),
    (PosixRlimitType::RlimitMsgqueue, Resource::Msgqueue),
    (PosixRlimitType::RlimitNice, Resource::Nice),
    (PosixRlimitType::RlimitNofile, Resource::Nofile),
    (PosixRlimitType::RlimitNproc, Resource::Nproc),
    (PosixRlimitType::RlimitRss, Resource::Rss),
    (PosixRlimitType::RlimitRtprio, Resource::Rtprio),
    (PosixRlimitType::RlimitRttime, Resource::Rttime),
    (PosixRlimitType::RlimitSigpending, Resource::Sigpending),
    (PosixRlimitType::RlimitStack, Resource::Stack),
];
/// The value of `fs.nr_open` in the guest: a limit of open files cannot be higher there.
const OPEN_FILES_MAX: u64 = 1 << 20;

/// Limits of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLimits(Vec<PosixRlimit>);

impl ProcessLimits {
    /// The limits of this process.
    #[must_use]
    pub fn own() -> Self {
        let limit = |(kind, resource)| {
            let Rlimit { current, maximum } = getrlimit(resource);
            let most = match kind {
                PosixRlimitType::RlimitNofile => OPEN_FILES_MAX,
                _ => u64::MAX,
            };
            let number = |limit: Option<u64>| limit.unwrap_or(u64::MAX).min(most);
            let builder = PosixRlimitBuilder::default().typ(kind);
            // All fields are set, so this does not fail.
            builder.soft(number(current)).hard(number(maximum)).build().ok()
        };
        Self(INHERITED.into_iter().filter_map(limit).collect())
    }

    /// Adds these limits to a process, except those that its specification sets itself.
    pub fn fill(&self, process: &mut Process) {
        let mut limits = process.rlimits().clone().unwrap_or_default();
        for limit in &self.0 {
            if !limits.iter().any(|own| own.typ() == limit.typ()) {
                limits.push(*limit);
            }
        }
        process.set_rlimits(Some(limits));
    }
}
