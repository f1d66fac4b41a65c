//! Refuses specifications that ask for something that a pod with a machine of its own cannot do.
//!
//! A refusal comes before anything is started, and says what to do instead. What the guest
//! implements (its own pid, ipc, uts, mount, cgroup, user and time namespaces, seccomp,
//! capabilities, resources, mounts) is accepted and not checked here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, LinuxSeccomp,
    LinuxSeccompAction, LinuxSeccompFilterFlag, Spec,
};
use thiserror::Error;

use super::disks::DISKS_MAX;
use super::resources::check_swap;
use super::volumes;
use super::{id_map, unified};
use crate::supervisor::neighbours::{Joined, Neighbours};

/// A part of a specification that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what}; {instead}")]
pub struct Refusal {
    /// The field and the reason.
    pub what: String,
    /// What to do instead.
    pub instead: &'static str,
}

pub(crate) fn refuse(what: impl Into<String>, instead: &'static str) -> Refusal {
    Refusal { what: what.into(), instead }
}

/// The network namespace that this process is in.
const OWN_NETWORK: &str = "/proc/self/ns/net";

/// The annotation that makes crun keep the caller's groups (`--group-add keep-groups` of Podman).
const KEEP_GROUPS: &str = "run.oci.keep_original_groups";

/// Character devices that exist in the guest, by major and minor number.
const GUEST_DEVICES: [(i64, i64); 17] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (1, 11),
    (5, 0),
    (5, 1),
    (5, 2),
    (10, 200),
    (10, 203), // cuse
    (10, 229),
    (10, 234), // btrfs-control
    (10, 235), // autofs
    (10, 236), // mapper/control
    (10, 237), // loop-control
    (108, 0),  // ppp
];
/// The major number of loop devices.
const LOOP_MAJOR: i64 = 7;

/// Checks the whole specification; returns the namespaces of neighbours that it joins.
///
/// # Errors
/// The first thing that is not supported.
pub fn check(spec: &Spec, neighbours: &Neighbours) -> Result<Joined, Refusal> {
    process(spec)?;
    if spec.root().is_none() {
        return Err(refuse("config.json has no root", "add \"root\": {\"path\": \"rootfs\"}"));
    }
    mounts(spec)?;
    annotations(spec)?;
    let Some(linux) = spec.linux() else {
        return Err(refuse("config.json has no linux section", "only Linux containers are run"));
    };
    let list = linux.namespaces().as_deref().unwrap_or_default();
    let joined = namespaces(list, neighbours)?;
    let mounted = volumes::check(spec)?;
    let mut devices = 0;
    // A caller that allows every device lists all devices of the host, and asks for none in
    // particular.
    if !every_device_allowed(linux) {
        let (disks, others): (Vec<_>, Vec<_>) =
            linux.devices().iter().flatten().partition(|device| device.typ() == LinuxDeviceType::B);
        others.into_iter().try_for_each(guest_has)?;
        devices = disks.len();
    }
    if devices + mounted > DISKS_MAX {
        return Err(refuse(
            format!(
                "there are {devices} block devices in linux.devices and {mounted} disks in mounts, \
                 and a machine has room for {DISKS_MAX}"
            ),
            "leave some out",
        ));
    }
    host_features(linux)?;
    Ok(joined)
}

fn process(spec: &Spec) -> Result<(), Refusal> {
    let Some(process) = spec.process() else {
        return Err(refuse("config.json has no process", "say what to run in process.args"));
    };
    if process.exec_cpu_affinity().is_some() {
        return Err(refuse(
            "process.execCPUAffinity numbers the processors of the host",
            "choose them for the whole pod, with linux.resources.cpu.cpus",
        ));
    }
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(refuse("process.args is empty", "name the program to run"));
    }
    if !process.cwd().is_absolute() {
        let what = format!("process.cwd {:?} is not an absolute path", process.cwd());
        return Err(refuse(what, "begin it with '/'"));
    }
    Ok(())
}

fn annotations(spec: &Spec) -> Result<(), Refusal> {
    let annotations = spec.annotations().as_ref();
    match annotations.and_then(|annotations| annotations.get(KEEP_GROUPS)) {
        Some(keeps) if keeps != "0" && !keeps.is_empty() => Err(refuse(
            format!("annotation {KEEP_GROUPS} would keep the groups of the caller"),
            "name them in process.user.additionalGids, or with --group-add",
        )),
        _ => Ok(()),
    }
}

fn mounts(spec: &Spec) -> Result<(), Refusal> {
    spec.mounts().iter().flatten().try_for_each(|mount| id_map::of(mount, spec).map(drop))
}

