//! `linux.resources` of a container: how an update changes it, and which part the guest enforces.
//!
//! The host's cgroup has all limits, and the guest those that can apply inside the machine.

use oci_spec::runtime::{LinuxMemory, LinuxResources};

use super::refuse::{Refusal, refuse};
use super::size::PERIOD_DEFAULT_US;
use super::{huge_pages, unified};

/// The prefixes of files in `unified` that apply to the container's own cgroup in the guest.
const GUEST_FILES: [&str; 5] = ["cgroup.", "cpu.", "hugetlb.", "memory.", "pids."];

/// Applies an update. As in runc, 0 and an empty list leave a limit as it is, and -1 removes it.
pub fn merge(current: &mut LinuxResources, update: &LinuxResources) {
    let mut update = update.clone();
    unified::fold(&mut update);
    if let Some(new) = update.memory() {
        let mut memory = current.memory().unwrap_or_default();
        let (limit, reservation) = (set(new.limit()).or(memory.limit()), memory.reservation());
        let swap = set(new.swap()).or(kept_swap(&memory, limit));
        memory
            .set_limit(limit)
            .set_swap(swap)
            .set_reservation(set(new.reservation()).or(reservation));
        current.set_memory(Some(memory));
    }
    if let Some(new) = update.cpu() {
        let mut cpu = current.cpu().clone().unwrap_or_default();
        let old = cpu.clone();
        cpu.set_shares(set(new.shares()).or(old.shares()))
            .set_quota(set(new.quota()).or(old.quota()))
            .set_burst(new.burst().or(old.burst()))
            .set_period(set(new.period()).or(old.period()))
            .set_realtime_runtime(set(new.realtime_runtime()).or(old.realtime_runtime()))
            .set_realtime_period(set(new.realtime_period()).or(old.realtime_period()))
            .set_cpus(listed(new.cpus()).or(old.cpus().clone()))
            .set_mems(listed(new.mems()).or(old.mems().clone()))
            .set_idle(new.idle().or(old.idle()));
        current.set_cpu(Some(cpu));
    }
    if let Some(pids) = update.pids().filter(|pids| pids.limit() != 0) {
        current.set_pids(Some(pids));
    }
    if let Some(weight) = update.block_io().as_ref().and_then(|it| set(it.weight())) {
        let mut block_io = current.block_io().clone().unwrap_or_default();
        block_io.set_weight(Some(weight));
        current.set_block_io(Some(block_io));
    }
    huge_pages::merge(current, &update);
    if let Some(files) = update.unified() {
        let mut unified = current.unified().clone().unwrap_or_default();
        unified.extend(files.clone());
        current.set_unified(Some(unified));
    }
}

/// The limit of memory and swap that goes with a new memory limit. As in runc with cgroup v2, the swap
/// stays as it is, and without a memory limit there is no limit of swap either.
fn kept_swap(before: &LinuxMemory, limit: Option<i64>) -> Option<i64> {
    let both = before.swap()?;
    match limit {
        Some(none) if none < 0 => Some(none),
        Some(new) => with_same_swap(before, new),
        None => Some(both),
    }
}

/// The limit of memory and swap that allows as much swap beside this memory limit as it does beside
/// its own; as it is where one of them is no limit.
pub(super) fn with_same_swap(before: &LinuxMemory, limit: i64) -> Option<i64> {
    match (before.swap(), before.limit()) {
        (Some(both), Some(old)) if both > 0 && old > 0 && limit > 0 => {
            Some(limit.saturating_add(both.saturating_sub(old)))
        }
        (both, _) => both,
    }
}

/// Checks the limit of memory and swap together.
///
/// # Errors
/// It is lower than the memory limit, or there is none of memory.
pub fn check_swap(resources: &LinuxResources) -> Result<(), Refusal> {
    let Some(memory) = resources.memory() else { return Ok(()) };
    let Some(both) = memory.swap().filter(|both| *both > 0) else { return Ok(()) };
    match memory.limit().filter(|limit| *limit > 0) {
        None => Err(refuse(
            format!("memory.swap is {both} and there is no memory limit"),
            "set memory.limit too, or swap to -1",
        )),
        Some(limit) if both < limit => Err(refuse(
            format!(
                "memory.swap, which limits memory and swap together, is {both}, and the memory limit \
                 is {limit}"
            ),
            "raise memory.swap, or set it to -1",
        )),
        Some(_) => Ok(()),
    }
}

