//! The limits of a pod's cgroup on the host: its container's limits, plus what a machine needs and
//! a plain container does not. The container's own limits apply in the guest.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxCpu, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxMemory, LinuxResources,
};

use crate::bundle::{self, MACHINE_OVERHEAD_MIB};

/// Memory of monitor, file server, supervisor and stand-ins with page tables and sockets, in MiB;
/// several times what they use when idle.
const PROCESSES_MIB: u64 = 64;
/// Threads on the host: one for each vCPU and each device, and the supervisor's.
const TASKS: i64 = 256;

/// The limits of a pod's cgroup.
#[derive(Clone, Debug)]
pub struct Limits(LinuxResources);

impl Limits {
    /// The limits for a pod whose containers have the limits `container`.
    #[must_use]
    pub fn of(container: &LinuxResources) -> Self {
        let mut host = container.clone();
        // The supervisor opens devices, and which ones it passes to the machine is decided
        // elsewhere (`crate::bundle::refuse`). The rule is explicit because libcgroups adds its own
        // if there is none.
        let everything =
            LinuxDeviceCgroupBuilder::default().allow(true).typ(LinuxDeviceType::A).access("rwm");
        host.set_devices(everything.build().ok().map(|rule| vec![rule]));
        host.set_network(None);
        let huge_pages = bundle::huge_pages_overhead_mib(bundle::huge_pages(container));
        host.set_memory(host.memory().map(|memory| with_the_machine(memory, huge_pages)));
        if let Some(pids) = host.pids_mut().as_mut().filter(|pids| pids.limit() > 0) {
            pids.set_limit(pids.limit().saturating_add(TASKS));
        }
        let files = host.unified().clone().unwrap_or_default().into_iter();
        let files: HashMap<_, _> = files.filter_map(of_host).collect();
        host.set_unified((!files.is_empty()).then_some(files));
        Self(host)
    }

    /// All limits.
    #[must_use]
    pub const fn whole(&self) -> &LinuxResources {
        &self.0
    }

    /// The memory limit, in bytes.
    #[must_use]
    pub fn memory(&self) -> Option<u64> {
        let limit = self.0.memory().as_ref()?.limit()?;
        u64::try_from(limit).ok().filter(|limit| *limit > 0)
    }

    /// The limits with another memory limit. The limit of memory and swap together changes by the
    /// same amount.
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

    /// The limits while the machine boots, without those that would only slow it down.
    #[must_use]
    pub fn while_it_boots(&self) -> LinuxResources {
        let mut resources = self.0.clone();
        resources.set_block_io(None);
        if let Some(cpu) = resources.cpu_mut() {
            *cpu = only_places(cpu);
        }
        if let Some(files) = resources.unified_mut() {
            files.retain(|file, _| !slows_down(file));
        }
        resources
    }

    /// The limits that [`Limits::while_it_boots`] leaves out, if any.
    #[must_use]
    pub fn held_back(&self) -> Option<LinuxResources> {
        let mut resources = LinuxResources::default();
        resources.set_devices(self.0.devices().clone());
        let nothing = resources.clone();
        resources.set_block_io(self.0.block_io().clone());
        if let Some(cpu) = self.0.cpu().as_ref().filter(|cpu| **cpu != only_places(cpu)) {
            let mut cpu = cpu.clone();
            cpu.set_cpus(None).set_mems(None);
            resources.set_cpu(Some(cpu));
        }
        let files = self.0.unified().clone().unwrap_or_default().into_iter();
        let files: HashMap<_, _> = files.filter(|(file, _)| slows_down(file)).collect();
        resources.set_unified((!files.is_empty()).then_some(files));
        (resources != nothing).then_some(resources)
    }
}

/// The processors and memory nodes of a limit, without quota and weight.
fn only_places(cpu: &LinuxCpu) -> LinuxCpu {
    let mut places = LinuxCpu::default();
    places.set_cpus(cpu.cpus().clone()).set_mems(cpu.mems().clone());
    places
}

/// Whether a file of cgroup v2 limits speed rather than an amount.
fn slows_down(file: &str) -> bool {
    file.starts_with("cpu.") || file.starts_with("io.")
}