fn namespaces(namespaces: &[LinuxNamespace], neighbours: &Neighbours) -> Result<Joined, Refusal> {
    use LinuxNamespaceType::{Ipc, Mount, Network, Pid};
    let entry = |typ| namespaces.iter().find(|namespace| namespace.typ() == typ);
    for (typ, name, instead) in [
        (
            Network,
            "network",
            "host network mode is not possible in a machine of its own: add {\"type\": \"network\"}",
        ),
        (
            Pid,
            "pid",
            "the host's processes are not visible from a machine of its own: add {\"type\": \"pid\"}",
        ),
        (
            Ipc,
            "ipc",
            "the host's shared memory is not reachable from a machine of its own: add {\"type\": \"ipc\"}",
        ),
        (
            Mount,
            "mount",
            "the host's mounts are not reachable from a machine of its own: add {\"type\": \"mount\"}",
        ),
    ] {
        if entry(typ).is_none() {
            let what =
                format!("linux.namespaces has no {name:?} entry, so the host's is asked for");
            return Err(refuse(what, instead));
        }
    }
    let mut joined = Joined::default();
    for namespace in namespaces {
        let Some(path) = namespace.path() else { continue };
        if let Some(neighbour) = neighbours.owner(namespace.typ(), path) {
            joined.add(namespace.typ(), neighbour);
            continue;
        }
        if namespace.typ() != Network {
            let what = format!(
                "linux.namespaces joins the {} namespace {}, which is outside the machine",
                namespace.typ(),
                path.display()
            );
            return Err(refuse(what, "leave the path out to get a new one"));
        }
        network(path)?;
    }
    joined.check()
}

/// Checks that a network namespace exists and is not this process's own: the machine takes over its
/// interfaces.
fn network(path: &Path) -> Result<(), Refusal> {
    let number = |path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    match number(path) {
        Err(error) => Err(refuse(
            format!("cannot use network namespace {}: {error}", path.display()),
            "name an existing one, or leave the path out to get a new one",
        )),
        Ok(found) if number(Path::new(OWN_NETWORK)).is_ok_and(|own| own == found) => Err(refuse(
            format!("linux.namespaces joins {}, the network of the host", path.display()),
            "a machine has interfaces of its own: leave the path out, or name a namespace for it",
        )),
        Ok(_) => Ok(()),
    }
}

/// Whether the container may use every device, as a privileged container may.
pub(super) fn every_device_allowed(linux: &Linux) -> bool {
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    rules.iter().any(|rule| {
        let any_kind = rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A);
        let any_number =
            [rule.major(), rule.minor()].into_iter().all(|it| it.is_none_or(|n| n < 0));
        let all = rule.access().as_deref().is_none_or(|access| access == "rwm");
        rule.allow() && any_kind && any_number && all
    })
}

/// Whether a device that is listed with all others of the host is one that the guest makes itself:
/// a loop device, around a file of the container.
pub(super) fn guest_makes(device: &LinuxDevice) -> bool {
    device.typ() == LinuxDeviceType::B && device.major() == LOOP_MAJOR
}

pub(super) fn guest_has(device: &LinuxDevice) -> Result<(), Refusal> {
    let same = device.typ() == LinuxDeviceType::P
        || device.typ() != LinuxDeviceType::B
            && GUEST_DEVICES.contains(&(device.major(), device.minor()));
    if same {
        return Ok(());
    }
    let what = format!(
        "linux.devices has {} ({}:{}), a device of the host that cannot be passed yet",
        device.path().display(),
        device.major(),
        device.minor()
    );
    Err(refuse(what, "leave it out, and run without \"privileged\""))
}

fn filter(seccomp: &LinuxSeccomp) -> Result<(), Refusal> {
    let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
    let mut rules = seccomp.syscalls().iter().flatten();
    if notifies(seccomp.default_action()) || rules.any(|rule| notifies(rule.action())) {
        return Err(refuse(
            "linux.seccomp: SCMP_ACT_NOTIFY needs a process of the host that looks into the \
             container, which it cannot in a machine of its own",
            "use SCMP_ACT_ALLOW or SCMP_ACT_ERRNO",
        ));
    }
    let waits = LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv;
    if seccomp.flags().iter().flatten().any(|flag| *flag == waits) {
        return Err(refuse(
            format!("linux.seccomp.flags: {waits} is only for SCMP_ACT_NOTIFY"),
            "leave it out",
        ));
    }
    Ok(())
}

