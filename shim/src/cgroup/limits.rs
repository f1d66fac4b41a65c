//! What a pod's cgroup on the host may use: its container's limits, and on top what a machine takes
//! that a plain container does not. The container itself runs into its own limits, inside.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxMemory, LinuxResources};

use crate::bundle::MACHINE_OVERHEAD_MIB;

/// Memory of monitor, file server, supervisor and stand-ins with page tables and sockets, in MiB;
/// several times what they have at rest.
const PROCESSES_MIB: u64 = 64;
/// Threads of the host: one for each vCPU and each device, and the supervisor's.
const TASKS: i64 = 256;

/// The limits of a pod's cgroup.
#[derive(Clone, Debug)]
pub struct Limits(LinuxResources);

impl Limits {
    /// From those of its container.
    #[must_use]
    pub fn of(container: &LinuxResources) -> Self {
        let mut host = container.clone();
        // Who opens devices is the supervisor, and what it hands on is decided elsewhere
        // (`crate::bundle::refuse`). Said aloud: without any rule libcgroups has some of its own.
        let everything =
            LinuxDeviceCgroupBuilder::default().allow(true).typ(LinuxDeviceType::A).access("rwm");
        host.set_devices(everything.build().ok().map(|rule| vec![rule]));
        host.set_network(None);
        host.set_memory(host.memory().map(with_the_machine));
        if let Some(pids) = host.pids_mut().as_mut().filter(|pids| pids.limit() > 0) {
            pids.set_limit(pids.limit().saturating_add(TASKS));
        }
        // Files of cgroup v2 as they are: those of memory and tasks are the container's own.
        let unified = host.unified().clone().unwrap_or_default().into_iter();
        let unified: HashMap<_, _> = unified.filter(|(file, _)| !is_inside(file)).collect();
        host.set_unified((!unified.is_empty()).then_some(unified));
        Self(host)
    }

    /// All of them.
    #[must_use]
    pub const fn whole(&self) -> &LinuxResources {
        &self.0
    }

    /// That of memory, in bytes.
    #[must_use]
    pub fn memory(&self) -> Option<u64> {
        let limit = self.0.memory().as_ref()?.limit()?;
        u64::try_from(limit).ok().filter(|limit| *limit > 0)
    }

    /// With another one of memory; as much is added to that of memory and swap together.
    #[must_use]
    pub fn with_memory(&self, bytes: u64) -> LinuxResources {
        let mut resources = self.0.clone();
        let mut memory = resources.memory().unwrap_or_default();
        let then = i64::try_from(bytes).unwrap_or(i64::MAX);
        let more = then - memory.limit().unwrap_or(then);
        let swap = memory.swap();
        let swap = swap.map(|swap| if swap > 0 { swap.saturating_add(more) } else { swap });
        memory.set_limit(Some(then)).set_swap(swap);
        resources.set_memory(Some(memory));
        resources
    }

    /// Whether [`Limits::while_it_boots`] leaves something out.
    #[must_use]
    pub fn has_quota(&self) -> bool {
        self.0.cpu().as_ref().is_some_and(|cpu| cpu.quota().is_some() || cpu.period().is_some())
    }

    /// Without the share of processor time: a machine that boots is not the container yet.
    #[must_use]
    pub fn while_it_boots(&self) -> LinuxResources {
        let mut resources = self.0.clone();
        if let Some(cpu) = resources.cpu_mut() {
            cpu.set_quota(None).set_period(None);
        }
        resources
    }
}

fn with_the_machine(mut memory: LinuxMemory) -> LinuxMemory {
    let more = i64::try_from((MACHINE_OVERHEAD_MIB + PROCESSES_MIB) << 20).unwrap_or(i64::MAX);
    let raised = |limit: Option<i64>| {
        limit.map(|limit| if limit > 0 { limit.saturating_add(more) } else { limit })
    };
    // Memory and swap together, so it grows by as much.
    let (limit, swap) = (raised(memory.limit()), raised(memory.swap()));
    memory.set_limit(limit).set_swap(swap);
    // Of cgroup v1: what the kernel keeps for the container is in the guest.
    memory.set_kernel(None).set_kernel_tcp(None);
    memory
}

fn is_inside(file: &str) -> bool {
    ["memory.", "pids."].iter().any(|controller| file.starts_with(controller))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn limits(container: &Value) -> Limits {
        Limits::of(&serde_json::from_value(container.clone()).unwrap())
    }

    #[test]
    fn the_machine_comes_on_top() {
        let more = i64::try_from((MACHINE_OVERHEAD_MIB + PROCESSES_MIB) << 20).unwrap();
        let limits = limits(&json!({
            "memory": {"limit": 1000, "swap": 3000, "reservation": 500, "kernel": 7},
            "pids": {"limit": 10},
        }));
        let memory = limits.whole().memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(1000 + more), Some(3000 + more)));
        assert_eq!((memory.reservation(), memory.kernel()), (Some(500), None));
        assert_eq!(limits.whole().pids().unwrap().limit(), 10 + TASKS);
    }

    #[test]
    fn a_limit_of_memory_can_be_another() {
        let limits =
            limits(&json!({"memory": {"limit": 1000, "swap": 3000}, "pids": {"limit": 10}}));
        let limit = limits.memory().unwrap();
        let other = limits.with_memory(limit + 500);
        let memory = other.memory().unwrap();
        assert_eq!(memory.limit(), Some(i64::try_from(limit).unwrap() + 500));
        assert_eq!(memory.swap().unwrap() - memory.limit().unwrap(), 2000);
        assert_eq!(other.pids().unwrap().limit(), 10 + TASKS);
    }

    #[test]
    fn no_limit_stays_none() {
        let limits = limits(&json!({"memory": {"limit": -1, "swap": -1}, "pids": {"limit": -1}}));
        let memory = limits.whole().memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(-1), Some(-1)));
        assert_eq!(limits.memory(), None);
        assert_eq!(limits.whole().pids().unwrap().limit(), -1);
    }

    #[test]
    fn a_boot_has_all_the_processor_time() {
        let limits = limits(&json!({"cpu": {"quota": 1000, "period": 10000, "shares": 5}}));
        let cpu = limits.while_it_boots().cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.period(), cpu.shares()), (None, None, Some(5)));
        assert_eq!(limits.whole().cpu().clone().unwrap().quota(), Some(1000));
        assert!(limits.has_quota());
        assert!(!self::limits(&json!({"cpu": {"shares": 5}})).has_quota());
    }

    #[test]
    fn files_of_memory_are_the_containers() {
        let limits =
            limits(&json!({"unified": {"memory.high": "1", "pids.max": "1", "io.weight": "7"}}));
        let unified = limits.whole().unified().clone().unwrap();
        assert_eq!(unified.into_iter().collect::<Vec<_>>(), [("io.weight".into(), "7".into())]);
    }
}
