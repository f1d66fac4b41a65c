//! `linux.resources.unified`: limits by the names of cgroup v2's files
//! (Documentation/admin-guide/cgroup-v2.rst).
//!
//! If the specification has a field for the same limit, the value moves to that field. Code that
//! sizes a machine, adds limits up or sets them on a host with cgroup v1 then has to look in one
//! place only. As in runc, a file takes precedence over a field.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use super::huge_pages;
use super::refuse::{Refusal, refuse};
use super::resources::with_same_swap;

/// The value that means "no limit" in a file, and in a field.
const MAX: &str = "max";
const NO_LIMIT: i64 = -1;

/// Checks that only files of the container's own cgroup are named.
///
/// # Errors
/// Names a file that is not.
pub fn check(resources: &LinuxResources) -> Result<(), Refusal> {
    let mut names = resources.unified().iter().flat_map(HashMap::keys);
    match names.find(|name| name.is_empty() || name.contains('/')) {
        None => Ok(()),
        Some(name) => {
            let what = format!("linux.resources.unified: {name:?} must be a file name");
            Err(refuse(what, "name a file of the container's cgroup, such as \"memory.high\""))
        }
    }
}

/// Moves values from files to fields. A value that cannot be parsed stays, and the kernel refuses
/// it.
pub(super) fn fold(resources: &mut LinuxResources) {
    let Some(mut files) = resources.unified().clone() else { return };
    fold_memory(resources, &mut files);
    fold_cpu(resources, &mut files);
    huge_pages::fold(resources, &mut files);
    // A limit of 0 stays in the file: in the field it would mean that there is no limit.
    if let Some(limit) = take(&mut files, "pids.max", |text| limit(text).filter(|n| *n != 0)) {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    resources.set_unified((!files.is_empty()).then_some(files));
}

fn fold_memory(resources: &mut LinuxResources, files: &mut HashMap<String, String>) {
    let mut memory = resources.memory().unwrap_or_default();
    let before = memory;
    if let Some(limit) = take(files, "memory.max", |text| bytes(text).filter(|n| *n != 0)) {
        // The field `swap` limits memory and swap together.
        memory.set_limit(Some(limit)).set_swap(with_same_swap(&before, limit));
    }
    let limit = memory.limit().filter(|limit| *limit > 0);
    if let Some(swap) = take(files, "memory.swap.max", |text| match (bytes(text)?, limit) {
        (NO_LIMIT, _) => Some(NO_LIMIT),
        (swap, limit) => limit?.checked_add(swap),
    }) {
        memory.set_swap(Some(swap));
    }
    if let Some(low) = take(files, "memory.low", bytes) {
        memory.set_reservation(Some(low));
    }
    if memory != before {
        resources.set_memory(Some::<LinuxMemory>(memory));
    }
}

fn fold_cpu(resources: &mut LinuxResources, files: &mut HashMap<String, String>) {
    let mut cpu = resources.cpu().clone().unwrap_or_default();
    let before = cpu.clone();
    if let Some((quota, period)) = take(files, "cpu.max", bandwidth) {
        let period = period.or(cpu.period());
        cpu.set_quota(Some(quota)).set_period(period);
    }
    if let Some(burst) = take(files, "cpu.max.burst", |text| text.trim().parse().ok()) {
        cpu.set_burst(Some(burst));
    }
    if let Some(idle) = take(files, "cpu.idle", |text| text.trim().parse().ok()) {
        cpu.set_idle(Some(idle));
    }
    if let Some(list) = take(files, "cpuset.cpus", |text| Some(text.trim().to_owned())) {
        cpu.set_cpus(Some(list));
    }
    if let Some(list) = take(files, "cpuset.mems", |text| Some(text.trim().to_owned())) {
        cpu.set_mems(Some(list));
    }
    if cpu.idle() == Some(1) {
        // The kernel refuses any weight for an idle cgroup.
        files.remove("cpu.weight");
        files.remove("cpu.weight.nice");
        cpu.set_shares(None);
    }
    if cpu != before {
        resources.set_cpu(Some::<LinuxCpu>(cpu));
    }
}

/// Removes a file and returns its value, if the value can be parsed.
fn take<T>(
    files: &mut HashMap<String, String>,
    name: &str,
    read: impl FnOnce(&str) -> Option<T>,
) -> Option<T> {
    let value = read(files.get(name)?)?;
    files.remove(name);
    Some(value)
}

/// A number, or no limit.
fn limit(text: &str) -> Option<i64> {
    match text.trim() {
        MAX => Some(NO_LIMIT),
        number => number.parse().ok().filter(|number| *number >= 0),
    }
}

/// An amount of memory as the kernel reads it, with a unit such as `64M`.
pub(crate) fn bytes(text: &str) -> Option<i64> {
    let text = text.trim();
    if text == MAX {
        return Some(NO_LIMIT);
    }
    let (number, shift) = match text.chars().next_back()?.to_ascii_lowercase() {
        'k' => (&text[..text.len() - 1], 10),
        'm' => (&text[..text.len() - 1], 20),
        'g' => (&text[..text.len() - 1], 30),
        't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    number.parse::<i64>().ok().filter(|number| *number >= 0)?.checked_mul(1 << shift)
}

/// Parses `cpu.max`: a quota, and a period if one is given.
fn bandwidth(text: &str) -> Option<(i64, Option<u64>)> {
    let mut words = text.split_whitespace();
    let quota = limit(words.next()?).filter(|quota| *quota != 0)?;
    let period = words.next().map(str::parse).transpose().ok()?;
    words.next().is_none().then_some((quota, period))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn folded(resources: &Value) -> Value {
        let mut resources = serde_json::from_value(resources.clone()).unwrap();
        fold(&mut resources);
        serde_json::to_value(resources).unwrap()
    }

    fn of_files(files: &Value) -> Value {
        folded(&json!({"unified": files}))
    }

    #[test]
    fn files_that_have_a_field_become_it() {
        let all = of_files(&json!({
            "memory.max": "64M", "memory.low": "1048576", "memory.swap.max": "0",
            "pids.max": "20", "cpu.max": "10000 50000", "cpu.max.burst": "500",
            "cpuset.cpus": "0-1", "cpuset.mems": "0", "memory.high": "50M", "io.weight": "7",
        }));
        let expected = json!({
            "memory": {"limit": 64 << 20, "reservation": 1 << 20, "swap": 64 << 20},
            "pids": {"limit": 20},
            "cpu": {"quota": 10000, "period": 50000, "burst": 500, "cpus": "0-1", "mems": "0"},
            "unified": {"memory.high": "50M", "io.weight": "7"},
        });
        assert_eq!(all, expected);
    }

    #[test]
    fn no_limit_is_said_in_either_way() {
        let none = of_files(&json!({
            "memory.max": "max", "memory.swap.max": "max", "pids.max": "max\n", "cpu.max": "max",
        }));
        let expected = json!({
            "memory": {"limit": -1, "swap": -1}, "pids": {"limit": -1}, "cpu": {"quota": -1},
        });
        assert_eq!(none, expected);
    }

    #[test]
    fn a_file_counts_more_than_a_field() {
        let both = json!({
            "memory": {"limit": 100, "swap": 130}, "pids": {"limit": 5},
            "cpu": {"quota": 7, "period": 70, "shares": 9},
            "unified": {"memory.max": "50", "pids.max": "6", "cpu.max": "8"},
        });
        let expected = json!({
            "memory": {"limit": 50, "swap": 80}, "pids": {"limit": 6},
            "cpu": {"quota": 8, "period": 70, "shares": 9},
        });
        assert_eq!(folded(&both), expected);
    }

    #[test]
    fn a_weight_of_what_is_idle_is_left_out() {
        let idle = of_files(&json!({"cpu.idle": "1", "cpu.weight": "5"}));
        assert_eq!(idle, json!({"cpu": {"idle": 1}}));
        let busy = json!({"cpu": {"idle": 0}, "unified": {"cpu.weight": "5"}});
        assert_eq!(of_files(&json!({"cpu.idle": "0", "cpu.weight": "5"})), busy);
    }

    #[test]
    fn what_cannot_be_read_stays() {
        for files in [
            json!({"memory.max": "-5"}),
            json!({"memory.max": "0"}),
            json!({"memory.max": "much"}),
            json!({"memory.max": "9999999T"}),
            json!({"memory.swap.max": "5"}),
            json!({"pids.max": "0"}),
            json!({"cpu.max": "1 2 3"}),
            json!({"cpu.max": ""}),
            json!({"cpu.idle": "x"}),
        ] {
            assert_eq!(of_files(&files), json!({"unified": files}));
        }
    }

    #[test]
    fn files_of_other_cgroups_are_refused() {
        let checked = |name: &str| {
            let files = json!({"unified": {name: "1"}});
            check(&serde_json::from_value(files).unwrap()).map_err(|refusal| refusal.to_string())
        };
        checked("memory.high").unwrap();
        for name in ["../cgroup.kill", "a/b", "/x", ""] {
            let words = checked(name).unwrap_err();
            assert!(words.contains("must be a file name"), "{words}");
        }
    }
}