fn host_features(linux: &Linux) -> Result<(), Refusal> {
    if linux.intel_rdt().is_some() {
        return Err(refuse("linux.intelRdt divides the host's caches", "leave it out"));
    }
    if let Some(seccomp) = linux.seccomp() {
        filter(seccomp)?;
    }
    let resources = linux.resources().as_ref();
    resources.map_or(Ok(()), unified::check)?;
    resources.map_or(Ok(()), check_swap)?;
    if resources.and_then(|it| it.rdma().as_ref()).is_some_and(|rdma| !rdma.is_empty()) {
        return Err(refuse(
            "linux.resources.rdma limits adapters of the host, which are not passed",
            "leave it out",
        ));
    }
    let flags = linux.personality().as_ref().and_then(|it| it.flags().as_ref());
    if flags.is_some_and(|flags| !flags.is_empty()) {
        return Err(refuse("linux.personality.flags are not known", "name a domain only"));
    }
    if linux.memory_policy().is_some() {
        return Err(refuse(
            "linux.memoryPolicy chooses memory nodes of the host, and the machine has but one",
            "choose them for the whole pod, with linux.resources.cpu.mems",
        ));
    }
    let clocks = linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty());
    let mut namespaces = linux.namespaces().iter().flatten();
    if clocks && !namespaces.any(|entry| entry.typ() == LinuxNamespaceType::Time) {
        return Err(refuse(
            "linux.timeOffsets is for a time namespace, and there is none",
            "add {\"type\": \"time\"} to linux.namespaces",
        ));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(refuse(
            "linux.netDevices moves interfaces of the host, which are not passed yet",
            "leave it out",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn refused(list: &Value) -> Option<String> {
        let list: Vec<LinuxNamespace> = serde_json::from_value(list.clone()).unwrap();
        let found = namespaces(&list, &Neighbours::default());
        found.err().map(|refusal| refusal.to_string())
    }

    fn with(network: Value) -> Value {
        json!([{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}, {"type": "uts"}, network])
    }

    #[test]
    fn new_namespaces_and_a_network_that_is_not_the_hosts_are_taken() {
        assert_eq!(refused(&with(json!({"type": "network"}))), None);
        // Any file but the network namespace of this process is accepted here.
        let other = with(json!({"type": "network", "path": "/proc/self/ns/uts"}));
        assert_eq!(refused(&other), None);
    }

    #[test]
    fn the_network_of_the_host_and_one_that_is_not_there_are_refused() {
        let words =
            refused(&with(json!({"type": "network", "path": "/proc/self/ns/net"}))).unwrap();
        assert!(words.contains("/proc/self/ns/net, the network of the host"), "{words}");
        let words = refused(&with(json!({"type": "network", "path": "/nonexistent"}))).unwrap();
        assert!(words.starts_with("cannot use network namespace /nonexistent: "), "{words}");
    }

    #[test]
    fn every_namespace_of_the_host_is_refused_with_a_way_out() {
        for missing in ["network", "pid", "ipc", "mount"] {
            let mut list = with(json!({"type": "network"}));
            list.as_array_mut().unwrap().retain(|entry| entry["type"] != missing);
            let words = refused(&list).unwrap();
            assert!(words.contains(&format!("no {missing:?} entry")), "{words}");
            assert!(words.contains(&format!("add {{\"type\": {missing:?}}}")), "{words}");
        }
    }

    #[test]
    fn joining_any_other_namespace_is_refused() {
        let mut list = with(json!({"type": "network"}));
        list[0]["path"] = json!("/proc/1/ns/pid");
        let words = refused(&list).unwrap();
        assert!(words.contains("/proc/1/ns/pid"), "{words}");
    }

    #[test]
    fn devices_of_the_host_are_refused_and_those_of_the_guest_taken() {
        let device = |json: Value| serde_json::from_value::<LinuxDevice>(json).unwrap();
        let fuse = json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229});
        assert_eq!(guest_has(&device(fuse)), Ok(()));
        let of_a_file = json!({"path": "/dev/loop3", "type": "b", "major": 7, "minor": 3});
        assert!(guest_makes(&device(of_a_file)));
        let privileged = json!({"resources": {"devices": [{"allow": true, "access": "rwm"}]}});
        assert!(every_device_allowed(&serde_json::from_value(privileged).unwrap()));
        let ordinary = json!({"resources": {"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 5, "access": "rwm"},
            {"allow": true, "type": "a", "access": "m"}
        ]}});
        assert!(!every_device_allowed(&serde_json::from_value(ordinary).unwrap()));
        let disk = json!({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0});
        let words = guest_has(&device(disk)).unwrap_err().to_string();
        assert!(words.contains("/dev/sda (8:0)"), "{words}");
    }
}
