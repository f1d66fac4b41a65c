//! What a process of a container gives up before its program runs: capabilities(7) and, by a filter,
//! system calls.
//!
//! Both are taken out of the specification that libcontainer gets, and are applied here in two
//! steps, for a container's first process (`crate::creator`) as for one that joins it
//! (`crate::tenant`). [`Confinement::enter`] comes when everything else about the process is set.
//! [`Confinement::seal`] loads the filter, and only execve(2) comes after it, so that a profile
//! need not allow what the agent itself does.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, LinuxSeccomp, Process, Spec};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};
use serde::{Deserialize, Serialize};

use crate::seccomp::{Filter, FilterError};

/// The name of the file, in the directory of the process.
const FILE: &str = "confinement.json";

/// What a process may keep, in the words of the specification.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Restrictions {
    /// The only capabilities that the process keeps; without any, it keeps none.
    capabilities: Option<LinuxCapabilities>,
    seccomp: Option<LinuxSeccomp>,
    no_new_privileges: bool,
}

impl Restrictions {
    /// Takes those of a container's first process out of its specification.
    pub(crate) fn take(spec: &mut Spec) -> Self {
        let seccomp = spec.linux_mut().as_mut().and_then(|linux| linux.seccomp_mut().take());
        let of_container = Self { seccomp, ..Self::default() };
        let process = spec.process_mut().as_mut();
        process.map_or_else(|| of_container.clone(), |process| of_container.take_further(process))
    }

    /// Takes those of a further process of the same container: its own capabilities, or the
    /// container's, and the container's filter.
    pub(crate) fn take_further(&self, process: &mut Process) -> Self {
        let own = process.capabilities().clone();
        process.set_capabilities(None);
        Self {
            capabilities: own.or_else(|| self.capabilities.clone()),
            seccomp: self.seccomp.clone(),
            no_new_privileges: process.no_new_privileges() == Some(true),
        }
    }

    /// Writes them to `directory`, from which the creator or the tenant reads its input.
    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        fs::write(directory.join(FILE), serde_json::to_vec(self)?)
    }

    /// Reads those that [`Restrictions::write`] has left.
    pub(crate) fn read(directory: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
    }

    /// Does in advance everything that can fail.
    pub(crate) fn prepare(&self) -> Result<Confinement, FilterError> {
        let set = |of: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
            let listed = self.capabilities.as_ref().and_then(|sets| of(sets).as_ref());
            listed.into_iter().flatten().copied().map(bit).collect::<CapabilitySet>()
        };
        let permitted = set(LinuxCapabilities::permitted);
        let inheritable = set(LinuxCapabilities::inheritable);
        let effective = set(LinuxCapabilities::effective);
        Ok(Confinement {
            bounding: set(LinuxCapabilities::bounding),
            sets: CapabilitySets { effective, permitted, inheritable },
            // The kernel accepts no others; runc drops them silently too.
            ambient: set(LinuxCapabilities::ambient) & permitted & inheritable,
            filter: self.seccomp.as_ref().map(Filter::compile).transpose()?.map(Arc::new),
            no_new_privileges: self.no_new_privileges,
        })
    }
}

/// Restrictions that are ready to be applied. Clones share the filter.
#[derive(Clone, Debug)]
pub(crate) struct Confinement {
    bounding: CapabilitySet,
    sets: CapabilitySets,
    ambient: CapabilitySet,
    filter: Option<Arc<Filter>>,
    no_new_privileges: bool,
}

impl Confinement {
    /// Gives up capabilities. The one that is needed to load the filter stays permitted, unused,
    /// until [`Confinement::seal`]: execve(2) computes those of the program anew and ignores it.
    ///
    /// # Errors
    /// In the words of runc; the process must not go on then.
    pub(crate) fn enter(&self) -> Result<(), String> {
        self.bound().map_err(|error| format!("unable to apply bounding set: {}", words(error)))?;
        self.drop().map_err(|error| format!("unable to apply caps: {}", words(error)))
    }

