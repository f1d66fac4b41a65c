//! What the agent checks and changes in an OCI runtime specification before libcontainer gets it.
//!
//! The specification is the host's and is otherwise passed on as it is: what libcontainer checks is
//! not checked here.

use std::fs::File;
use std::io::Read as _;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    Hooks, LinuxNamespaceType, PosixRlimitBuilder, PosixRlimitType, Process, Spec,
};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::cgroup::Cgroup;
use crate::confinement::Restrictions;
use crate::device_rules::{self, DeviceRuleError};
use crate::disks::BoundDisk;
use crate::mount_options;
use crate::sysctl::{Setting, SettingError};

/// What the names of settings begin with that IPC, UTS and user namespaces have (namespaces(7)).
const NAMESPACED: [&str; 7] = [
    "fs.mqueue.",
    "kernel.domainname",
    "kernel.hostname",
    "kernel.msg",
    "kernel.sem",
    "kernel.shm",
    "user.",
];
/// The most of the container's user table that is read.
const PASSWD_BYTES: u64 = 1 << 20;

/// A specification that is not valid, or cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("container id {0:?} is not made of 1 to 255 letters, digits, and characters of _+,-.")]
    Id(String),
    #[error("specification is not valid")]
    Json(#[from] serde_json::Error),
    #[error("specification has no {0}")]
    Missing(&'static str),
    #[error("root.path {0:?} is not absolute")]
    RelativeRoot(PathBuf),
    #[error("process.terminal and the stream of a terminal go together")]
    Terminal,
    #[error("process.execCPUAffinity is not supported: it numbers the processors of the host")]
    Affinity,
    #[error(transparent)]
    DeviceRule(#[from] DeviceRuleError),
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error("hooks.{0} run on the host, not in the guest")]
    HostHooks(&'static str),
}

/// A specification as libcontainer gets it.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) spec: Spec,
    /// What is taken out before libcontainer gets the specification.
    pub(crate) restrictions: Restrictions,
    /// The user that owns the standard streams, as the guest numbers it.
    pub(crate) stream_owner: u32,
    /// Settings that no namespace of the container has.
    pub(crate) machine_settings: Vec<Setting>,
    /// Its disks.
    pub(crate) disks: Vec<BoundDisk>,
}

/// Checks an id, which becomes the name of a file and of a cgroup.
///
/// # Errors
/// It is empty, too long, or has characters that other runtimes refuse too.
pub(crate) fn check_id(container_id: &str) -> Result<(), SpecError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+,-.".contains(&byte);
    let named = !matches!(container_id, "" | "." | "..") && container_id.len() <= 255;
    if named && container_id.bytes().all(allowed) {
        return Ok(());
    }
    Err(SpecError::Id(container_id.chars().take(80).collect()))
}

/// Parses and checks a specification, and fits it to the guest: its cgroup is `/<id>`, `HOME` is in
/// its environment, its working directory exists.
///
/// # Errors
/// See [`SpecError`].
pub(crate) fn prepare(
    container_id: &str,
    json: &[u8],
    terminal: bool,
    disks: Vec<BoundDisk>,
) -> Result<Prepared, SpecError> {
    let mut spec: Spec = serde_json::from_slice(json)?;
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?.path().clone();
    if !root.is_absolute() {
        return Err(SpecError::RelativeRoot(root));
    }
    if let Some(hooks) = spec.hooks() {
        refuse_host_hooks(hooks)?;
    }
    let linux = spec.linux_mut().as_mut().ok_or(SpecError::Missing("linux"))?;
    linux.set_cgroups_path(Some(Cgroup::path(container_id)));
    let propagation = linux.rootfs_propagation().as_deref().map(plain_propagation);
    linux.set_rootfs_propagation(propagation.map(str::to_owned));
    for disk in disks.iter().filter(|disk| !disk.mounted) {
        disk.renumber(linux);
    }
    // Without any, libcontainer would set no rules at all, and every device could be used.
    let mut resources = linux.resources().clone().unwrap_or_default();
    let rules = device_rules::settle(resources.devices().as_deref().unwrap_or_default())?;
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    name_sources(&mut spec);
    mount_options::fit(&mut spec, &root);
    let machine_settings = take_machine_settings(&mut spec)?;
    if has_new(&spec, LinuxNamespaceType::User) && !has_new_network(&spec) {
        share_sysfs(&mut spec);
    }
    let process = spec.process_mut().as_mut().ok_or(SpecError::Missing("process"))?;
    fit_process(process, &root, terminal)?;
    make_directories(&root, process.cwd());
    let uid = process.user().uid();
    let stream_owner = in_guest(uid, &spec);
    let restrictions = Restrictions::take(&mut spec);
    Ok(Prepared { spec, restrictions, stream_owner, machine_settings, disks })
}