/// Brings limits to the one form that the rest of this program knows. As in runc, the number 0 and
/// an empty list mean that there is no limit. Files become fields where there is one (`unified`).
pub fn normalize(resources: &mut LinuxResources) {
    unified::fold(resources);
    if let Some(memory) = resources.memory_mut() {
        let limit = set(memory.limit());
        // To limit nothing needs no limit of memory.
        let swap = set(memory.swap()).filter(|swap| *swap > 0 || limit.is_some());
        let (reservation, kernel) = (set(memory.reservation()), set(memory.kernel()));
        memory.set_limit(limit).set_swap(swap).set_reservation(reservation).set_kernel(kernel);
    }
    if let Some(cpu) = resources.cpu_mut() {
        let (shares, quota, period) = (set(cpu.shares()), set(cpu.quota()), set(cpu.period()));
        let (runtime, whole) = (set(cpu.realtime_runtime()), set(cpu.realtime_period()));
        let (cpus, mems) = (listed(cpu.cpus()), listed(cpu.mems()));
        cpu.set_shares(shares).set_quota(quota).set_period(period);
        cpu.set_realtime_runtime(runtime).set_realtime_period(whole);
        cpu.set_cpus(cpus).set_mems(mems);
    }
    if resources.pids().is_some_and(|pids| pids.limit() == 0) {
        resources.set_pids(None);
    }
    if let Some(block_io) = resources.block_io_mut() {
        let weight = set(block_io.weight());
        block_io.set_weight(weight);
    }
}

/// Reduces limits, in the form that [`normalize`] gives, to those that the guest enforces.
/// Processors, memory nodes and disks have the host's numbers, so the host's cgroup enforces their
/// limits, and also files of other controllers.
pub(super) fn for_guest(resources: &mut LinuxResources) {
    resources.set_block_io(None);
    if let Some(cpu) = resources.cpu_mut() {
        // Realtime limits need cgroup v1, which the guest does not have.
        cpu.set_cpus(None).set_mems(None).set_realtime_runtime(None).set_realtime_period(None);
    }
    if let Some(files) = resources.unified_mut() {
        files.retain(|file, _| GUEST_FILES.iter().any(|controller| file.starts_with(controller)));
    }
    huge_pages::for_guest(resources);
    say_no_swap(resources);
}

/// Sets the file `memory.swap.max` of cgroup v2 to 0 if the limit of memory and swap together
/// equals the memory limit. libcgroups takes a swap of 0 as not given, and leaves the file as it
/// is.
pub fn say_no_swap(resources: &mut LinuxResources) {
    let Some(memory) = resources.memory() else { return };
    if memory.limit().is_some_and(|limit| limit > 0) && memory.swap() == memory.limit() {
        let mut unified = resources.unified().clone().unwrap_or_default();
        unified.entry("memory.swap.max".to_owned()).or_insert_with(|| "0".to_owned());
        resources.set_unified(Some(unified));
    }
}

/// The limits of all containers of a pod together. If one container has no limit, neither has the
/// pod. Limits that cannot be added up are those of the first container.
#[must_use]
pub fn total(all: &[&LinuxResources]) -> LinuxResources {
    let Some((first, others)) = all.split_first() else { return LinuxResources::default() };
    let mut total = (*first).clone();
    if others.is_empty() {
        return total;
    }
    let sum = |of: &dyn Fn(&LinuxResources) -> Option<i64>| {
        let sum = all.iter().map(|it| of(it).filter(|limit| *limit > 0)).sum::<Option<i64>>();
        Some(sum.unwrap_or(-1))
    };
    let memory = |of: fn(&LinuxMemory) -> Option<i64>| {
        sum(&move |it: &LinuxResources| it.memory().as_ref().and_then(of))
    };
    let mut own = total.memory().unwrap_or_default();
    own.set_limit(memory(LinuxMemory::limit)).set_swap(memory(LinuxMemory::swap));
    total.set_memory(Some(own));
    let mut cpu = total.cpu().clone().unwrap_or_default();
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(PERIOD_DEFAULT_US);
    cpu.set_period(Some(period)).set_quota(sum(&|it| quota_of(it, period)));
    total.set_cpu(Some(cpu));
    let mut pids = total.pids().unwrap_or_default();
    pids.set_limit(sum(&|it| it.pids().map(|pids| pids.limit())).unwrap_or(-1));
    total.set_pids(Some(pids));
    huge_pages::add_up(&mut total, all);
    total
}