    /// Loads the filter, if there is one. Two system calls at most, and no memory, so that it may be
    /// called between fork(2) and execve(2).
    ///
    /// # Errors
    /// In the kernel's words; the process must not go on then.
    pub(crate) fn seal(&self) -> io::Result<()> {
        let Some(filter) = &self.filter else { return Ok(()) };
        if self.needs_privilege() {
            let mut sets = self.permitted();
            sets.effective |= CapabilitySet::SYS_ADMIN;
            set_capabilities(None, sets)?;
        }
        filter.load()
    }

    fn bound(&self) -> rustix::io::Result<()> {
        for capability in every_capability().filter(|it| !self.bounding.contains(*it)) {
            remove_capability_from_bounding_set(capability)?;
        }
        Ok(())
    }

    fn drop(&self) -> rustix::io::Result<()> {
        // All at once: one set limits another, and the capability to change them may be dropped.
        set_capabilities(None, self.permitted())?;
        clear_ambient_capability_set()?;
        self.ambient.iter().try_for_each(|it| configure_capability_in_ambient_set(it, true))
    }

    /// The requested sets, and the capability that is needed to load the filter.
    fn permitted(&self) -> CapabilitySets {
        let mut sets = self.sets;
        if self.needs_privilege() {
            sets.permitted |= CapabilitySet::SYS_ADMIN;
        }
        sets
    }

    /// Whether loading the filter needs a capability, seccomp(2).
    fn needs_privilege(&self) -> bool {
        self.filter.is_some() && !self.no_new_privileges
    }
}

/// All capabilities of the kernel.
fn every_capability() -> impl Iterator<Item = CapabilitySet> {
    let numbered = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    numbered.take_while(|it| capability_is_in_bounding_set(*it) != Err(Errno::INVAL))
}