/// Adds what a machine needs, and so many MiB more that its kernel needs for huge pages.
fn with_the_machine(mut memory: LinuxMemory, huge_pages_mib: u64) -> LinuxMemory {
    let more = i64::try_from(huge_pages_mib << 20).unwrap_or(i64::MAX);
    let with_both = |amount| match with_overhead(amount) {
        raised if raised > 0 => raised.saturating_add(more),
        none => none,
    };
    let raised = |amount: Option<i64>| amount.map(with_both);
    // `swap` is memory and swap together, so it grows by the same amount.
    let (limit, swap) = (raised(memory.limit()), raised(memory.swap()));
    let reservation = raised(memory.reservation());
    memory.set_limit(limit).set_swap(swap).set_reservation(reservation);
    // These are limits of cgroup v1 for kernel memory, and the container's kernel memory is in the
    // guest.
    memory.set_kernel(None).set_kernel_tcp(None);
    memory
}

/// Adds what a machine needs to an amount of memory; no limit stays no limit.
fn with_overhead(amount: i64) -> i64 {
    let more = i64::try_from((MACHINE_OVERHEAD_MIB + PROCESSES_MIB) << 20).unwrap_or(i64::MAX);
    if amount > 0 { amount.saturating_add(more) } else { amount }
}

/// Converts a file of cgroup v2 for the host's cgroup; returns `None` for files that only apply to
/// the container's own cgroup in the guest.
fn of_host((file, value): (String, String)) -> Option<(String, String)> {
    let inside = ["cgroup.", "pids.", "memory.oom.group", "memory.reclaim"];
    if inside.iter().any(|name| file.starts_with(name)) {
        return None;
    }
    let raised = match file.as_str() {
        "memory.high" | "memory.min" => bundle::bytes(&value).filter(|amount| *amount > 0),
        _ => None,
    };
    Some((file, raised.map_or(value, |amount| with_overhead(amount).to_string())))
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
        assert_eq!((memory.reservation(), memory.kernel()), (Some(500 + more), None));
        assert_eq!(limits.whole().pids().unwrap().limit(), 10 + TASKS);
        let huge = json!({
            "memory": {"limit": 1000}, "hugepageLimits": [{"pageSize": "2MB", "limit": 2 << 20}],
        });
        let memory = self::limits(&huge).whole().memory().unwrap();
        assert_eq!(memory.limit(), Some(1000 + more + (4 << 20)));
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
    fn nothing_slows_a_boot_down() {
        let all = json!({
            "cpu": {"quota": 1000, "period": 10000, "shares": 5, "burst": 7, "idle": 1, "cpus": "0"},
            "blockIO": {"weight": 10},
            "pids": {"limit": 10},
            "unified": {"cpu.weight": "1", "io.max": "8:0 rbps=1", "misc.max": "x 1"},
        });
        let json = |resources| serde_json::to_value::<LinuxResources>(resources).unwrap();
        let first = json(limits(&all).while_it_boots());
        assert_eq!(first["cpu"], json!({"cpus": "0"}));
        assert_eq!(
            (&first["unified"], &first["blockIO"]),
            (&json!({"misc.max": "x 1"}), &Value::Null)
        );
        assert_eq!(first["pids"]["limit"], 10 + TASKS);
        let later = json(limits(&all).held_back().unwrap());
        let cpu = json!({"quota": 1000, "period": 10000, "shares": 5, "burst": 7, "idle": 1});
        assert_eq!((&later["cpu"], &later["blockIO"]), (&cpu, &json!({"weight": 10})));
        assert_eq!(later["unified"], json!({"cpu.weight": "1", "io.max": "8:0 rbps=1"}));
        assert_eq!(later["devices"], first["devices"]);
        let places = json!({"cpu": {"cpus": "0"}, "memory": {"limit": 5}});
        assert_eq!(limits(&places).held_back(), None);
    }

    #[test]
    fn files_are_the_hosts_unless_only_the_container_has_them() {
        let more = (MACHINE_OVERHEAD_MIB + PROCESSES_MIB) << 20;
        let limits = limits(&json!({"unified": {
            "memory.high": "1M", "memory.min": "2", "memory.swap.high": "max",
            "memory.oom.group": "1", "pids.max": "0", "cgroup.freeze": "1", "cgroup.kill": "1",
            "io.weight": "7",
        }}));
        let files = serde_json::to_value(limits.whole().unified()).unwrap();
        let expected = json!({
            "memory.high": ((1 << 20) + more).to_string(), "memory.min": (2 + more).to_string(),
            "memory.swap.high": "max", "io.weight": "7",
        });
        assert_eq!(files, expected);
    }
}
