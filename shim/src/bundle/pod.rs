//! What is the pod's, whichever containers come into it: planned from the specification of whoever brings
//! it up, a first container as well as a sandbox without one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{Bundle, HostSize, MachineSize, namespaces};
use crate::network::namespace::Network;

/// What a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// The host name of the machine itself.
    pub hostname: String,
    /// vCPUs and memory at the start.
    pub size: MachineSize,
    /// What they can become.
    pub most: MachineSize,
    /// Settings of the machine's network, which all containers of the pod share, by their names in
    /// sysctl(8).
    pub sysctls: BTreeMap<String, String>,
    /// The network namespace of the host whose interfaces are the machine's.
    pub network: Network,
    /// The resolv.conf(5) of the host that may name servers in that namespace.
    pub resolv_conf: Option<PathBuf>,
}

impl PodPlan {
    /// The pod that a bundle's container brings up.
    #[must_use]
    pub fn of(bundle: &Bundle, host: HostSize) -> Self {
        let size = MachineSize::of(&[&bundle.resources()], host);
        Self {
            hostname: hostname(&bundle.spec),
            size,
            most: size.most(host),
            sysctls: sysctls(&bundle.spec),
            network: bundle.network(),
            resolv_conf: bundle.resolv_conf(),
        }
    }
}

/// Whether a setting is one of the machine's network.
pub(super) fn is_of_the_pod(name: &str) -> bool {
    name.starts_with("net.")
}

/// The container's host name, or the host's for one that asks for no UTS namespace and so shows the
/// machine's.
fn hostname(spec: &Spec) -> String {
    let own = namespaces(spec).iter().any(|entry| entry.typ() == LinuxNamespaceType::Uts);
    match spec.hostname() {
        Some(name) if own => name.clone(),
        _ => rustix::system::uname().nodename().to_string_lossy().into_owned(),
    }
}

fn sysctls(spec: &Spec) -> BTreeMap<String, String> {
    let linux = spec.linux().as_ref();
    let settings = linux.and_then(|linux| linux.sysctl().as_ref()).into_iter().flatten();
    let of_the_pod = settings.filter(|(name, _)| is_of_the_pod(name));
    of_the_pod.map(|(name, value)| (name.clone(), value.clone())).collect()
}