/// An error as C and Go word it.
fn words(error: Errno) -> String {
    let text = io::Error::from(error).to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn bit(capability: Capability) -> CapabilitySet {
    match capability {
        Capability::AuditControl => CapabilitySet::AUDIT_CONTROL,
        Capability::AuditRead => CapabilitySet::AUDIT_READ,
        Capability::AuditWrite => CapabilitySet::AUDIT_WRITE,
        Capability::BlockSuspend => CapabilitySet::BLOCK_SUSPEND,
        Capability::Bpf => CapabilitySet::BPF,
        Capability::CheckpointRestore => CapabilitySet::CHECKPOINT_RESTORE,
        Capability::Chown => CapabilitySet::CHOWN,
        Capability::DacOverride => CapabilitySet::DAC_OVERRIDE,
        Capability::DacReadSearch => CapabilitySet::DAC_READ_SEARCH,
        Capability::Fowner => CapabilitySet::FOWNER,
        Capability::Fsetid => CapabilitySet::FSETID,
        Capability::IpcLock => CapabilitySet::IPC_LOCK,
        Capability::IpcOwner => CapabilitySet::IPC_OWNER,
        Capability::Kill => CapabilitySet::KILL,
        Capability::Lease => CapabilitySet::LEASE,
        Capability::LinuxImmutable => CapabilitySet::LINUX_IMMUTABLE,
        Capability::MacAdmin => CapabilitySet::MAC_ADMIN,
        Capability::MacOverride => CapabilitySet::MAC_OVERRIDE,
        Capability::Mknod => CapabilitySet::MKNOD,
        Capability::NetAdmin => CapabilitySet::NET_ADMIN,
        Capability::NetBindService => CapabilitySet::NET_BIND_SERVICE,
        Capability::NetBroadcast => CapabilitySet::NET_BROADCAST,
        Capability::NetRaw => CapabilitySet::NET_RAW,
        Capability::Perfmon => CapabilitySet::PERFMON,
        Capability::Setfcap => CapabilitySet::SETFCAP,
        Capability::Setgid => CapabilitySet::SETGID,
        Capability::Setpcap => CapabilitySet::SETPCAP,
        Capability::Setuid => CapabilitySet::SETUID,
        Capability::SysAdmin => CapabilitySet::SYS_ADMIN,
        Capability::SysBoot => CapabilitySet::SYS_BOOT,
        Capability::SysChroot => CapabilitySet::SYS_CHROOT,
        Capability::SysModule => CapabilitySet::SYS_MODULE,
        Capability::SysNice => CapabilitySet::SYS_NICE,
        Capability::SysPacct => CapabilitySet::SYS_PACCT,
        Capability::SysPtrace => CapabilitySet::SYS_PTRACE,
        Capability::SysRawio => CapabilitySet::SYS_RAWIO,
        Capability::SysResource => CapabilitySet::SYS_RESOURCE,
        Capability::SysTime => CapabilitySet::SYS_TIME,
        Capability::SysTtyConfig => CapabilitySet::SYS_TTY_CONFIG,
        Capability::Syslog => CapabilitySet::SYSLOG,
        Capability::WakeAlarm => CapabilitySet::WAKE_ALARM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(capabilities: Option<Value>) -> Spec {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}
        });
        if let Some(capabilities) = capabilities {
            spec["process"]["capabilities"] = capabilities;
        }
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn libcontainer_gets_none_of_it() {
        let mut spec = spec(Some(json!({"bounding": ["CAP_KILL"]})));
        let restrictions = Restrictions::take(&mut spec);
        assert!(spec.process().as_ref().unwrap().capabilities().is_none());
        assert!(spec.linux().as_ref().unwrap().seccomp().is_none());
        let confinement = restrictions.prepare().unwrap();
        assert_eq!(confinement.bounding, CapabilitySet::KILL);
        assert!(confinement.filter.is_some());
        let directory = tempfile::tempdir().unwrap();
        restrictions.write(directory.path()).unwrap();
        assert_eq!(Restrictions::read(directory.path()).unwrap(), restrictions);
    }

    #[test]
    fn a_process_without_capabilities_has_none_and_a_further_one_has_the_containers() {
        let none = Restrictions::take(&mut spec(None)).prepare().unwrap();
        let sets = none.sets;
        let all = [none.bounding, sets.effective, sets.permitted, sets.inheritable, none.ambient];
        assert_eq!(all, [CapabilitySet::empty(); 5]);
        let of_container = Restrictions::take(&mut spec(Some(json!({"bounding": ["CAP_KILL"]}))));
        let further = |json: Value| {
            let mut process = serde_json::from_value(json).unwrap();
            of_container.take_further(&mut process).prepare().unwrap()
        };
        let process = json!({"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        assert_eq!(further(process.clone()).bounding, CapabilitySet::KILL);
        let mut own = process;
        own["capabilities"] = json!({"bounding": ["CAP_CHOWN"]});
        assert_eq!(further(own).bounding, CapabilitySet::CHOWN);
    }

    #[test]
    fn what_cannot_become_ambient_does_not() {
        let sets = json!({
            "permitted": ["CAP_KILL", "CAP_CHOWN"], "inheritable": ["CAP_KILL", "CAP_BPF"],
            "ambient": ["CAP_KILL", "CAP_CHOWN", "CAP_BPF"]
        });
        let confinement = Restrictions::take(&mut spec(Some(sets))).prepare().unwrap();
        assert_eq!(confinement.ambient, CapabilitySet::KILL);
    }

    #[test]
    fn what_loads_the_filter_is_permitted_only_where_it_must_be() {
        let permitted = |no_new_privileges: bool, filter: bool| {
            let mut spec = spec(Some(json!({"permitted": ["CAP_KILL"]})));
            if let Some(process) = spec.process_mut() {
                process.set_no_new_privileges(Some(no_new_privileges));
            }
            let mut restrictions = Restrictions::take(&mut spec);
            restrictions.seccomp = restrictions.seccomp.filter(|_| filter);
            restrictions.prepare().unwrap().permitted().permitted
        };
        let with = CapabilitySet::KILL | CapabilitySet::SYS_ADMIN;
        assert_eq!(permitted(false, true), with);
        for (no_new_privileges, filter) in [(true, true), (true, false), (false, false)] {
            assert_eq!(permitted(no_new_privileges, filter), CapabilitySet::KILL);
        }
    }
}
