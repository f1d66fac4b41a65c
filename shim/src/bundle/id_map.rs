//! Idmapped mounts: OCI runtime-spec `mounts[].uidMappings` and the options `idmap` and `ridmap`.
//!
//! The file server's clone of the mount has the mapping, so the guest sees mapped owners: a file of
//! `containerID` on disk belongs to `hostID` in the guest, as on the host with runc. If the
//! container has a user namespace, the guest's kernel maps these owners into it.

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};

use super::guest::is_bind;
use super::namespaces;
use super::refuse::{Refusal, refuse};

/// The option that maps only the mount itself, and the one that also maps the mounts below it.
const OPTIONS: [&str; 2] = ["idmap", "ridmap"];

/// How the owners of a mount's files are mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// The mappings of users.
    pub uids: Vec<LinuxIdMapping>,
    /// The mappings of groups.
    pub gids: Vec<LinuxIdMapping>,
    /// Whether the mounts below this one are mapped too.
    pub recursive: bool,
}

/// The mapping that a mount asks for, if any.
///
/// # Errors
/// When the mapping is not supported or not complete.
pub(super) fn of(mount: &Mount, spec: &Spec) -> Result<Option<IdMap>, Refusal> {
    let name = || mount.destination().display();
    let options = mount.options().iter().flatten();
    if let Some(option) = options.clone().find(|option| is_foreign(option)) {
        let what = format!("the mount at {} has the option {option:?}", name());
        return Err(refuse(what, "give it uidMappings and gidMappings instead"));
    }
    let option = options.rev().find(|option| OPTIONS.contains(&option.as_str()));
    let list = |of: &Option<Vec<LinuxIdMapping>>| of.clone().unwrap_or_default();
    let (mut uids, mut gids) = (list(mount.uid_mappings()), list(mount.gid_mappings()));
    let own = !(uids.is_empty() && gids.is_empty());
    if option.is_none() && !own {
        return Ok(None);
    }
    if !is_bind(mount) {
        let what = format!("the mount at {} maps owners, but is not a bind mount", name());
        return Err(refuse(what, "leave the mapping out, or bind a directory"));
    }
    if !own && has_user_namespace(spec) {
        let linux = spec.linux().as_ref();
        uids = linux.map(|linux| list(linux.uid_mappings())).unwrap_or_default();
        gids = linux.map(|linux| list(linux.gid_mappings())).unwrap_or_default();
    }
    if uids.is_empty() || gids.is_empty() {
        let what = format!(
            "the mount at {} maps owners without mappings for both users and groups",
            name()
        );
        return Err(refuse(
            what,
            "give it uidMappings and gidMappings, or the container a user namespace with both",
        ));
    }
    let recursive = option.is_some_and(|option| option == "ridmap");
    Ok(Some(IdMap { uids, gids, recursive }))
}

/// Removes the mapping from the mount, so that the guest does not apply it a second time.
pub(super) fn take_out(mount: &mut Mount) {
    mount.set_uid_mappings(None).set_gid_mappings(None);
    if let Some(options) = mount.options_mut() {
        options.retain(|option| !OPTIONS.contains(&option.as_str()));
    }
}

/// Whether an option has mappings in itself: a form that crun accepts, but no specification has.
fn is_foreign(option: &str) -> bool {
    option.split_once('=').is_some_and(|(name, _)| OPTIONS.contains(&name))
}

pub(super) fn has_user_namespace(spec: &Spec) -> bool {
    namespaces(spec).iter().any(|entry| entry.typ() == LinuxNamespaceType::User)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn asked(mount: Value, user_namespace: bool) -> Result<Option<IdMap>, String> {
        let mut linux = json!({"namespaces": [{"type": "pid"}]});
        if user_namespace {
            linux = json!({
                "namespaces": [{"type": "user"}],
                "uidMappings": [{"containerID": 0, "hostID": 7, "size": 1}],
                "gidMappings": [{"containerID": 0, "hostID": 8, "size": 1}],
            });
        }
        let spec = json!({"ociVersion": "1.0.2", "linux": linux});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let mut bind = json!({"destination": "/m", "type": "bind", "source": "/"});
        bind.as_object_mut().unwrap().extend(mount.as_object().unwrap().clone());
        of(&serde_json::from_value(bind).unwrap(), &spec).map_err(|error| error.to_string())
    }

    fn map(host: u32) -> Value {
        json!([{"containerID": 0, "hostID": host, "size": 1}])
    }

    #[test]
    fn a_mount_has_its_own_mapping_or_the_containers() {
        assert_eq!(asked(json!({"options": ["rbind", "ro"]}), true), Ok(None));
        let own = json!({"uidMappings": map(1), "gidMappings": map(2), "options": ["ridmap"]});
        let own = asked(own, true).unwrap().unwrap();
        assert_eq!((own.uids[0].host_id(), own.gids[0].host_id(), own.recursive), (1, 2, true));
        let inherited = asked(json!({"options": ["ridmap", "idmap"]}), true).unwrap().unwrap();
        assert_eq!(
            (inherited.uids[0].host_id(), inherited.gids[0].host_id(), inherited.recursive),
            (7, 8, false)
        );
        // Mappings without an option are valid, and not recursive.
        let plain = asked(json!({"uidMappings": map(1), "gidMappings": map(2)}), false).unwrap();
        assert!(!plain.unwrap().recursive);
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        for (mount, words) in [
            (json!({"options": ["idmap"]}), "without mappings for both"),
            (json!({"uidMappings": map(1)}), "without mappings for both"),
            (json!({"type": "tmpfs", "options": ["idmap"]}), "is not a bind mount"),
            (json!({"options": ["idmap=uids=0-1-2"]}), "the option \"idmap=uids=0-1-2\""),
        ] {
            let error = asked(mount.clone(), false).unwrap_err();
            assert!(error.starts_with("the mount at /m ") && error.contains(words), "{error}");
        }
    }

    #[test]
    fn the_guest_has_nothing_of_it_left_to_do() {
        let mut mount: Mount = serde_json::from_value(json!({
            "destination": "/m", "type": "bind", "source": "/", "uidMappings": map(1),
            "gidMappings": map(1), "options": ["rbind", "ridmap", "ro"],
        }))
        .unwrap();
        take_out(&mut mount);
        let left = serde_json::to_value(&mount).unwrap();
        assert_eq!(left["options"], json!(["rbind", "ro"]));
        assert!(left.get("uidMappings").is_none() && left.get("gidMappings").is_none());
    }
}
