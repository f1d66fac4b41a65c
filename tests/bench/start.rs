//! From the command to its end: `true` in a container, against runc, crun, and QEMU's microvm that
//! boots the same kernel to an init which resets at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;
use bulkhead_tests::vm::dist;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::table::{self, median};

/// Runs all contenders, prints the tables, gives the medians in milliseconds.
pub(crate) fn measure(rounds: usize) -> Result<Value> {
    let bundle = Bundle::new(&["/bin/true"])?;
    let runtime = Runtime::new()?;
    let work = TempDir::new()?;
    let initramfs = bare_initramfs(work.path())?;
    let trace = work.path().join("trace");

    let names = ["bulkhead run true", "runc run true", "crun run true", "QEMU microvm, bare boot"];
    let mut times: [Vec<f64>; 4] = Default::default();
    for _ in 0..rounds {
        let commands = [
            bulkhead(&runtime, &bundle, &trace),
            peer("runc", &bundle, work.path()),
            peer("crun", &bundle, work.path()),
            qemu(&initramfs),
        ];
        for ((times, command), name) in times.iter_mut().zip(commands).zip(names) {
            times.push(time(command).context(name)?);
        }
    }

    let medians: Vec<f64> = times.iter().map(|times| median(times)).collect();
    let own = medians.first().copied().unwrap_or(f64::NAN);
    let rows: Vec<Vec<String>> = names
        .iter()
        .zip(&medians)
        .map(|(name, ms)| vec![(*name).into(), format!("{ms:.0}"), format!("{:.2}", own / ms)])
        .collect();
    table::print("Cold start", &["", "median ms", "bulkhead / this"], &rows);

    let phases = phases(&fs::read_to_string(&trace).context("trace of the phases")?)?;
    let rows: Vec<Vec<String>> = phases
        .iter()
        .map(|(phase, ms)| vec![phase.clone(), format!("{:.0}", ms.as_f64().unwrap_or(0.0))])
        .collect();
    table::print("Where bulkhead's time goes", &["phase", "median ms"], &rows);
    let totals: Map<String, Value> =
        names.iter().zip(medians).map(|(name, ms)| ((*name).into(), ms.into())).collect();
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

/// An initramfs whose init is this very program, which as process 1 resets the machine.
fn bare_initramfs(work: &Path) -> Result<PathBuf> {
    let path = work.join("bare.cpio");
    guest_image::initramfs::write(&std::env::current_exe()?, &path)?;
    Ok(path)
}

fn time(mut command: Command) -> Result<f64> {
    let started = Instant::now();
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
    let elapsed = started.elapsed();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {errors}", output.status);
    Ok(elapsed.as_secs_f64() * 1e3)
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
