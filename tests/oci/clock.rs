//! The clock of a container is that of the host: at its start, and when the host's is set.

use std::fs;
use std::time::{Duration, SystemTime};

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{Runtime, comes_true};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tempfile::TempDir;

/// The program that compares clocks (`tests/clock`).
const PROGRAM: &str = env!("CARGO_BIN_EXE_clock");
/// How far the clocks may be apart, in microseconds.
const APART: i64 = 1_000;
/// How long the time of a file may lie behind the host's clock, in microseconds: the kernel takes
/// the time of its last tick, which an emulated host may miss for a while.
const TICK: i64 = 20_000;

/// A container `c` that sleeps, with a directory of the host at `/shared`.
struct Sleeper {
    runtime: Runtime,
    _bundle: Bundle,
    _shared: TempDir,
}

impl Sleeper {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let shared = tempfile::tempdir().unwrap();
        let bundle = Bundle::script("exec sleep 1000").unwrap();
        let bundle = bundle.mount(bundle::bind(shared.path(), "/shared", &["rbind"])).unwrap();
        let bundle = bundle.with_capability("CAP_SYS_TIME").unwrap();
        fs::copy(PROGRAM, bundle.rootfs().join("bin/clock")).unwrap();
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        Self { runtime, _bundle: bundle, _shared: shared }
    }

    /// By how much a file is newer than the moment after it was made, and older than the moment
    /// before, in microseconds.
    fn compare(&self) -> (i64, i64) {
        let said = self.runtime.ok(&["exec", "c", "/bin/clock", "/shared"]).unwrap();
        let words: Vec<&str> = said.split_whitespace().collect();
        let ["newer", newer, "older", older] = words[..] else { panic!("{said}") };
        (newer.parse().unwrap(), older.parse().unwrap())
    }

    fn assert_same(&self) {
        let (newer, older) = self.compare();
        assert!(newer <= APART, "files are {newer} us from the future");
        assert!(older <= TICK + APART, "files are {older} us old when they are made");
    }

    fn end(self) {
        self.runtime.ok(&["delete", "--force", "c"]).unwrap();
        self.runtime.assert_clean().unwrap();
    }
}

/// Sets the host's clock forward by so many seconds; back, if they are negative.
fn set_host_clock(seconds: i64) {
    let now = clock_gettime(ClockId::Realtime);
    clock_settime(ClockId::Realtime, Timespec { tv_sec: now.tv_sec + seconds, ..now }).unwrap();
}

#[test]
fn the_time_is_the_hosts_from_the_start_and_when_that_is_set() {
    let sleeper = Sleeper::start();
    sleeper.assert_same();
    let uptime = || {
        let uptime = sleeper.runtime.ok(&["exec", "c", "cat", "/proc/uptime"]).unwrap();
        uptime.split_whitespace().next().unwrap().parse::<f64>().unwrap()
    };
    for seconds in [3600, -3605] {
        let before = uptime();
        set_host_clock(seconds);
        let near = || sleeper.compare().0.abs() < 1_000_000;
        assert!(
            comes_true(Duration::from_secs(20), near),
            "after {seconds} s: {:?}",
            sleeper.compare()
        );
        sleeper.assert_same();
        // Clocks that are not the time of day do not step.
        assert!((before..before + 60.0).contains(&uptime()));
    }
    set_host_clock(5);
    sleeper.end();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn a_clock_that_runs_too_fast_is_held_back() {
    let sleeper = Sleeper::start();
    // 100 millionths are 6 ms in a minute.
    let rate = |rate: &str| {
        let adjtimex = ["exec", "c", "busybox", "adjtimex", "-f", rate];
        sleeper.runtime.ok(&adjtimex).unwrap()
    };
    rate("6553600");
    let started = SystemTime::now();
    while started.elapsed().unwrap() < Duration::from_secs(200) {
        let (newer, older) = sleeper.compare();
        assert!(newer <= 7_000 && older <= TICK + 7_000, "{newer} {older}");
        std::thread::sleep(Duration::from_secs(10));
    }
    sleeper.assert_same();
    let said = sleeper.runtime.ok(&["exec", "c", "busybox", "adjtimex"]).unwrap();
    let line = said.lines().find(|line| line.contains("freq.adjust")).unwrap();
    let scaled: f64 = line.split_whitespace().nth(2).unwrap_or("").parse().unwrap();
    assert!(scaled.abs() < 10.0 * 65_536.0, "{said}");
    sleeper.end();
}
