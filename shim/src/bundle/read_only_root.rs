//! A read-only root (`root.readonly`) that the host enforces too: even a compromised guest cannot
//! write to it.
//!
//! Only the host can then make mount points in it, before the guest sees it. If anything else has
//! to be written in it before the container's program runs, only the guest makes it read-only.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use super::{FileKind, id_map};

/// Whether the root is read-only, and nothing in the guest has to write to it first.
pub(super) fn is_hosts_to_keep(spec: &Spec) -> bool {
    let root = spec.root().as_ref();
    root.is_some_and(|root| root.readonly() == Some(true)) && !is_written_to(spec)
}

/// What the host makes in such a root, in this order: mount points, then the working directory.
/// `kinds` has the types of bind mounts by their source in the guest; all other mounts are mounted
/// on directories.
pub(super) fn mount_points(
    spec: &Spec,
    kinds: &HashMap<PathBuf, FileKind>,
) -> Vec<(PathBuf, FileKind)> {
    let mounts = spec.mounts().iter().flatten().map(|mount| {
        let kind = mount.source().as_ref().and_then(|source| kinds.get(source));
        (mount.destination().clone(), kind.copied().unwrap_or(FileKind::Directory))
    });
    let cwd = spec.process().iter().map(|process| (process.cwd().clone(), FileKind::Directory));
    mounts.chain(cwd).collect()
}

/// Whether the guest writes to the root before the container's program runs: device nodes, hooks,
/// and mount points whose owner is not the host's root.
fn is_written_to(spec: &Spec) -> bool {
    let mut mounts = spec.mounts().iter().flatten();
    let linux = spec.linux().as_ref();
    let mut devices = linux.and_then(|linux| linux.devices().as_ref()).into_iter().flatten();
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.create_container().as_ref());
    !mounts.any(|mount| mount.destination() == Path::new("/dev"))
        || devices.any(|device| !device.path().starts_with("/dev"))
        || id_map::has_user_namespace(spec)
        || hooks.is_some_and(|hooks| !hooks.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn found(change: impl Fn(&mut Value)) -> Option<Vec<(PathBuf, FileKind)>> {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/r", "readonly": true},
            "process": {"args": ["x"], "cwd": "/srv", "user": {"uid": 0, "gid": 0}},
            "mounts": [
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/share/1"}
            ],
            "linux": {"namespaces": [{"type": "mount"}]}
        });
        change(&mut spec);
        let spec = serde_json::from_value(spec).unwrap();
        let kinds = HashMap::from([("/share/1".into(), FileKind::File)]);
        is_hosts_to_keep(&spec).then(|| mount_points(&spec, &kinds))
    }

    #[test]
    fn mount_points_and_the_working_directory_are_made_by_the_host() {
        let expected = [
            ("/dev", FileKind::Directory),
            ("/etc/hosts", FileKind::File),
            ("/srv", FileKind::Directory),
        ];
        let expected = expected.map(|(path, kind)| (PathBuf::from(path), kind));
        assert_eq!(found(|_| {}).as_deref(), Some(&expected[..]));
    }

    #[test]
    fn a_root_that_the_guest_writes_to_is_left_to_it() {
        assert_eq!(found(|spec| spec["root"]["readonly"] = json!(false)), None);
        assert_eq!(found(|spec| spec["mounts"] = json!([])), None);
        let device = json!([{"path": "/null", "type": "c", "major": 1, "minor": 3}]);
        assert_eq!(found(|spec| spec["linux"]["devices"] = device.clone()), None);
        let user = json!([{"type": "mount"}, {"type": "user"}]);
        assert_eq!(found(|spec| spec["linux"]["namespaces"] = user.clone()), None);
        let hooks = json!({"createContainer": [{"path": "/bin/true"}]});
        assert_eq!(found(|spec| spec["hooks"] = hooks.clone()), None);
    }
}
