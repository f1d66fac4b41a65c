//! How large a pod's machine is, from what its container may use.

use oci_spec::runtime::{Linux, LinuxResources};
use thiserror::Error;

/// Memory of a machine whose container has no limit, in MiB.
const MEMORY_DEFAULT_MIB: u64 = 256;
/// The least memory of a machine, in MiB.
const MEMORY_MIN_MIB: u64 = 128;
/// What the guest kernel and the agent use themselves, in MiB: it is added to the container's limit
/// so that the limit, not the machine, is what the container runs into.
pub const MACHINE_OVERHEAD_MIB: u64 = 128;
/// The kernel's own period when none is given, in microseconds.
pub(super) const PERIOD_DEFAULT_US: u64 = 100_000;

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSize {
    /// Processors online.
    pub cpus: u64,
    /// Memory, in MiB.
    pub memory_mib: u64,
}

/// What a machine gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSize {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory, in MiB.
    pub memory_mib: u32,
}

impl HostSize {
    /// This host's.
    #[must_use]
    pub fn measure() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let info = rustix::system::sysinfo();
        let bytes = u128::from(info.totalram) * u128::from(info.mem_unit);
        Self {
            cpus: cpus.try_into().unwrap_or(u64::MAX),
            memory_mib: u64::try_from(bytes >> 20).unwrap_or(u64::MAX),
        }
    }
}

/// Limits for which a machine that runs is too small.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TooSmall {
    /// Of memory.
    #[error(
        "memory cannot be limited to {wanted} MiB: the machine was started for {} MiB at most; \
         create the container with the larger limit", .most
    )]
    Memory {
        /// The limit.
        wanted: u64,
        /// The largest that can be kept.
        most: u64,
    },
    /// Of processors.
    #[error(
        "processor time cannot be limited to {wanted} processors: the machine was started with \
         {most}; create the container with the larger limit"
    )]
    Processors {
        /// As many as the limit amounts to.
        wanted: u64,
        /// As many as it has.
        most: u64,
    },
}

impl MachineSize {
    /// Checks that a machine that runs can keep limits that are raised.
    ///
    /// # Errors
    /// [`TooSmall`].
    pub fn check(self, now: &LinuxResources, then: &LinuxResources) -> Result<(), TooSmall> {
        let (has, wanted) = (limit_mib(now).unwrap_or(0), limit_mib(then).unwrap_or(0));
        let most = u64::from(self.memory_mib).saturating_sub(MACHINE_OVERHEAD_MIB);
        if wanted > most.max(has) {
            return Err(TooSmall::Memory { wanted, most });
        }
        let (has, wanted) = (quota(now).unwrap_or(0), quota(then).unwrap_or(0));
        let most = u64::from(self.vcpus);
        if wanted > most.max(has) {
            return Err(TooSmall::Processors { wanted, most });
        }
        Ok(())
    }
}

/// The size of a machine for one container.
pub(super) fn of(linux: Option<&Linux>, host: HostSize) -> MachineSize {
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let wanted = resources
        .and_then(limit_mib)
        .map_or(MEMORY_DEFAULT_MIB, |limit| limit.saturating_add(MACHINE_OVERHEAD_MIB));
    let memory = wanted.min(host.memory_mib).max(MEMORY_MIN_MIB);
    let cpus = resources.map_or(1, processors);
    let most = host.cpus.min(bulkhead_vmm::config::VCPUS_MAX.into()).max(1);
    MachineSize {
        vcpus: u8::try_from(cpus.clamp(1, most)).unwrap_or(1),
        memory_mib: u32::try_from(memory).unwrap_or(u32::MAX),
    }
}

/// The memory limit, rounded up.
fn limit_mib(resources: &LinuxResources) -> Option<u64> {
    let limit = u64::try_from(resources.memory().as_ref()?.limit()?).ok()?;
    (limit > 0).then(|| limit.div_ceil(1 << 20))
}

/// Whole processors that a quota amounts to.
fn quota(resources: &LinuxResources) -> Option<u64> {
    let cpu = resources.cpu().as_ref()?;
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(PERIOD_DEFAULT_US);
    let quota = u64::try_from(cpu.quota()?).ok()?;
    (quota > 0).then(|| quota.div_ceil(period))
}

/// Those of the quota; without one, those of the cpuset.
fn processors(resources: &LinuxResources) -> u64 {
    let cpuset = resources.cpu().as_ref().and_then(|cpu| cpu.cpus().as_deref());
    quota(resources).unwrap_or_else(|| cpuset.map_or(1, listed))
}

/// How many processors a list such as `0-3,8` names; 0 when it cannot be read.
fn listed(list: &str) -> u64 {
    let count = |range: &str| -> Option<u64> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.split(',').map(|range| count(range).unwrap_or(0)).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn size(resources: &Value) -> (u8, u32) {
        let linux: Linux = serde_json::from_value(json!({ "resources": resources })).unwrap();
        let size = of(Some(&linux), HostSize { cpus: 8, memory_mib: 4096 });
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn a_container_without_limits_gets_the_default() {
        assert_eq!(size(&json!({})), (1, 256));
        assert_eq!(size(&json!({"memory": {"limit": -1}, "cpu": {"quota": -1}})), (1, 256));
    }

    #[test]
    fn limits_are_rounded_up_and_the_guest_comes_on_top() {
        assert_eq!(size(&json!({"memory": {"limit": (64 << 20) + 1}})).1, 193);
        assert_eq!(size(&json!({"cpu": {"quota": 150_000}})).0, 2);
        assert_eq!(size(&json!({"cpu": {"quota": 150_000, "period": 50_000}})).0, 3);
        assert_eq!(size(&json!({"cpu": {"cpus": "0-2,5"}})).0, 4);
    }

    #[test]
    fn a_machine_that_runs_keeps_what_it_was_started_for() {
        let machine = MachineSize { vcpus: 2, memory_mib: 256 };
        let from = |now: &Value, then: Value| {
            let now = serde_json::from_value(now.clone()).unwrap();
            let then = serde_json::from_value(then).unwrap();
            machine.check(&now, &then).map_err(|error| error.to_string())
        };
        let check = |then| from(&json!({}), then);
        let all = json!({"memory": {"limit": 128 << 20}, "cpu": {"quota": 200_000}});
        assert_eq!(check(all), Ok(()));
        assert_eq!(check(json!({"memory": {"limit": -1}, "cpu": {"quota": -1}})), Ok(()));
        let error = check(json!({"memory": {"limit": (128 << 20) + 1}})).unwrap_err();
        assert!(error.contains("129 MiB") && error.contains("128 MiB at most"), "{error}");
        let error = check(json!({"cpu": {"quota": 200_001}})).unwrap_err();
        assert!(error.contains("3 processors") && error.contains("with 2"), "{error}");
        // Limits beyond the host itself were there before.
        let beyond = json!({"memory": {"limit": 1_i64 << 40}, "cpu": {"quota": 900_000}});
        assert_eq!(from(&beyond, beyond.clone()), Ok(()));
    }

    #[test]
    fn nothing_gets_more_than_the_host_has_or_less_than_a_guest_needs() {
        assert_eq!(size(&json!({"memory": {"limit": i64::MAX}})).1, 4096);
        assert_eq!(size(&json!({"cpu": {"quota": i64::MAX}})).0, 8);
        assert_eq!(size(&json!({"cpu": {"cpus": "7-x,,18446744073709551615"}})).0, 1);
        assert_eq!(size(&json!({"memory": {"limit": 1}})).1, 129);
    }
}
