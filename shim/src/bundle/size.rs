//! The size of a pod's machine, computed from the limits of its containers.

use std::fs;

use bulkhead_vmm::config::VCPUS_MAX;
use oci_spec::runtime::LinuxResources;

use super::huge_pages;
use crate::policy::SizePolicy;

/// The least memory of a machine, in MiB.
const MEMORY_MIN_MIB: u64 = 128;
/// What the guest kernel and the agent use themselves, in MiB. It is added to the container's
/// limit, so that the container reaches its limit before the machine is out of memory.
pub const MACHINE_OVERHEAD_MIB: u64 = 128;
/// The most processors that are declared to a guest for later growth. Each costs memory:
/// docs/decisions/0014-growing-machines.md.
const DECLARED_MAX: u8 = 8;
/// The list of the host's online processors.
const PROCESSORS_ONLINE: &str = "/sys/devices/system/cpu/online";
/// The kernel's default CFS period, in microseconds.
pub(super) const PERIOD_DEFAULT_US: u64 = 100_000;

/// The size of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSize {
    /// Processors online.
    pub cpus: u64,
    /// Memory, in MiB.
    pub memory_mib: u64,
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSize {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Memory that programs can count on, in MiB: what is more than [`MachineSize::memory_mib`] is
    /// plugged when the containers need it.
    pub expected_mib: u32,
    /// Huge pages of the host's pool, which a machine boots without. They come on top of its memory,
    /// which has room for their description.
    pub huge_pages: u32,
}

impl HostSize {
    /// Measures this host, whatever part of it the caller itself may use: the pod has a cgroup of
    /// its own, and its machine may get more processors later.
    #[must_use]
    pub fn measure() -> Self {
        let online = fs::read_to_string(PROCESSORS_ONLINE).unwrap_or_default();
        let info = rustix::system::sysinfo();
        Self { cpus: listed(online.trim()).max(1), memory_mib: mib(info.totalram, info.mem_unit) }
    }
}

impl MachineSize {
    /// The size of a machine for these containers. The policy decides for those without a limit;
    /// what they do not start with is plugged when they need it:
    /// docs/decisions/0021-memory-on-demand.md.
    #[must_use]
    pub fn of(all: &[&LinuxResources], host: HostSize, policy: SizePolicy) -> Self {
        let most = policy.memory_max_mib.map_or(u64::MAX, u64::from);
        let start = most.min(policy.memory_start_mib.into());
        let huge_pages = all.iter().map(|it| huge_pages::pages(it)).fold(0, u32::saturating_add);
        let overhead = MACHINE_OVERHEAD_MIB + huge_pages::overhead_mib(huge_pages);
        let together = |unlimited: u64| {
            let memory = all.iter().map(|it| limit_mib(it).unwrap_or(unlimited));
            memory.fold(overhead, u64::saturating_add).min(host.memory_mib)
        };
        let memory = together(start).max(MEMORY_MIN_MIB);
        let expected = together(most).max(memory);
        let cpus = all.iter().map(|it| processors(it).unwrap_or(policy.processors_max.into()));
        let most = host.cpus.min(VCPUS_MAX.into()).max(1);
        Self {
            vcpus: u8::try_from(cpus.fold(0, u64::saturating_add).clamp(1, most)).unwrap_or(1),
            memory_mib: u32::try_from(memory).unwrap_or(u32::MAX),
            expected_mib: u32::try_from(expected).unwrap_or(u32::MAX),
            huge_pages,
        }
    }

    /// The largest size that a machine of this initial size can grow to.
    #[must_use]
    pub fn most(self, host: HostSize) -> Self {
        let vcpus = u8::try_from(host.cpus.min(DECLARED_MAX.into())).unwrap_or(DECLARED_MAX);
        let memory_mib = u32::try_from(host.memory_mib).unwrap_or(u32::MAX);
        Self {
            vcpus: self.vcpus.max(vcpus),
            memory_mib: self.memory_mib.max(memory_mib),
            expected_mib: self.expected_mib.max(memory_mib),
            ..self
        }
    }
}

/// An amount that sysinfo(2) gives in its unit, in MiB.
pub(super) fn mib(amount: u64, unit: u32) -> u64 {
    u64::try_from((u128::from(amount) * u128::from(unit)) >> 20).unwrap_or(u64::MAX)
}

/// The memory limit in MiB, rounded up.
fn limit_mib(resources: &LinuxResources) -> Option<u64> {
    let limit = u64::try_from(resources.memory().as_ref()?.limit()?).ok()?;
    (limit > 0).then(|| limit.div_ceil(1 << 20))
}

/// The number of processors that a quota needs, rounded up.
fn quota(resources: &LinuxResources) -> Option<u64> {
    let cpu = resources.cpu().as_ref()?;
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(PERIOD_DEFAULT_US);
    let quota = u64::try_from(cpu.quota()?).ok()?;
    (quota > 0).then(|| quota.div_ceil(period))
}

/// The number of processors by the quota; without one, by the cpuset; `None` without either.
pub(super) fn processors(resources: &LinuxResources) -> Option<u64> {
    let cpuset = resources.cpu().as_ref().and_then(|cpu| cpu.cpus().as_deref());
    quota(resources).or_else(|| cpuset.filter(|list| !list.is_empty()).map(listed))
}

