//! The host's cgroups: version 2 as systemd mounts it, or the hierarchies of version 1 as older
//! Debian releases had them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};

use crate::init::attach;

const ROOT: &str = "/sys/fs/cgroup";
/// The controllers of each hierarchy.
const HIERARCHIES: [&str; 10] = [
    "blkio",
    "cpu,cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "net_cls,net_prio",
    "perf_event",
    "pids",
];

/// Mounts cgroup v2 and enables every controller below its root.
pub(crate) fn unified() -> Result<()> {
    attach("cgroup2", ROOT, "cgroup2", "nsdelegate")?;
    let available = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"))?;
    for controller in available.split_whitespace() {
        fs::write(Path::new(ROOT).join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("enable the cgroup controller {controller}"))?;
    }
    Ok(())
}

/// Mounts the hierarchies of cgroup v1, with a link for each of their controllers.
pub(crate) fn legacy() -> Result<()> {
    attach("tmpfs", ROOT, "tmpfs", "mode=755")?;
    for hierarchy in HIERARCHIES {
        let directory = format!("{ROOT}/{hierarchy}");
        fs::create_dir(&directory).with_context(|| directory.clone())?;
        attach("cgroup", &directory, "cgroup", hierarchy)?;
        for controller in hierarchy.split(',').filter(|controller| *controller != hierarchy) {
            symlink(hierarchy, format!("{ROOT}/{controller}"))?;
        }
    }
    // The hierarchy without a controller, which systemd would use for its units.
    fs::create_dir(format!("{ROOT}/systemd"))?;
    attach("cgroup", &format!("{ROOT}/systemd"), "cgroup", "none,name=systemd")
}