/// A process as a container gets it, and the user that owns its standard streams.
#[derive(Debug)]
pub(crate) struct PreparedProcess {
    pub(crate) process: Process,
    pub(crate) restrictions: Restrictions,
    pub(crate) stream_owner: u32,
}

/// Parses and checks a further process of the container that was made from `spec`, and gives it the
/// container's capabilities, filter and resource limits where it has none of its own.
///
/// # Errors
/// See [`SpecError`].
pub(crate) fn prepare_process(
    (spec, restrictions): (&Spec, &Restrictions),
    json: &[u8],
    terminal: bool,
) -> Result<PreparedProcess, SpecError> {
    let mut process: Process = serde_json::from_slice(json)?;
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?.path().clone();
    let of_container = spec.process().as_ref().ok_or(SpecError::Missing("process"))?;
    if process.rlimits().is_none() {
        process.set_rlimits(of_container.rlimits().clone());
    }
    fit_process(&mut process, &root, terminal)?;
    let stream_owner = in_guest(process.user().uid(), spec);
    let restrictions = restrictions.take_further(&mut process);
    Ok(PreparedProcess { process, restrictions, stream_owner })
}

/// How the guest numbers a user of the container.
fn in_guest(uid: u32, spec: &Spec) -> u32 {
    let linux = spec.linux().as_ref();
    let mappings = linux.and_then(|linux| linux.uid_mappings().as_deref()).unwrap_or_default();
    let mapping = mappings.iter().find(|mapping| {
        uid.checked_sub(mapping.container_id()).is_some_and(|offset| offset < mapping.size())
    });
    mapping.map_or(uid, |mapping| mapping.host_id() + (uid - mapping.container_id()))
}

/// Whether the container gets a network of its own, which then has only a loopback.
pub(crate) fn has_new_network(spec: &Spec) -> bool {
    has_new(spec, LinuxNamespaceType::Network)
}

fn has_new(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
    let mut namespaces = namespaces.unwrap_or_default().iter();
    namespaces.any(|namespace| namespace.typ() == kind && namespace.path().is_none())
}

/// Takes out the settings that no namespace of the container has, which libcontainer refuses: those
/// of the network, unless the container has one of its own, and those that Linux has only once. The
/// machine has no other user, so that a container may have them as it likes.
fn take_machine_settings(spec: &mut Spec) -> Result<Vec<Setting>, SettingError> {
    let own_network = has_new_network(spec);
    let linux = spec.linux_mut().as_mut();
    let Some(settings) = linux.and_then(|linux| linux.sysctl_mut().as_mut()) else {
        return Ok(Vec::new());
    };
    let is_the_machines = |name: &str| match name {
        _ if name.starts_with("net.") => !own_network,
        _ => !NAMESPACED.iter().any(|prefix| name.starts_with(prefix)),
    };
    let taken = settings.extract_if(|name, _| is_the_machines(name));
    taken.map(|(name, value)| Setting::of_the_machine(&name, value)).collect()
}

/// The root's propagation by the name that libcontainer knows. Nothing is mounted below the root
/// yet, so that the recursive names, which runc also has, mean the same.
fn plain_propagation(name: &str) -> &str {
    match name {
        "rshared" => "shared",
        "rslave" => "slave",
        "rprivate" => "private",
        "runbindable" => "unbindable",
        other => other,
    }
}