/// Converts a quota to another period.
fn quota_of(resources: &LinuxResources, period: u64) -> Option<i64> {
    let cpu = resources.cpu().as_ref()?;
    let own = cpu.period().filter(|own| *own > 0).unwrap_or(PERIOD_DEFAULT_US);
    let quota = i128::from(cpu.quota()?) * i128::from(period) / i128::from(own);
    Some(i64::try_from(quota).unwrap_or(i64::MAX))
}

fn set<T: Default + PartialEq>(value: Option<T>) -> Option<T> {
    value.filter(|value| *value != T::default())
}

fn listed(list: &Option<String>) -> Option<String> {
    list.clone().filter(|list| !list.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn merged(current: &Value, update: &Value) -> Value {
        let read = |json: &Value| serde_json::from_value(json.clone()).unwrap();
        let mut current: LinuxResources = read(current);
        merge(&mut current, &read(update));
        serde_json::to_value(current).unwrap()
    }

    #[test]
    fn what_is_not_named_stays() {
        let before = json!({
            "memory": {"limit": 5, "swap": 7},
            "cpu": {"quota": 5, "period": 6, "cpus": "0"},
            "pids": {"limit": 9},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 7}],
            "unified": {"memory.high": "1"},
        });
        assert_eq!(merged(&before, &json!({})), before);
        let nothing = json!({
            "memory": {"limit": 0, "swap": 0},
            "cpu": {"quota": 0, "period": 0, "cpus": "", "shares": 0},
            "pids": {"limit": 0},
            "blockIO": {"weight": 0},
        });
        assert_eq!(merged(&before, &nothing), before);
    }

    #[test]
    fn what_is_named_changes() {
        let before = json!({"memory": {"limit": 5, "swap": 7}, "unified": {"a.b": "1"}});
        let update = json!({
            "memory": {"limit": 6},
            "cpu": {"quota": -1},
            "pids": {"limit": -1},
            "blockIO": {"weight": 10},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
            "unified": {"c.d": "2"},
        });
        let after = json!({
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
            "memory": {"limit": 6, "swap": 8},
            "cpu": {"quota": -1},
            "pids": {"limit": -1},
            "blockIO": {"weight": 10},
            "unified": {"a.b": "1", "c.d": "2"},
        });
        assert_eq!(merged(&before, &update), after);
    }

    #[test]
    fn swap_stays_when_memory_changes() {
        let before = json!({"memory": {"limit": 50, "swap": 70}});
        let after = |update: Value| merged(&before, &json!({"memory": update}))["memory"].clone();
        assert_eq!(after(json!({"limit": 20})), json!({"limit": 20, "swap": 40}));
        assert_eq!(after(json!({"limit": 20, "swap": 30})), json!({"limit": 20, "swap": 30}));
        assert_eq!(after(json!({"limit": -1})), json!({"limit": -1, "swap": -1}));
        assert_eq!(after(json!({"swap": -1})), json!({"limit": 50, "swap": -1}));
    }

    #[test]
    fn swap_needs_a_memory_limit_that_is_not_higher() {
        let check = |memory: Value| {
            check_swap(&serde_json::from_value(json!({"memory": memory})).unwrap()).is_ok()
        };
        for wrong in [
            json!({"limit": 5, "swap": 4}),
            json!({"swap": 4}),
            json!({"limit": 0, "swap": 4}),
            json!({"limit": -1, "swap": 4}),
        ] {
            assert!(!check(wrong.clone()), "{wrong}");
        }
        for right in [
            json!({"limit": 5, "swap": 5}),
            json!({"limit": 5, "swap": -1}),
            json!({"limit": 5, "swap": 0}),
            json!({"swap": -1}),
            json!({"limit": -1, "swap": -1}),
            json!({}),
        ] {
            assert!(check(right.clone()), "{right}");
        }
    }

    #[test]
    fn limits_of_a_pod_add_up_and_one_without_takes_it_away() {
        let added = |all: &[Value]| {
            let all = all.iter().map(|json| serde_json::from_value(json.clone()).unwrap());
            let all: Vec<LinuxResources> = all.collect();
            serde_json::to_value(total(&all.iter().collect::<Vec<_>>())).unwrap()
        };
        let limited = json!({
            "memory": {"limit": 64, "swap": 80},
            "cpu": {"quota": 50_000, "period": 100_000, "cpus": "0"},
            "pids": {"limit": 10},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
        });
        assert_eq!(added(std::slice::from_ref(&limited)), limited);
        let other = json!({
            "memory": {"limit": 6, "swap": 8},
            "cpu": {"quota": 5_000, "period": 50_000},
            "pids": {"limit": 1},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 3}],
        });
        let both = json!({
            "memory": {"limit": 70, "swap": 88},
            "cpu": {"quota": 60_000, "period": 100_000, "cpus": "0"},
            "pids": {"limit": 11},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 7}],
        });
        assert_eq!(added(&[limited.clone(), other]), both);
        let none = json!({
            "memory": {"limit": -1, "swap": -1},
            "cpu": {"quota": -1, "period": 100_000, "cpus": "0"},
            "pids": {"limit": -1},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
        });
        assert_eq!(added(&[limited, json!({})]), none);
    }

    #[test]
    fn the_guest_has_no_numbers_of_the_host() {
        let mut resources = serde_json::from_value(json!({
            "cpu": {"cpus": "3", "mems": "0", "quota": 7, "realtimeRuntime": 5},
            "blockIO": {"weight": 5},
            "hugepageLimits": [{"pageSize": "1GB", "limit": 0}],
            "unified": {"memory.high": "1", "io.max": "8:0 rbps=1", "misc.max": "x 1"},
        }))
        .unwrap();
        for_guest(&mut resources);
        let expected = json!({
            "cpu": {"quota": 7}, "hugepageLimits": [], "unified": {"memory.high": "1"},
        });
        assert_eq!(serde_json::to_value(resources).unwrap(), expected);
    }

    #[test]
    fn zeros_and_empty_lists_are_no_limits() {
        let normal = |json: &Value| {
            let mut resources = serde_json::from_value(json.clone()).unwrap();
            normalize(&mut resources);
            serde_json::to_value(resources).unwrap()
        };
        let nothing = json!({
            "memory": {"limit": 0, "swap": 0, "reservation": 0, "kernel": 0, "swappiness": 0},
            "cpu": {
                "quota": 0, "period": 0, "cpus": "", "mems": "", "shares": 0, "realtimeRuntime": 0,
                "realtimePeriod": 0, "idle": 0,
            },
            "pids": {"limit": 0},
            "blockIO": {"weight": 0},
        });
        let none = json!({"memory": {"swappiness": 0}, "cpu": {"idle": 0}, "blockIO": {}});
        assert_eq!(normal(&nothing), none);
        let limits = json!({
            "memory": {"limit": 5, "swap": -1}, "cpu": {"quota": -1, "cpus": "0"},
            "pids": {"limit": -1},
        });
        assert_eq!(normal(&limits), limits);
    }

    #[test]
    fn no_swap_is_said_only_where_there_is_none() {
        let said = |memory: Value| {
            let mut resources = serde_json::from_value(json!({"memory": memory})).unwrap();
            say_no_swap(&mut resources);
            resources.unified().clone().and_then(|files| files.get("memory.swap.max").cloned())
        };
        assert_eq!(said(json!({"limit": 5, "swap": 5})).as_deref(), Some("0"));
        for memory in [
            json!({"limit": 5, "swap": 6}),
            json!({"limit": 5}),
            json!({"limit": -1, "swap": -1}),
            json!({}),
        ] {
            assert_eq!(said(memory), None);
        }
    }
}