/// How many processors a list such as `0-3,8` names; parts that cannot be parsed count as 0.
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

    const POLICY: SizePolicy =
        SizePolicy { memory_start_mib: 128, memory_max_mib: None, processors_max: 8 };

    fn size(resources: &Value) -> (u8, u32) {
        let resources = serde_json::from_value(resources.clone()).unwrap();
        let size = MachineSize::of(&[&resources], HostSize { cpus: 8, memory_mib: 4096 }, POLICY);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn a_container_without_limits_gets_the_default() {
        assert_eq!(size(&json!({})), (8, 256));
        assert_eq!(size(&json!({"memory": {"limit": -1}, "cpu": {"quota": -1}})), (8, 256));
        let large = HostSize { cpus: 64, memory_mib: 1 << 20 };
        let size = MachineSize::of(&[&LinuxResources::default()], large, POLICY);
        let expected =
            MachineSize { vcpus: 8, memory_mib: 256, expected_mib: 1 << 20, huge_pages: 0 };
        assert_eq!(size, expected);
    }

    #[test]
    fn a_container_with_a_limit_counts_on_no_more() {
        let host = HostSize { cpus: 1, memory_mib: 4096 };
        let limited = json!({"memory": {"limit": 512 << 20}});
        let limited: LinuxResources = serde_json::from_value(limited).unwrap();
        assert_eq!(MachineSize::of(&[&limited], host, POLICY).expected_mib, 640);
        let both = MachineSize::of(&[&limited, &LinuxResources::default()], host, POLICY);
        assert_eq!((both.memory_mib, both.expected_mib), (768, 4096));
    }

    #[test]
    fn the_policy_caps_a_container_without_a_limit_only() {
        let host = HostSize { cpus: 8, memory_mib: 4096 };
        let policy =
            SizePolicy { memory_start_mib: 128, memory_max_mib: Some(512), processors_max: 2 };
        let none = LinuxResources::default();
        let large = json!({"memory": {"limit": 1 << 30}, "cpu": {"quota": 400_000}});
        let large: LinuxResources = serde_json::from_value(large).unwrap();
        let of = |all: &[&LinuxResources], policy| {
            let size = MachineSize::of(all, host, policy);
            (size.vcpus, size.memory_mib, size.expected_mib)
        };
        assert_eq!(of(&[&none], policy), (2, 256, 640));
        assert_eq!(of(&[&large], policy), (4, 1152, 1152));
        assert_eq!(of(&[&none, &none], policy), (4, 384, 1152));
        assert_eq!(of(&[&none, &large], policy), (6, 1280, 1664));
        let small = SizePolicy { memory_max_mib: Some(64), ..policy };
        assert_eq!(of(&[&none], small), (2, 192, 192));
        let much = SizePolicy { memory_start_mib: 1024, memory_max_mib: None, processors_max: 64 };
        assert_eq!(of(&[&none], much), (8, 1152, 4096));
    }

    #[test]
    fn limits_are_rounded_up_and_the_guest_comes_on_top() {
        assert_eq!(size(&json!({"memory": {"limit": (64 << 20) + 1}})).1, 193);
        assert_eq!(size(&json!({"cpu": {"quota": 150_000}})).0, 2);
        assert_eq!(size(&json!({"cpu": {"quota": 150_000, "period": 50_000}})).0, 3);
        assert_eq!(size(&json!({"cpu": {"cpus": "0-2,5"}})).0, 4);
    }

    #[test]
    fn containers_that_share_a_machine_add_up() {
        let read = |json: &Value| serde_json::from_value::<LinuxResources>(json.clone()).unwrap();
        let limited = read(&json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 200_000}}));
        let (none, host) = (read(&json!({})), HostSize { cpus: 8, memory_mib: 4096 });
        let size = |all: &[&LinuxResources]| {
            let size = MachineSize::of(all, host, POLICY);
            (size.vcpus, size.memory_mib)
        };
        assert_eq!(size(&[&none, &none]), (8, 384));
        assert_eq!(size(&[&none, &limited]), (8, 320));
        assert_eq!(size(&[&limited, &limited]), (4, 256));
        let huge = read(&json!({
            "memory": {"limit": 64 << 20}, "hugepageLimits": [{"pageSize": "2MB", "limit": 128 << 20}],
        }));
        let both = MachineSize::of(&[&huge, &huge], host, POLICY);
        assert_eq!((both.memory_mib, both.huge_pages), (256 + 6, 128));
    }

    #[test]
    fn a_machine_can_become_as_large_as_the_host() {
        let most = |vcpus, memory_mib, cpus| {
            let host = HostSize { cpus, memory_mib: 4096 };
            let size = MachineSize { vcpus, memory_mib, expected_mib: memory_mib, huge_pages: 0 };
            let most = size.most(host);
            (most.vcpus, most.memory_mib)
        };
        assert_eq!(most(1, 256, 4), (4, 4096));
        assert_eq!(most(1, 256, 1000), (DECLARED_MAX, 4096));
        assert_eq!(most(40, 256, 64), (40, 4096));
        assert_eq!(most(1, 8192, 1), (1, 8192));
    }

    #[test]
    fn the_processors_of_this_host_are_counted() {
        let measured = HostSize::measure();
        let all = std::thread::available_parallelism().unwrap().get() as u64;
        assert!(measured.cpus >= all, "{measured:?} is less than {all}");
    }

    #[test]
    fn nothing_gets_more_than_the_host_has_or_less_than_a_guest_needs() {
        assert_eq!(size(&json!({"memory": {"limit": i64::MAX}})).1, 4096);
        assert_eq!(size(&json!({"cpu": {"quota": i64::MAX}})).0, 8);
        assert_eq!(size(&json!({"cpu": {"cpus": "7-x,,18446744073709551615"}})).0, 1);
        assert_eq!(size(&json!({"memory": {"limit": 1}})).1, 129);
    }
}