/// Gives mounts without a source an empty one, as runc does; libcontainer wants one.
fn name_sources(spec: &mut Spec) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if mount.source().is_none() {
            mount.set_source(Some(PathBuf::new()));
        }
    }
}

/// Gives a container in a user namespace the guest's own sysfs: the kernel allows a new mount only
/// to the owner of the network that it shows, and that is the machine's.
fn share_sysfs(spec: &mut Spec) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if mount.typ().as_deref() != Some("sysfs") {
            continue;
        }
        let mut options = mount.options().clone().unwrap_or_default();
        // The flags that the guest's sysfs has cannot be removed either.
        options.extend(["rbind", "nosuid", "nodev", "noexec"].map(str::to_owned));
        mount.set_typ(Some("bind".to_owned()));
        mount.set_source(Some("/sys".into()));
        mount.set_options(Some(options));
    }
}

fn refuse_host_hooks(hooks: &Hooks) -> Result<(), SpecError> {
    let kinds = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, hooks) in kinds {
        if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
            return Err(SpecError::HostHooks(name));
        }
    }
    Ok(())
}

fn fit_process(process: &mut Process, root: &Path, terminal: bool) -> Result<(), SpecError> {
    if process.terminal().unwrap_or(false) != terminal {
        return Err(SpecError::Terminal);
    }
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::Missing("process.args"));
    }
    if process.exec_cpu_affinity().is_some() {
        return Err(SpecError::Affinity);
    }
    let mut environment = process.env().clone().unwrap_or_default();
    keep_locked_memory_limit(process)?;
    // If HOME is set, libcontainer does not ask the C library, which cannot look into a container.
    if !environment.iter().any(|entry| entry.len() > 5 && entry.starts_with("HOME=")) {
        let home = home(root, process.user().uid()).unwrap_or_else(|| "/".to_owned());
        environment.push(format!("HOME={home}"));
        process.set_env(Some(environment));
    }
    Ok(())
}

/// Libcontainer lifts the limit of locked memory to load the device filter, and does not lower it
/// again unless the specification has one.
fn keep_locked_memory_limit(process: &mut Process) -> Result<(), SpecError> {
    let mut limits = process.rlimits().clone().unwrap_or_default();
    if limits.iter().any(|limit| limit.typ() == PosixRlimitType::RlimitMemlock) {
        return Ok(());
    }
    let own = getrlimit(Resource::Memlock);
    let limit = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitMemlock)
        .soft(own.current.unwrap_or(u64::MAX))
        .hard(own.maximum.unwrap_or(u64::MAX))
        .build()
        .map_err(|_| SpecError::Missing("limit of locked memory"))?;
    limits.push(limit);
    process.set_rlimits(Some(limits));
    Ok(())
}

/// Makes the working directory if it does not exist, as runc does and libcontainer does not. A
/// directory that cannot be made (it is below a mount, or the root is read-only) is left to the
/// container's creation.
fn make_directories(root: &Path, directory: &Path) {
    let Ok(root) = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) else {
        return;
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |path: &Path| openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let Ok(mut parent) = open(Path::new("/")) else { return };
    let mut path = PathBuf::from("/");
    for component in directory.components() {
        let Component::Normal(name) = component else { continue };
        path.push(name);
        parent = match open(&path) {
            Err(Errno::NOENT) => {
                if mkdirat(&parent, name, Mode::from_raw_mode(0o755)).is_err() {
                    return;
                }
                let Ok(made) = open(&path) else { return };
                made
            }
            Ok(found) => found,
            Err(_) => return,
        };
    }
}

/// A user's home directory by the container's own user table.
fn home(root: &Path, uid: u32) -> Option<String> {
    let root = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).ok()?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let table = openat2(&root, "etc/passwd", flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    let mut text = String::new();
    File::from(table).take(PASSWD_BYTES).read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let number: u32 = fields.nth(2)?.parse().ok()?;
        let home = fields.nth(2)?;
        (number == uid && home.starts_with('/')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests;
