//! A process as proc(5) shows it, for `ps`.

use bulkhead_protocol::agent::ProcessInfo;
use procfs::process::Process;
use rustix::time::{ClockId, clock_gettime};

/// The longest command line that is reported, in bytes.
const COMMAND_BYTES: usize = 4096;
/// Nanoseconds of one tick of `stat`'s clocks: `USER_HZ` is 100 on every machine.
const TICK_NS: u64 = 10_000_000;

/// What is known of the process with this number; `None` once it is gone.
pub(crate) fn row(pid: u32) -> Option<ProcessInfo> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    let stat = process.stat().ok()?;
    let arguments = process.cmdline().unwrap_or_default();
    let mut command =
        if arguments.is_empty() { format!("[{}]", stat.comm) } else { arguments.join(" ") };
    command.truncate(command.floor_char_boundary(COMMAND_BYTES));
    Some(ProcessInfo {
        pid,
        parent: u32::try_from(stat.ppid).unwrap_or(0),
        uid: process.status().ok()?.euid,
        cpu_ms: (stat.utime + stat.stime) * (TICK_NS / 1_000_000),
        started_at_ns: booted_at_ns() + stat.starttime * TICK_NS,
        terminal: stat.tty_nr.unsigned_abs(),
        command,
    })
}

/// When the guest booted, in nanoseconds since the epoch, by the clock as it is set now.
fn booted_at_ns() -> u64 {
    let now = |clock| {
        let time = clock_gettime(clock);
        u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000
            + u64::try_from(time.tv_nsec).unwrap_or(0)
    };
    now(ClockId::Realtime).saturating_sub(now(ClockId::Boottime))
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    #[test]
    fn a_process_is_told_of_until_it_is_gone() {
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let row = super::row(child.id()).unwrap();
        assert_eq!(row.parent, std::process::id());
        assert_eq!(row.uid, rustix::process::geteuid().as_raw());
        assert!(row.started_at_ns.abs_diff(now.unwrap()) < 5_000_000_000, "{row:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(super::row(child.id()), None);
    }
}
