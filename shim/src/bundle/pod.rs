//! The plan of a pod, whichever containers it has later. It is made from the specification that
//! starts the pod: of a first container, or of a sandbox without one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{Bundle, HostSize, MachineSize, namespaces, size};
use crate::network::namespace::Network;
use crate::policy::{HostSocketRule, NetworkPolicy, Policy};

/// The properties of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// The host name of the machine itself.
    pub hostname: String,
    /// vCPUs and memory at the start.
    pub size: MachineSize,
    /// The largest size that the machine can grow to.
    pub most: MachineSize,
    /// Sysctls of the machine's network, which all containers of the pod share, by their names in
    /// sysctl(8).
    pub sysctls: BTreeMap<String, String>,
    /// How long the guest may take to boot.
    pub boot_timeout: Duration,
    /// How frames of the network move.
    pub frames: NetworkPolicy,
    /// Whether sockets in shared directories have another end.
    pub sockets: bool,
    /// How many pairs of queues each network interface has.
    pub queue_pairs: u8,
    /// The network namespace of the host whose interfaces the machine gets.
    pub network: Network,
    /// The resolv.conf(5) of the host that may name servers in that namespace.
    pub resolv_conf: Option<PathBuf>,
}

impl PodPlan {
    /// The plan of the pod that is started for a bundle's container.
    #[must_use]
    pub fn of(bundle: &Bundle, host: HostSize, policy: &Policy) -> Self {
        let resources = bundle.resources();
        let size = MachineSize::of(&[&resources], host, policy.size);
        Self {
            hostname: hostname(&bundle.spec),
            size,
            most: size.most(host),
            sysctls: sysctls(&bundle.spec),
            boot_timeout: policy.guest.boot_timeout,
            frames: policy.network,
            sockets: policy.sockets.host == HostSocketRule::Allow,
            // Each pair takes a megabyte of the guest. A container without a quota may never need
            // more than one.
            queue_pairs: size::processors(&resources).map_or(1, |_| size.vcpus),
            network: bundle.network(),
            resolv_conf: bundle.resolv_conf(),
        }
    }
}

/// Whether a sysctl belongs to the machine's network.
pub(super) fn is_of_the_pod(name: &str) -> bool {
    name.starts_with("net.")
}

/// The container's host name. It is the host's if none is given, or if the container has no UTS
/// namespace and so sees the machine's.
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
