//! Repeated containers, and repeated processes in one container: checks that they leave nothing
//! behind, neither on the host nor in the processes of a pod.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::bundle::Bundle;
use crate::memory::pss_kib;
use crate::runtime::{Runtime, cgroups, process_table};

/// How much more memory a process of a pod may use after many container processes than after the
/// first ones. The allocator's own variation is below this; a leak of 300 bytes in each of 900
/// processes is above.
const GROWTH_KIB: f64 = 256.0;
/// The processes that live as long as their pod, each with a part of its command line.
const KEPT: [(&str, &str); 4] = [
    ("supervisor", " supervise"),
    ("monitor", "bulkhead-vmm"),
    ("file server", "bulkhead-fs"),
    ("stand-in", "bulkhead-stand-in"),
];
/// Where files may be left; in the test host all written files are below `/run`.
const PLACES: [&str; 3] = ["/tmp", "/run", "/dev/shm"];

/// Processes, mounts, cgroups and files on the host.
#[derive(Debug)]
pub struct Traces {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
}

impl Traces {
    /// Lists them.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn look() -> Result<Self> {
        // Kernel threads, which have no command line, come and go.
        let table = process_table()?.into_iter().filter(|it| !it.command_line.is_empty());
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mut files = BTreeSet::new();
        PLACES.iter().for_each(|place| collect(Path::new(place), &mut files));
        Ok(Self {
            processes: table.map(|it| format!("{} {}", it.pid, it.command_line)).collect(),
            mounts: mounts.lines().map(str::to_owned).collect(),
            cgroups: cgroups()?,
            files,
        })
    }

    /// How many of each there are.
    #[must_use]
    pub fn counts(&self) -> [(&'static str, usize); 4] {
        [
            ("processes", self.processes.len()),
            ("mounts", self.mounts.len()),
            ("cgroups", self.cgroups.len()),
            ("files", self.files.len()),
        ]
    }

    /// Fails when there is anything that was not there `before`.
    ///
    /// # Errors
    /// Names what is left.
    pub fn no_more_than(&self, before: &Self) -> Result<()> {
        let path = |path: &PathBuf| path.display().to_string();
        let mut more: Vec<String> = self.processes.difference(&before.processes).cloned().collect();
        more.extend(self.mounts.difference(&before.mounts).cloned());
        more.extend(self.cgroups.difference(&before.cgroups).map(path));
        more.extend(self.files.difference(&before.files).map(path));
        ensure!(more.is_empty(), "left behind: {more:#?}");
        Ok(())
    }
}

fn collect(directory: &Path, files: &mut BTreeSet<PathBuf>) {
    // A directory may be removed meanwhile.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), files);
        }
        files.insert(entry.path());
    }
}

/// Creates a container with limits, starts it, runs a process in it and deletes it, `cycles` times;
/// returns the traces before and after.
///
/// # Errors
/// When a command fails, or anything is left.
pub fn lives(cycles: usize) -> Result<[Traces; 2]> {
    let runtime = Runtime::new()?;
    let bundle = Bundle::new(&["/bin/sleep", "1000"])?.with(|spec| {
        spec["linux"]["cgroupsPath"] = json!("/soak");
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        spec["linux"]["resources"]["pids"] = json!({"limit": 50});
        spec["linux"]["resources"]["cpu"] = json!({"quota": 90_000, "period": 100_000});
    })?;
    // The first container makes files that later ones share.
    live(&runtime, &bundle)?;
    let before = Traces::look()?;
    for _ in 0..cycles {
        live(&runtime, &bundle)?;
    }
    runtime.assert_clean()?;
    let after = Traces::look()?;
    after.no_more_than(&before)?;
    Ok([before, after])
}

fn live(runtime: &Runtime, bundle: &Bundle) -> Result<()> {
    runtime.create("soak", bundle)?;
    runtime.ok(&["start", "soak"])?;
    runtime.ok(&["exec", "soak", "/bin/true"])?;
    runtime.ok(&["kill", "soak", "KILL"])?;
    runtime.wait_for_status("soak", "stopped")?;
    runtime.ok(&["delete", "soak"])?;
    Ok(())
}

/// What a process of a pod holds.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Open files.
    pub descriptors: usize,
    /// Its proportional set size without guest memory, in KiB.
    pub kib: f64,
}

/// Runs `first` and then `more` processes in one container; returns what each process of its pod
/// held in between and at the end.
///
/// # Errors
/// When a process fails, anything is left, or a process of the pod has grown.
pub fn processes(first: usize, more: usize) -> Result<Vec<(&'static str, [Held; 2])>> {
    let runtime = Runtime::new()?;
    let bundle = Bundle::new(&["/bin/sleep", "100000"])?;
    runtime.create("soak", &bundle)?;
    runtime.ok(&["start", "soak"])?;
    let run = |times: usize| {
        (0..times).try_for_each(|_| runtime.ok(&["exec", "soak", "/bin/true"]).map(drop))?;
        // Part of the cleanup runs after the caller has returned.
        std::thread::sleep(std::time::Duration::from_secs(2));
        Ok::<_, anyhow::Error>((Traces::look()?, held(&runtime)?))
    };
    let (traces, early) = run(first)?;
    let (later_traces, late) = run(more)?;
    later_traces.no_more_than(&traces)?;
    let table = runtime.ok(&["ps", "soak"])?;
    ensure!(table.lines().count() == 2, "processes stayed in the container:\n{table}");
    runtime.ok(&["delete", "--force", "soak"])?;
    runtime.assert_clean()?;
    let pairs = KEPT.iter().zip(early).zip(late);
    let pairs: Vec<_> = pairs.map(|(((name, _), early), late)| (*name, [early, late])).collect();
    for (name, [early, late]) in &pairs {
        ensure!(
            late.descriptors <= early.descriptors && late.kib <= early.kib + GROWTH_KIB,
            "the {name} has grown in {more} processes: {early:?}, then {late:?}"
        );
    }
    Ok(pairs)
}

fn held(runtime: &Runtime) -> Result<Vec<Held>> {
    let one = |(name, part): &(&str, &str)| {
        let pids = runtime.processes(part)?;
        ensure!(pids.len() == 1, "{name}: {} processes", pids.len());
        let pid = *pids.first().context("no process")?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Held { descriptors, kib: pss_kib(pid)?.0 })
    };
    KEPT.iter().map(one).collect()
}
