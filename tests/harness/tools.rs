//! A bundle with this machine's programs, which are Debian's, in addition to busybox.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::bundle::{Bundle, bind};

/// The shell: busybox's prefers its own applets.
pub const SHELL: &str = "/usr/bin/dash";
/// The capabilities of a container that may change its network and make further ones.
const POWERS: [&str; 4] = ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"];

/// All capabilities.
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a script does before it starts containers, as Docker's own image does: moves processes out of
/// the cgroup in which further cgroups will be made, and makes mounts shared.
pub const NEST: &str = r#"
mount --make-rshared /
mkdir -p /sys/fs/cgroup/init
for process in $(cat /sys/fs/cgroup/cgroup.procs); do
    # One that has ended meanwhile cannot be moved.
    { echo $process > /sys/fs/cgroup/init/cgroup.procs; } 2> /dev/null || true
done
sed 's/ / +/g;s/^/+/' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
"#;

/// A bundle that runs a shell script with this machine's programs, mounted read-only, and may
/// change its network.
///
/// # Errors
/// As [`Bundle::new`].
pub fn bundle(script: &str) -> Result<Bundle> {
    let mut bundle = Bundle::new(&[SHELL, "-c", script])?;
    let rootfs = bundle.rootfs();
    for name in ["usr", "etc/alternatives"] {
        fs::create_dir_all(rootfs.join(name))?;
    }
    for name in ["lib", "lib64", "sbin"] {
        symlink(Path::new("usr").join(name), rootfs.join(name))?;
    }
    for source in ["/usr", "/etc/alternatives"] {
        bundle = bundle.mount(bind(Path::new(source), source, &["rbind", "ro"]))?;
    }
    bundle.with(|spec| {
        spec["process"]["env"] = json!(["PATH=/usr/bin:/usr/sbin:/bin"]);
        for set in ["bounding", "effective", "permitted"] {
            let set = spec["process"]["capabilities"][set].as_array_mut();
            set.into_iter().for_each(|set| set.extend(POWERS.map(|power| json!(power))));
        }
        spec["linux"]["readonlyPaths"] = json!([]);
        let mounts = spec["mounts"].as_array_mut().into_iter().flatten();
        for mount in mounts.filter(|mount| mount["type"] == "sysfs") {
            mount["options"] = json!(["nosuid", "noexec", "nodev"]);
        }
    })
}

/// A bundle with all privileges in its machine, like a privileged container of Docker.
///
/// # Errors
/// As [`Bundle::new`].
pub fn privileged(script: &str) -> Result<Bundle> {
    let bundle = bundle(script)?.with(|spec| spec["process"]["rlimits"] = json!([]));
    empower(bundle?)
}

/// Gives a bundle all privileges in its machine.
///
/// # Errors
/// When its specification cannot be written.
pub fn empower(bundle: Bundle) -> Result<Bundle> {
    bundle.with(|spec| {
        for set in ["bounding", "effective", "permitted", "inheritable"] {
            spec["process"]["capabilities"][set] = json!(&ALL[..]);
        }
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["type"] == "cgroup" || mount["type"] == "sysfs" {
                mount["options"] = json!(["nosuid", "noexec", "nodev"]);
            }
        }
    })
}
