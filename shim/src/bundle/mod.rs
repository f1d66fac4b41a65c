//! An OCI bundle: it is read once, and either refused early or turned into a plan for the pod.
//!
//! OCI runtime-spec, "Bundle" and "Configuration". [`read`] reads `config.json`, [`refuse`] finds
//! what is not supported, [`PodPlan`] describes the pod, and [`ContainerPlan`] the container: the
//! specification for the guest and the files that are shared with it. This module mounts nothing
//! and starts nothing.

mod disks;
mod guest;
mod hook_programs;
mod host_sockets;
mod huge_pages;
mod id_map;
mod lenient;
mod limits;
mod pod;
mod read_only;
mod read_only_root;
pub mod refuse;
mod resources;
mod size;
mod swap;
mod unified;
mod volumes;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::MAX_REQUEST_BYTES;
use oci_spec::runtime::{
    Capability, Hooks, LinuxNamespace, LinuxNamespaceType, LinuxResources, Process, Spec,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::disks::{DISKS_MAX, Disk, FileSystem};
pub use self::guest::{FileKind, Shared};
pub use self::huge_pages::{
    HUGE_PAGE_MIB, Pool, Shortage, allow as allow_huge_pages, check as check_huge_pages,
    overhead_mib as huge_pages_overhead_mib, pages as huge_pages,
};
pub use self::id_map::IdMap;
pub use self::limits::ProcessLimits;
pub use self::pod::PodPlan;
use self::refuse::Refusal;
pub use self::resources::{check_swap, merge, normalize, say_no_swap, total};
pub use self::size::{HostSize, MACHINE_OVERHEAD_MIB, MachineSize};
pub use self::swap::{swap_mib, swap_of_the_host};
pub(crate) use self::unified::bytes;
pub use self::unified::check as check_files;
use crate::network::namespace::Network;
use crate::policy::{HostSocketRule, SocketPolicy};
use crate::sockets::Users;
use crate::state::StateError;
use crate::state::id::ContainerId;
use crate::supervisor::neighbours::{Joined, Neighbours};

/// The file that makes a directory a bundle.
const CONFIG: &str = "config.json";
/// The largest `config.json` that is read, in bytes.
const CONFIG_BYTES_MAX: u64 = 64 << 20;
/// The largest specification that is sent to the guest, in bytes: the same message also contains
/// names.
const GUEST_BYTES_MAX: usize = MAX_REQUEST_BYTES - (64 << 10);

/// Why a bundle cannot be used.
#[derive(Debug, Error)]
pub enum BundleError {
    /// The directory cannot be used.
    #[error("cannot use bundle directory {}; name one with --bundle", .path.display())]
    NoBundle {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory has no `config.json`.
    #[error(
        "JSON specification file config.json not found in {}; \"bulkhead spec\" writes one",
        .path.display()
    )]
    NoConfig {
        /// The directory.
        path: PathBuf,
    },
    /// `config.json` cannot be read.
    #[error("{} cannot be read", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `config.json` is too large.
    #[error("{} has {bytes} bytes; at most {CONFIG_BYTES_MAX} are read", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The specification is too large for the guest.
    #[error(
        "the container's specification has {0} bytes without its annotations; at most \
         {GUEST_BYTES_MAX} are supported"
    )]
    TooLargeForGuest(usize),
    /// `config.json` is not JSON, or not a specification; the source has line and column.
    #[error("{} is not an OCI specification", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A directory or file that the specification names cannot be used.
    #[error("cannot use {what} {}", .path.display())]
    Source {
        /// What it is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A block device that the specification names does not exist on the host.
    #[error(
        "linux.devices has {} ({}:{}), which the host does not have", .path.display(), .number.0,
        .number.1
    )]
    Device {
        /// Its path in the container.
        path: PathBuf,
        /// Its major and minor number.
        number: (i64, i64),
        /// Why.
        source: io::Error,
    },
    /// The states of other containers cannot be read.
    #[error(transparent)]
    Neighbours(#[from] StateError),
    /// The host has too few huge pages.
    #[error(transparent)]
    HugePages(#[from] Shortage),
    /// The specification asks for something that is not supported.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The specification for the guest cannot be serialized.
    #[error("cannot build the guest's specification")]
    Rewrite(#[source] serde_json::Error),
}

/// A bundle that was read.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Its directory, absolute.
    pub dir: PathBuf,
    /// Its specification.
    pub spec: Spec,
    /// Unknown capabilities that it names, which are removed from `spec`.
    pub unknown_capabilities: Vec<String>,
}

/// What a pod needs to run one container, in addition to [`PodPlan`].
#[derive(Clone, Debug)]
pub struct ContainerPlan {
    /// The specification for the guest, JSON.
    pub spec_json: Vec<u8>,
    /// The bundle's directory on the host.
    pub bundle: PathBuf,
    /// The root file system on the host.
    pub rootfs: PathBuf,
    /// Everything that is shared, the root file system first.
    pub shared: Vec<Shared>,
    /// Sockets and FIFOs of the host that it mounts, in the order in which the agent knows them.
    pub host_sockets: Vec<Shared>,
    /// The users of the host that it has.
    pub users: Users,
    /// Its disks, by [`Disk::path`] in `spec_json`.
    pub disks: Vec<Disk>,
    /// The OOM score adjustment of the pod's processes on the host; `None` keeps the caller's.
    pub oom_score_adj: Option<i32>,
    /// The annotations, for the container's state.
    pub annotations: HashMap<String, String>,
    /// The bundle's hooks.
    pub hooks: Hooks,
    /// The fields that are removed because they mean nothing in the guest.
    pub dropped: Vec<&'static str>,
}

/// What a creator adds to a bundle because of its own environment, which systemd sets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Additions {
    /// Variables for the container's program.
    pub environment: Vec<String>,
    /// The container can say that it is ready: sd_notify(3).
    pub notify: bool,
}

