//! How large a pod's machine is, from what its container may use.

use oci_spec::runtime::{Linux, LinuxCpu};

/// Memory of a machine whose container has no limit, in MiB.
const MEMORY_DEFAULT_MIB: u64 = 256;
/// The least memory of a machine, in MiB.
const MEMORY_MIN_MIB: u64 = 128;
/// What the guest kernel and the agent use themselves, in MiB: it is added to the container's limit
/// so that the limit, not the machine, is what the container runs into.
const MEMORY_OVERHEAD_MIB: u64 = 128;
/// The kernel's own period when none is given, in microseconds.
const PERIOD_DEFAULT_US: u64 = 100_000;

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

/// The size of a machine for one container.
pub(super) fn of(linux: Option<&Linux>, host: HostSize) -> MachineSize {
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let limit = resources
        .and_then(|resources| resources.memory().as_ref())
        .and_then(|memory| memory.limit().and_then(|bytes| u64::try_from(bytes).ok()))
        .filter(|bytes| *bytes > 0);
    let wanted = limit.map_or(MEMORY_DEFAULT_MIB, |bytes| {
        (bytes.div_ceil(1 << 20)).saturating_add(MEMORY_OVERHEAD_MIB)
    });
    let memory = wanted.min(host.memory_mib).max(MEMORY_MIN_MIB);
    let cpus = resources.and_then(|resources| resources.cpu().as_ref()).map_or(1, processors);
    let most = host.cpus.min(bulkhead_vmm::config::VCPUS_MAX.into()).max(1);
    MachineSize {
        vcpus: u8::try_from(cpus.clamp(1, most)).unwrap_or(1),
        memory_mib: u32::try_from(memory).unwrap_or(u32::MAX),
    }
}

/// Whole processors that a quota amounts to; without one, those of the cpuset.
fn processors(cpu: &LinuxCpu) -> u64 {
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(PERIOD_DEFAULT_US);
    match cpu.quota().and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0) {
        Some(quota) => quota.div_ceil(period),
        None => cpu.cpus().as_deref().map_or(1, listed),
    }
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
    fn nothing_gets_more_than_the_host_has_or_less_than_a_guest_needs() {
        assert_eq!(size(&json!({"memory": {"limit": i64::MAX}})).1, 4096);
        assert_eq!(size(&json!({"cpu": {"quota": i64::MAX}})).0, 8);
        assert_eq!(size(&json!({"cpu": {"cpus": "7-x,,18446744073709551615"}})).0, 1);
        assert_eq!(size(&json!({"memory": {"limit": 1}})).1, 129);
    }
}
