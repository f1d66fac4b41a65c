//! The usage of a systemd scope. libcgroups fails if the files of any controller are missing, and
//! systemd enables only the controllers that it knows, which hugetlb is not.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use libcgroups::stats::{
    BlkioDeviceStat, MemoryData, Stats, parse_nested_keyed_data, parse_single_value, parse_value,
    pid_stats,
};

/// Reads the files of a scope's directory.
pub(super) fn of_scope(directory: &Path) -> io::Result<Stats> {
    let mut stats = Stats::default();
    let flat = |file: &str| fs::read_to_string(directory.join(file)).map(|text| table(&text));
    let cpu = flat("cpu.stat")?;
    // The numbers of a quota exist only if the cpu controller is enabled.
    let number = |name| cpu.get(name).copied().unwrap_or_default();
    stats.cpu.usage.usage_total = number("usage_usec");
    stats.cpu.usage.usage_user = number("user_usec");
    stats.cpu.usage.usage_kernel = number("system_usec");
    stats.cpu.throttling.periods = number("nr_periods");
    stats.cpu.throttling.throttled_periods = number("nr_throttled");
    stats.cpu.throttling.throttled_time = number("throttled_usec");
    stats.pids = pid_stats(directory).map_err(io::Error::other)?;
    let data = |prefix: &str, failure: &str| {
        let single = |name: &str| {
            parse_single_value(&directory.join(format!("{prefix}.{name}")))
                .map_err(io::Error::other)
        };
        let failures = flat(&format!("{prefix}.events"))?.get(failure).copied();
        Ok::<_, io::Error>(MemoryData {
            usage: single("current")?,
            // Older kernels do not have this file.
            max_usage: single("peak").unwrap_or(0),
            limit: single("max")?,
            fail_count: failures.unwrap_or_default(),
        })
    };
    stats.memory.memory = data("memory", "oom")?;
    stats.memory.memswap = data("memory.swap", "fail")?;
    stats.memory.stats = flat("memory.stat")?;
    let devices = parse_nested_keyed_data(&directory.join("io.stat")).map_err(io::Error::other)?;
    for (device, values) in devices {
        let number = device.split_once(':');
        let Some((major, minor)) =
            number.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
        else {
            continue;
        };
        for (name, value) in values.iter().filter_map(|value| value.split_once('=')) {
            let (kind, list) = match name {
                "rbytes" => ("read", &mut stats.blkio.service_bytes),
                "wbytes" => ("write", &mut stats.blkio.service_bytes),
                "rios" => ("read", &mut stats.blkio.serviced),
                "wios" => ("write", &mut stats.blkio.serviced),
                _ => continue,
            };
            let (op_type, value) =
                (Some(kind.to_owned()), parse_value(value).map_err(io::Error::other)?);
            list.push(BlkioDeviceStat { major, minor, op_type, value });
        }
    }
    Ok(stats)
}

/// Parses a file with a name and a number in each line.
fn table(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_that_are_not_there_are_left_out() {
        let scope = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("cpu.stat", "usage_usec 7\nuser_usec 4\nsystem_usec 3\n"),
            ("io.stat", "8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n"),
            ("memory.current", "5\n"),
            ("memory.events", "max 1\noom 2\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 3\n"),
            ("memory.swap.current", "1\n"),
            ("memory.swap.events", "fail 0\n"),
            ("memory.swap.max", "0\n"),
            ("pids.current", "4\n"),
            ("pids.max", "20\n"),
        ] {
            fs::write(scope.path().join(file), text).unwrap();
        }
        let stats = of_scope(scope.path()).unwrap();
        assert_eq!((stats.cpu.usage.usage_total, stats.pids.limit), (7, 20));
        let memory = &stats.memory.memory;
        assert_eq!((memory.usage, memory.limit, memory.fail_count), (5, u64::MAX, 2));
        let written =
            stats.blkio.service_bytes.iter().find(|stat| stat.op_type.as_deref() == Some("write"));
        assert_eq!(written.map(|stat| (stat.major, stat.minor, stat.value)), Some((8, 16, 20)));
        fs::remove_file(scope.path().join("memory.max")).unwrap();
        assert!(of_scope(scope.path()).is_err());
    }
}