/// What a container's plan depends on besides its specification.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Its directory in the share, relative to the share's root.
    pub directory: PathBuf,
    /// Namespaces that it joins, with their paths in the guest.
    pub namespaces: Vec<(LinuxNamespaceType, PathBuf)>,
    /// Whether the pod is started for this container.
    pub brings_up_the_pod: bool,
    /// The limits of its creator.
    pub limits: ProcessLimits,
    /// What its creator adds.
    pub additions: Additions,
}

/// Reads a bundle.
///
/// # Errors
/// Names the file, and for JSON errors the line and column.
pub fn read(dir: &Path) -> Result<Bundle, BundleError> {
    let dir = fs::canonicalize(dir)
        .map_err(|source| BundleError::NoBundle { path: dir.to_owned(), source })?;
    let path = dir.join(CONFIG);
    let json = read_config(&dir, &path)?;
    let (mut spec, unknown_capabilities) =
        lenient::spec(&json).map_err(|source| BundleError::Json { path, source })?;
    volumes::apply_annotation(&mut spec)?;
    Ok(Bundle { dir, spec, unknown_capabilities })
}

/// Reads the `process` object of an `exec`.
///
/// # Errors
/// When it is not such an object.
pub fn read_process(json: &[u8]) -> Result<Process, serde_json::Error> {
    let (process, unknown) = lenient::process(json)?;
    warn_of_unknown(&unknown);
    Ok(process)
}

/// The capability of this name, if there is one.
#[must_use]
pub fn capability(name: &str) -> Option<Capability> {
    lenient::capability(&name.into())
}

/// Warns with runc's message that capabilities are ignored.
pub fn warn_of_unknown(capabilities: &[String]) {
    if !capabilities.is_empty() {
        let names = capabilities.join(" ");
        tracing::warn!("ignoring unknown or unavailable capabilities: [{names}]");
    }
}

fn read_config(dir: &Path, path: &Path) -> Result<Vec<u8>, BundleError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => BundleError::NoConfig { path: dir.to_owned() },
        _ => BundleError::Unreadable { path: path.to_owned(), source },
    };
    let bytes = fs::metadata(path).map_err(unreadable)?.len();
    if bytes > CONFIG_BYTES_MAX {
        return Err(BundleError::TooLarge { path: path.to_owned(), bytes });
    }
    fs::read(path).map_err(unreadable)
}

/// The part of a container's resources that the guest enforces, as JSON.
///
/// # Errors
/// When they cannot be serialized.
pub fn resources_for_guest(resources: &LinuxResources) -> Result<Vec<u8>, BundleError> {
    let mut resources = resources.clone();
    resources::for_guest(&mut resources);
    serde_json::to_vec(&resources).map_err(BundleError::Rewrite)
}

/// The namespaces that a specification lists.
fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    let linux = spec.linux().as_ref();
    linux.and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default()
}

