//! `bulkhead events`: shows what a container uses, once or periodically, and when the kernel killed
//! a process because memory ran out; a line of JSON for each, as runc writes them.
//!
//! The numbers are those of the pod's cgroup on the host: what the pod costs, its machine included.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use libcgroups::stats::{BlkioDeviceStat, MemoryData, Stats};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, Value, json};

use super::args::{Events, Global};
use crate::cgroup::{self, Memory};
use crate::state::Home;
use crate::supervisor::lifecycle::Status;

/// How often to check whether the container has ended.
const LOOK: Duration = Duration::from_millis(500);

/// How long a kill may take to be counted.
const KILLING: Duration = Duration::from_millis(500);

pub(super) fn events(global: &Global, events: &Events) -> anyhow::Result<()> {
    ensure!(!events.interval.is_zero(), "duration interval must be greater than 0");
    let home = Home::open(&global.root, &events.id)?;
    let state = home.read()?;
    if state.observed() == Status::Stopped {
        bail!("container with id {} is not running", events.id);
    }
    let cgroup = state.cgroup.context("the container is being created")?;
    let tell = |kind: &str, data: Option<Value>| -> io::Result<()> {
        let mut line = json!({"type": kind, "id": events.id.as_str()});
        if let Some(data) = data {
            line["data"] = data;
        }
        writeln!(io::stdout(), "{line}")
    };
    if events.stats {
        return Ok(tell("stats", Some(shown(&cgroup.stats()?)))?);
    }
    let keeper = state.keeper.context("container not running")?;
    let mut kills = Kills::watch(keeper.pid).context("memory of the container's cgroup")?;
    let mut next = Instant::now() + events.interval;
    loop {
        let patience = next.saturating_duration_since(Instant::now()).min(LOOK);
        for _ in 0..kills.wait(patience)? {
            tell("oom", None)?;
        }
        if home.read().map_or(Status::Stopped, |state| state.observed()) == Status::Stopped {
            return Ok(());
        }
        if Instant::now() >= next {
            // The cgroup may be gone already.
            if let Ok(stats) = cgroup.stats() {
                tell("stats", Some(shown(&stats)))?;
            }
            next += events.interval;
        }
    }
}

/// The OOM kills that a cgroup counts.
struct Kills {
    memory: Memory,
    changes: OwnedFd,
    seen: u64,
}

impl Kills {
    /// Counts the kills in a process's cgroup from now on.
    fn watch(pid: u32) -> io::Result<Self> {
        let memory = Memory::of(pid)?;
        let changes = memory.watch()?;
        let mut kills = Self { memory, changes, seen: 0 };
        kills.more();
        Ok(kills)
    }

    /// Waits for a change; returns the number of kills since the last call.
    fn wait(&mut self, patience: Duration) -> anyhow::Result<u64> {
        let mut ready = [PollFd::new(&self.changes, PollFlags::IN)];
        match poll(&mut ready, Some(&Timespec::try_from(patience)?)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(0),
            other => other?,
        };
        cgroup::drain(&self.changes);
        let deadline = Instant::now() + KILLING;
        loop {
            match self.more() {
                0 if self.memory.counts_late() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                more => return Ok(more),
            }
        }
    }

    fn more(&mut self) -> u64 {
        // A cgroup that is gone counts nothing more.
        let count = self.memory.kills().unwrap_or(0).max(self.seen);
        count - std::mem::replace(&mut self.seen, count)
    }
}

