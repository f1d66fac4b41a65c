//! The time from a command's start to its end: `true` in a container, compared with runc, crun, and
//! QEMU's microvm, which boots the same kernel to an init that resets at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, output};
use bulkhead_tests::vm::dist;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::table::{self, median};

/// A command whose whole run is timed.
struct Contender<'a> {
    name: &'static str,
    command: Box<dyn Fn() -> Command + 'a>,
    /// The times in milliseconds.
    times: Vec<f64>,
    /// How much of each time the host was idle.
    idle: Vec<f64>,
}

impl<'a> Contender<'a> {
    fn new(name: &'static str, command: impl Fn() -> Command + 'a) -> Self {
        Self { name, command: Box::new(command), times: Vec::new(), idle: Vec::new() }
    }

    fn run(&mut self) -> Result<()> {
        let mut command = (self.command)();
        command.stdin(Stdio::null());
        let (idle, started) = (idle_ms()?, Instant::now());
        let output = output(&mut command)?;
        self.times.push(started.elapsed().as_secs_f64() * 1e3);
        self.idle.push(idle_ms()? - idle);
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {errors}", output.status);
        Ok(())
    }
}

/// Runs all contenders, prints the tables, returns the medians in milliseconds.
pub(crate) fn measure(rounds: usize) -> Result<Value> {
    let bundle = Bundle::new(&["/bin/true"])?;
    let runtime = Runtime::new()?;
    let work = TempDir::new()?;
    let initramfs = bare_initramfs(work.path())?;
    let trace = work.path().join("trace");

    let mut contenders = [
        Contender::new("bulkhead run true", || bulkhead(&runtime, &bundle, &trace)),
        Contender::new("runc run true", || peer("runc", &bundle, work.path())),
        Contender::new("crun run true", || peer("crun", &bundle, work.path())),
        Contender::new("QEMU microvm, bare boot", || qemu(&initramfs)),
    ];
    for _ in 0..rounds {
        for contender in &mut contenders {
            contender.run().context(contender.name)?;
        }
    }

    let own = median(&contenders[0].times);
    let mut totals = Map::new();
    let mut rows = Vec::new();
    for Contender { name, times, idle, .. } in &contenders {
        let (ms, idle) = (median(times), median(idle));
        let ratio = own / ms;
        rows.push(vec![
            (*name).into(),
            format!("{ms:.0}"),
            format!("{ratio:.2}"),
            format!("{idle:.0}"),
        ]);
        totals.insert((*name).into(), ms.into());
    }
    // Idle time is spent waiting for timers, grace periods, and the files of the outer machine.
    table::print("Cold start", &["", "median ms", "bulkhead / this", "of it idle"], &rows);

    let phases = phases(&fs::read_to_string(&trace).context("trace of the phases")?)?;
    let rows: Vec<Vec<String>> = phases
        .iter()
        .map(|(phase, ms)| vec![phase.clone(), format!("{:.0}", ms.as_f64().unwrap_or(0.0))])
        .collect();
    table::print("Where bulkhead's time goes", &["phase", "median ms"], &rows);
    Ok(json!({"unit": "ms", "totals": totals, "phases": phases}))
}

fn bulkhead(runtime: &Runtime, bundle: &Bundle, trace: &Path) -> Command {
    let mut command = runtime.run_command("bench", bundle);
    command.env("BULKHEAD_TRACE", trace);
    command
}

fn peer(program: &str, bundle: &Bundle, work: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("--root").arg(work.join(program)).args(["run", "--bundle"]);
    command.arg(bundle.path()).arg("bench");
    command
}

fn qemu(initramfs: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=off", "-accel", "kvm"])
        .args(["-cpu", "host", "-m", "256", "-smp", "1", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot", "-append"])
        .arg("quiet panic=-1 reboot=t no_timer_check tsc=reliable cryptomgr.notests rdinit=/init")
        .arg("-kernel")
        .arg(dist().join("share/bulkhead/vmlinux"))
        .arg("-initrd")
        .arg(initramfs);
    command
}

/// An initramfs whose init is this program, which as process 1 resets the machine.
fn bare_initramfs(work: &Path) -> Result<PathBuf> {
    let path = work.join("bare.cpio");
    guest_image::initramfs::write(&std::env::current_exe()?, &path)?;
    Ok(path)
}

/// How long the host's processors have been idle, in milliseconds, with a resolution of 10 ms.
fn idle_ms() -> Result<f64> {
    let uptime = fs::read_to_string("/proc/uptime").context("/proc/uptime")?;
    let idle = uptime.split_whitespace().nth(1).context("/proc/uptime has no idle time")?;
    Ok(idle.parse::<f64>().context("/proc/uptime")? * 1e3)
}

/// Medians by phase, in the order in which the phases first appear.
fn phases(trace: &str) -> Result<Map<String, Value>> {
    let mut order: Vec<(String, Vec<f64>)> = Vec::new();
    for line in trace.lines() {
        let line: Value = serde_json::from_str(line)?;
        let phase = line["phase"].as_str().context("a phase without a name")?;
        let ms = line["us"].as_f64().context("a phase without a time")? / 1e3;
        match order.iter_mut().find(|(name, _)| name == phase) {
            Some((_, times)) => times.push(ms),
            None => order.push((phase.into(), vec![ms])),
        }
    }
    Ok(order.into_iter().map(|(phase, times)| (phase, median(&times).into())).collect())
}
