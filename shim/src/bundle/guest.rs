//! Rewrites the specification for the guest: paths of the host become paths of the share.
//!
//! Only what has to change is changed; the agent and libcontainer implement the rest.

use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::{NOTIFY_DIR, NOTIFY_SOCKET, SHARE_DIR};
use oci_spec::runtime::{Linux, LinuxNamespaceType, Mount, Spec};

use super::id_map::{self, IdMap};
use super::read_only::{self, HostMounts};
use super::volumes;
use super::{
    Additions, BundleError, Surroundings, hook_programs, host_sockets, huge_pages, pod,
    read_only_root, refuse, resources,
};
use crate::state::id::ContainerId;

/// The directory of the sd_notify(3) socket in a container, as in runc.
const NOTIFY_MOUNT: &str = "/run/notify";

/// The type of a mount point in the share, which is made before the file is mounted on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// Anything else.
    File,
}

/// A file or directory of the host that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Its path on the host.
    pub source: PathBuf,
    /// Its path relative to the container's directory in the share.
    pub target: PathBuf,
    /// Its type.
    pub kind: FileKind,
    /// The host makes it read-only, whatever the guest does.
    pub read_only: bool,
    /// The host makes the mounts below it read-only too.
    pub read_only_below: bool,
    /// The mounts below it are shared too.
    pub recursive: bool,
    /// How its owners are mapped.
    pub id_map: Option<IdMap>,
    /// Mount points that are made in it before the guest sees it, if it is read-only. If that
    /// fails, it stays writable on the host, and only the guest makes it read-only.
    pub mount_points: Vec<(PathBuf, FileKind)>,
}

impl Shared {
    /// A writable file or directory, without mapped owners and without the mounts below it.
    #[must_use]
    pub const fn new(source: PathBuf, target: PathBuf, kind: FileKind) -> Self {
        Self {
            source,
            target,
            kind,
            read_only: false,
            read_only_below: false,
            recursive: false,
            id_map: None,
            mount_points: Vec::new(),
        }
    }
}

/// The specification for the guest and what it refers to.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) spec: Spec,
    pub(super) shared: Vec<Shared>,
    pub(super) host_sockets: Vec<Shared>,
    pub(super) dropped: Vec<&'static str>,
}

/// Rewrites a specification that has been checked.
pub(super) fn rewrite(
    spec: &Spec,
    id: &ContainerId,
    surroundings: &Surroundings,
    bundle: &Path,
    rootfs: &Path,
) -> Result<Guest, BundleError> {
    let mut spec = spec.clone();
    let in_guest = |target: &Path| Path::new(SHARE_DIR).join(&surroundings.directory).join(target);
    let root = Shared::new(rootfs.to_owned(), "rootfs".into(), FileKind::Directory);
    let mut shared = vec![Shared { recursive: true, ..root }];
    if let Some(root) = spec.root_mut() {
        root.set_path(in_guest(&shared[0].target));
    }
    let mut mounts = spec.mounts().clone();
    let mut host_mounts = HostMounts::default();
    let mut sockets = Vec::new();
    for mount in mounts.iter_mut().flatten() {
        if volumes::take_out(mount) {
            continue;
        }
        let id_map = id_map::of(mount, &spec)?;
        id_map::take_out(mount);
        if is_bind(mount) {
            let target = Path::new("mounts").join((shared.len() - 1).to_string());
            // A relative source is relative to the bundle, as in runc.
            let source = bundle.join(mount.source().clone().unwrap_or_default());
            let metadata = fs::metadata(&source).map_err(|error| unusable(&source, error))?;
            if huge_pages::replace_bind(mount, (&source, &metadata), &spec)? {
                continue;
            }
            if host_sockets::is_one(&metadata) {
                let path = host_sockets::in_guest(id, sockets.len());
                let entry = Shared::new(source, path.clone(), FileKind::File);
                sockets.push(Shared { id_map, ..entry });
                mount.set_source(Some(path));
                continue;
            }
            let entry = Shared { id_map, ..share(mount, source, &target, &metadata) };
            mount.set_source(Some(in_guest(&entry.target)));
            if entry.recursive {
                read_only::leave_to_host(mount, &entry.source, &mut host_mounts)
                    .map_err(|error| unusable(&entry.source, error))?;
            }
            shared.push(entry);
        }
    }
    spec.set_mounts(mounts);
    if let Some(hooks) = spec.hooks_mut() {
        let (own, programs) = hook_programs::of_guest(hooks, in_guest)?;
        *hooks = own;
        shared.extend(programs);
    }
    if !has_hooks(&spec) {
        // Only hooks get the annotations, in which callers may store any amount of data.
        spec.set_annotations(None);
    }
    add(&mut spec, id, &surroundings.additions);
    if read_only_root::is_hosts_to_keep(&spec) {
        // What stands for a socket has its path in the guest already.
        let kinds = shared.iter().chain(&sockets);
        let kinds = kinds.map(|it| (in_guest(&it.target), it.kind)).collect();
        shared[0].mount_points = read_only_root::mount_points(&spec, &kinds);
        shared[0].read_only = true;
    }
    let dropped = adapt(&mut spec, id, surroundings);
    Ok(Guest { spec, shared, host_sockets: sockets, dropped })
}