/// The numbers in runc's form: times in nanoseconds, swap with memory, nothing that is zero where
/// runc leaves it out.
fn shown(stats: &Stats) -> Value {
    // The crate has microseconds, as cgroup v2 does.
    let time = |us: u64| us.saturating_mul(1000);
    let (usage, throttling) = (&stats.cpu.usage, &stats.cpu.throttling);
    let (memory, swap) = (&stats.memory.memory, &stats.memory.memswap);
    let with_swap = MemoryData {
        usage: memory.usage.saturating_add(swap.usage),
        limit: memory.limit.saturating_add(swap.limit),
        ..MemoryData::default()
    };
    let raw_value = |name| stats.memory.stats.get(name);
    let raw: BTreeMap<_, _> = stats.memory.stats.iter().collect();
    json!({
        "cpu": {
            "usage": {
                "total": time(usage.usage_total),
                "kernel": time(usage.usage_kernel),
                "user": time(usage.usage_user),
            },
            "throttling": numbers(&[
                ("periods", throttling.periods),
                ("throttledPeriods", throttling.throttled_periods),
                ("throttledTime", time(throttling.throttled_time)),
            ]),
        },
        "memory": {
            // The name in cgroup v2, the name in v1.
            "cache": raw_value("file").or(raw_value("cache")).unwrap_or(&0),
            "usage": amount(memory),
            "swap": amount(&with_swap),
            "kernel": {"limit": 0, "failcnt": 0},
            "kernelTCP": {"limit": 0, "failcnt": 0},
            "raw": raw,
        },
        "pids": numbers(&[
            ("current", stats.pids.current),
            ("limit", if stats.pids.limit == u64::MAX { 0 } else { stats.pids.limit }),
        ]),
        "blkio": transfers(&[
            ("ioServiceBytesRecursive", &stats.blkio.service_bytes),
            ("ioServicedRecursive", &stats.blkio.serviced),
        ]),
        "hugetlb": pages(&stats.hugetlb),
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn amount(data: &MemoryData) -> Value {
    let mut amount = numbers(&[("usage", data.usage), ("max", data.max_usage)]);
    amount["limit"] = data.limit.into();
    amount["failcnt"] = data.fail_count.into();
    amount
}

fn numbers(fields: &[(&str, u64)]) -> Value {
    let set = fields.iter().filter(|(_, value)| *value != 0);
    set.map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect::<Map<_, _>>().into()
}

fn transfers(kinds: &[(&str, &Vec<BlkioDeviceStat>)]) -> Value {
    let entry = |stat: &BlkioDeviceStat| {
        json!({
            "major": stat.major,
            "minor": stat.minor,
            "op": stat.op_type.as_deref().unwrap_or_default(),
            "value": stat.value,
        })
    };
    let listed = kinds.iter().filter(|(_, stats)| !stats.is_empty()).map(|(name, stats)| {
        ((*name).to_owned(), stats.iter().map(entry).collect::<Vec<_>>().into())
    });
    listed.collect::<Map<_, _>>().into()
}

fn pages(sizes: &HashMap<String, libcgroups::stats::HugeTlbStats>) -> Value {
    let shown = sizes.iter().map(|(size, stats)| {
        let mut fields = numbers(&[("usage", stats.usage), ("max", stats.max_usage)]);
        fields["failcnt"] = stats.fail_count.into();
        (size.clone(), fields)
    });
    shown.collect::<Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_runcs_form() {
        let mut stats = Stats::default();
        stats.cpu.usage.usage_total = 7;
        stats.memory.memory = MemoryData { usage: 5, limit: u64::MAX, ..MemoryData::default() };
        stats.memory.memswap = MemoryData { usage: 2, limit: u64::MAX, ..MemoryData::default() };
        stats.pids.limit = u64::MAX;
        let operation = Some("read".to_owned());
        let transfer = BlkioDeviceStat { major: 8, minor: 1, op_type: operation, value: 9 };
        stats.blkio.service_bytes = vec![transfer];
        let shown = shown(&stats);
        assert_eq!(shown["cpu"]["usage"]["total"], 7000);
        assert_eq!(shown["memory"]["usage"], json!({"limit": u64::MAX, "usage": 5, "failcnt": 0}));
        assert_eq!(shown["memory"]["swap"]["usage"], 7);
        assert_eq!(shown["pids"], json!({}));
        let expected = json!([{"major": 8, "minor": 1, "op": "read", "value": 9}]);
        assert_eq!(shown["blkio"], json!({ "ioServiceBytesRecursive": expected }));
    }
}