impl Bundle {
    /// Checks that the specification is supported; returns the namespaces of other containers of
    /// this root that it joins.
    ///
    /// # Errors
    /// Names the first thing that is not supported.
    pub fn check(&self, root: &Path) -> Result<Joined, BundleError> {
        let mut namespaces = namespaces(&self.spec).iter();
        // Most containers join no namespace; then other containers need not be listed.
        let neighbours = match namespaces.any(|entry| entry.path().is_some()) {
            true => Neighbours::of(root)?,
            false => Neighbours::default(),
        };
        let joined = refuse::check(&self.spec, &neighbours)?;
        let resources = self.resources();
        check_huge_pages(&resources)?;
        // A pod that is running may have enough for a further container.
        let needed = huge_pages(&resources);
        if needed > 0 && joined.pod().is_none() {
            Pool::of_the_host().check(needed)?;
        }
        Ok(joined)
    }

    /// Checks that no socket or FIFO of the host is bound into the container where the policy forbids
    /// it.
    ///
    /// # Errors
    /// Names the mount.
    pub fn check_sockets(&self, policy: SocketPolicy) -> Result<(), BundleError> {
        match policy.host {
            HostSocketRule::Allow => Ok(()),
            HostSocketRule::Refuse => Ok(host_sockets::check(&self.spec, &self.dir)?),
        }
    }

    /// Turns the specification into what the pod needs for the container.
    ///
    /// # Errors
    /// When the root file system, the source of a bind mount or a device cannot be used, or the
    /// specification is too large.
    pub fn plan(
        &self,
        id: &ContainerId,
        surroundings: &Surroundings,
    ) -> Result<ContainerPlan, BundleError> {
        let rootfs = self.rootfs()?;
        let guest = guest::rewrite(&self.spec, id, surroundings, &self.dir, &rootfs)?;
        let spec_json = serde_json::to_vec(&guest.spec).map_err(BundleError::Rewrite)?;
        if spec_json.len() > GUEST_BYTES_MAX {
            return Err(BundleError::TooLargeForGuest(spec_json.len()));
        }
        Ok(ContainerPlan {
            spec_json,
            bundle: self.dir.clone(),
            rootfs,
            shared: guest.shared,
            host_sockets: guest.host_sockets,
            users: Users::of(&self.spec),
            disks: disks::of(&self.spec, &self.dir)?,
            oom_score_adj: self.spec.process().as_ref().and_then(|it| it.oom_score_adj()),
            annotations: self.spec.annotations().clone().unwrap_or_default(),
            hooks: self.spec.hooks().clone().unwrap_or_default(),
            dropped: guest.dropped,
        })
    }

    /// The arguments of the container's program.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let process = self.spec.process().as_ref();
        process.and_then(|process| process.args().clone()).unwrap_or_default()
    }

    /// Whether the container's program gets a terminal.
    #[must_use]
    pub fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(Process::terminal) == Some(true)
    }

    /// The container's network namespace on the host.
    #[must_use]
    pub fn network(&self) -> Network {
        let mut namespaces = namespaces(&self.spec).iter();
        let entry = namespaces.find(|entry| entry.typ() == LinuxNamespaceType::Network);
        entry.and_then(|entry| entry.path().clone()).map_or(Network::New, Network::Join)
    }

    /// The file of the host that is mounted as the container's resolv.conf(5).
    #[must_use]
    pub fn resolv_conf(&self) -> Option<PathBuf> {
        let mounts = self.spec.mounts().iter().flatten();
        let mut mounts = mounts.filter(|it| it.destination() == Path::new("/etc/resolv.conf"));
        mounts.next_back()?.source().clone()
    }

    /// The path of the pod's cgroup on the host, if the specification has one.
    #[must_use]
    pub fn cgroups_path(&self) -> Option<&Path> {
        self.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref())
    }

    /// The container's limits.
    #[must_use]
    pub fn resources(&self) -> LinuxResources {
        let linux = self.spec.linux().as_ref();
        let mut resources = linux.and_then(|linux| linux.resources().clone()).unwrap_or_default();
        normalize(&mut resources);
        resources
    }

    /// Whether there are prestart or createRuntime hooks.
    #[must_use]
    pub fn has_early_hooks(&self) -> bool {
        self.spec.hooks().as_ref().is_some_and(|hooks| {
            let lists = [hooks.prestart(), hooks.create_runtime()];
            lists.into_iter().flatten().any(|list| !list.is_empty())
        })
    }

    fn rootfs(&self) -> Result<PathBuf, BundleError> {
        let path = self.spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        let path = self.dir.join(path);
        let missing = |source| BundleError::Source { what: "rootfs", path: path.clone(), source };
        let real = fs::canonicalize(&path).map_err(missing)?;
        if !real.is_dir() {
            return Err(missing(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        Ok(real)
    }
}

#[cfg(test)]
mod tests;