/// Adds what the creator adds to the bundle.
fn add(spec: &mut Spec, id: &ContainerId, additions: &Additions) {
    let mut environment = additions.environment.clone();
    if additions.notify {
        let path = Path::new(NOTIFY_MOUNT).join(NOTIFY_SOCKET);
        environment.push(format!("NOTIFY_SOCKET={}", path.display()));
        let mut mount = Mount::default();
        mount
            .set_destination(NOTIFY_MOUNT.into())
            .set_source(Some(Path::new(NOTIFY_DIR).join(id.as_str())))
            .set_typ(Some("bind".to_owned()))
            .set_options(Some(
                ["bind", "nosuid", "noexec", "nodev", "ro"].map(str::to_owned).into(),
            ));
        spec.set_mounts(Some(spec.mounts().iter().flatten().cloned().chain([mount]).collect()));
    }
    if let Some(process) = spec.process_mut() {
        let own = process.env().clone().unwrap_or_default();
        process.set_env(Some(own.into_iter().chain(environment).collect()));
    }
}

/// Whether hooks run in the guest.
fn has_hooks(spec: &Spec) -> bool {
    spec.hooks().as_ref().is_some_and(|hooks| {
        let lists = [hooks.create_container(), hooks.start_container()];
        lists.into_iter().flatten().any(|list| !list.is_empty())
    })
}

pub(super) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has_option(mount, &["bind", "rbind"])
}

/// The options of a bind mount that a mount of any other type can have too.
pub(super) fn options_of_any_type(mount: &Mount) -> impl Iterator<Item = String> + use<> {
    const OF_BINDS: [&str; 10] = [
        "bind",
        "rbind",
        "private",
        "rprivate",
        "shared",
        "rshared",
        "slave",
        "rslave",
        "unbindable",
        "runbindable",
    ];
    let options = mount.options().clone().unwrap_or_default();
    options.into_iter().filter(|option| !OF_BINDS.contains(&option.as_str()))
}

pub(super) fn has_option(mount: &Mount, names: &[&str]) -> bool {
    mount.options().iter().flatten().any(|option| names.contains(&option.as_str()))
}

/// The shared file or directory for a bind mount of `source`.
fn share(mount: &Mount, source: PathBuf, target: &Path, metadata: &Metadata) -> Shared {
    let read_only = read_only::of(mount);
    let (kind, target) = if metadata.is_dir() {
        (FileKind::Directory, target.to_owned())
    } else {
        (FileKind::File, target.iter().chain(&last_names(&source)).collect())
    };
    Shared {
        read_only: read_only.itself,
        read_only_below: read_only.below,
        recursive: has_option(mount, &["rbind"]),
        ..Shared::new(source, target, kind)
    }
}

/// The last names of a file's path, which end its path in the share too, and so its line in
/// `/proc/self/mountinfo`: there programs look for the id of their container or pod, as in
/// `/var/lib/docker/containers/ID/hostname`. A file without a path (`/proc/self/fd/3`) has none.
fn last_names(file: &Path) -> PathBuf {
    const NAMES: usize = 4;
    let path = fs::canonicalize(file).unwrap_or_default();
    let names: Vec<_> = path.iter().skip(1).collect();
    names.iter().skip(names.len().saturating_sub(NAMES)).collect()
}

fn unusable(source: &Path, error: io::Error) -> BundleError {
    BundleError::Source { what: "source of a bind mount", path: source.to_owned(), source: error }
}

/// Removes what belongs to the host; returns the names of fields that a caller may miss.
fn adapt(spec: &mut Spec, id: &ContainerId, surroundings: &Surroundings) -> Vec<&'static str> {
    let mut dropped = Vec::new();
    if let Some(process) = spec.process_mut() {
        let profile = process.apparmor_profile().as_ref().is_some_and(|name| !name.is_empty());
        note(&mut dropped, profile, "process.apparmorProfile");
        process.set_apparmor_profile(None);
        let label = process.selinux_label().as_ref().is_some_and(|name| !name.is_empty());
        note(&mut dropped, label, "process.selinuxLabel");
        process.set_selinux_label(None);
        surroundings.limits.fill(process);
    }
    if let Some(linux) = spec.linux_mut() {
        if surroundings.brings_up_the_pod
            && let Some(settings) = linux.sysctl_mut()
        {
            // The pod has set them already.
            settings.retain(|name, _| !pod::is_of_the_pod(name));
        }
        drop_host_devices(linux, &mut dropped);
        adapt_linux(linux, id, surroundings, &mut dropped);
    }
    dropped
}

/// Leaves out devices of the host that the guest does not have.
fn drop_host_devices(linux: &mut Linux, dropped: &mut Vec<&'static str>) {
    // Otherwise each device was asked for, and `refuse` has refused those that are not supported.
    if !refuse::every_device_allowed(linux) {
        return;
    }
    let Some(devices) = linux.devices_mut() else { return };
    let listed = devices.len();
    devices.retain(|device| refuse::guest_makes(device) || refuse::guest_has(device).is_ok());
    note(dropped, devices.len() < listed, "linux.devices of the host");
}

fn adapt_linux(
    linux: &mut Linux,
    id: &ContainerId,
    surroundings: &Surroundings,
    dropped: &mut Vec<&'static str>,
) {
    let mut namespaces = linux.namespaces_mut().take().unwrap_or_default();
    // The containers use the machine's own network namespace.
    namespaces.retain(|entry| entry.typ() != LinuxNamespaceType::Network);
    for entry in &mut namespaces {
        let joined = surroundings.namespaces.iter().find(|(kind, _)| *kind == entry.typ());
        entry.set_path(joined.map(|(_, path)| path.clone()));
    }
    linux.set_namespaces(Some(namespaces));
    linux.set_cgroups_path(Some(Path::new("/").join(id.as_str())));
    let label = linux.mount_label().as_ref().is_some_and(|label| !label.is_empty());
    note(dropped, label, "linux.mountLabel");
    linux.set_mount_label(None);
    if let Some(resources) = linux.resources_mut() {
        resources::normalize(resources);
        resources::for_guest(resources);
    }
}

fn note(dropped: &mut Vec<&'static str>, present: bool, name: &'static str) {
    if present {
        dropped.push(name);
    }
}
