//! Volumes that are disks: a mount of type `ext4`, `xfs` and so on, whose source is a block device
//! or an image on the host. The guest mounts it, so the host's kernel does not read a file system
//! that a guest has written.
//!
//! Callers that know only bind mounts name the type in an annotation: [`ANNOTATION`].

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use oci_spec::runtime::{Mount, Spec};

use super::disks::{Disk, FileSystem};
use super::guest::is_bind;
use super::refuse::{Refusal, refuse};
use super::{BundleError, guest, read_only};

/// The annotation that makes bind mounts disks: `DESTINATION=TYPE` or `DESTINATION=TYPE,makefs`,
/// several with spaces between them.
const ANNOTATION: &str = "bulkhead.disks";
/// The option of a mount that lets an empty disk get a file system first. mount(8) leaves options
/// that begin so to others.
const MAKE: &str = "x-bulkhead.makefs";
/// The file systems that can be on a disk: those of the guest's kernel.
const KINDS: [&str; 10] =
    ["ext4", "xfs", "btrfs", "ext3", "ext2", "vfat", "exfat", "squashfs", "erofs", "iso9660"];
/// Those that can be made on an empty disk.
const MADE: [&str; 3] = ["ext4", "xfs", "btrfs"];

/// Makes the bind mounts that the annotation names mounts of disks.
///
/// # Errors
/// The annotation names no mount, or no file system.
pub(super) fn apply_annotation(spec: &mut Spec) -> Result<(), Refusal> {
    let annotations = spec.annotations().as_ref();
    let value = annotations.and_then(|all| all.get(ANNOTATION)).cloned().unwrap_or_default();
    for entry in value.split_whitespace() {
        let wrong = |what: &str| {
            let what = format!("annotation {ANNOTATION} has {entry:?}: {what}");
            refuse(what, "write DESTINATION=TYPE, as in /var/lib/postgresql=ext4,makefs")
        };
        let (destination, kind) = entry.split_once('=').ok_or_else(|| wrong("no type"))?;
        let (kind, make) = match kind.split_once(',') {
            None => (kind, false),
            Some((kind, "makefs")) => (kind, true),
            Some(_) => return Err(wrong("makefs is the only option")),
        };
        if !KINDS.contains(&kind) {
            return Err(wrong(&format!("the type is none of {}", KINDS.join(", "))));
        }
        let mut mounts = spec.mounts_mut().iter_mut().flatten();
        let named = |mount: &&mut Mount| mount.destination() == Path::new(destination);
        let mount = mounts.find(named).ok_or_else(|| wrong("nothing is mounted there"))?;
        if !is_bind(mount) {
            return Err(wrong("the mount there is no bind mount"));
        }
        make_disk(mount, kind, make);
    }
    Ok(())
}

/// Makes a bind mount one of a disk, with the same options.
fn make_disk(mount: &mut Mount, kind: &str, make: bool) {
    let kept = guest::options_of_any_type(mount);
    let options = kept.chain(make.then(|| MAKE.to_owned())).collect();
    mount.set_typ(Some(kind.to_owned())).set_options(Some(options));
}

/// The file system that a mount expects on a disk of the host.
fn expected(mount: &Mount) -> Option<FileSystem> {
    let named = |kind: &&&str| mount.typ().as_deref() == Some(**kind);
    let kind = KINDS.iter().find(named).filter(|_| !is_bind(mount))?;
    Some(FileSystem { kind, make: guest::has_option(mount, &[MAKE]) })
}

/// Checks what can be checked without the host; returns how many disks are mounted.
///
/// # Errors
/// A file system that cannot be made is to be made.
pub(super) fn check(spec: &Spec) -> Result<usize, Refusal> {
    let mut count = 0;
    for mount in spec.mounts().iter().flatten() {
        let Some(file_system) = expected(mount) else { continue };
        count += 1;
        if file_system.make && !MADE.contains(&file_system.kind) {
            return Err(refuse(
                format!(
                    "mount {} would make a file system of type {}",
                    mount.destination().display(),
                    file_system.kind
                ),
                "choose ext4, xfs or btrfs, or make it yourself",
            ));
        }
    }
    Ok(count)
}

/// The disks that a specification mounts. A relative source is relative to the bundle.
///
/// # Errors
/// A source does not exist, or is neither a file nor a block device.
pub(super) fn of(spec: &Spec, bundle: &Path) -> Result<Vec<Disk>, BundleError> {
    let mounts = spec.mounts().iter().flatten();
    let disks = mounts.filter_map(|mount| Some((mount, expected(mount)?)));
    disks
        .map(|(mount, file_system)| {
            let source = bundle.join(mount.source().clone().unwrap_or_default());
            let what = "source of a disk";
            let unusable =
                |error| BundleError::Source { what, path: source.clone(), source: error };
            let kind = fs::metadata(&source).map_err(unusable)?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                let error = io::Error::other("it is neither a file nor a block device");
                return Err(unusable(error));
            }
            let read_only = read_only::of(mount).itself;
            let path = mount.destination().clone();
            Ok(Disk { path, source, read_only, file_system: Some(file_system) })
        })
        .collect()
}

/// Takes out of a mount what is not for the guest; returns whether the mount is one of a disk.
pub(super) fn take_out(mount: &mut Mount) -> bool {
    if expected(mount).is_none() {
        return false;
    }
    let options = mount.options().clone().unwrap_or_default();
    mount.set_options(Some(options.into_iter().filter(|option| option != MAKE).collect()));
    mount.set_source(None);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(mounts: Value, annotation: &str) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2", "mounts": mounts, "annotations": {"bulkhead.disks": annotation},
        }))
        .unwrap()
    }

    #[test]
    fn an_annotation_makes_a_bind_mount_a_disk() {
        let bind = json!({"destination": "/d", "type": "bind", "source": "/image",
            "options": ["rbind", "rprivate", "ro", "noatime"]});
        let mut annotated = spec(json!([bind]), " /d=ext4,makefs ");
        apply_annotation(&mut annotated).unwrap();
        let mount = serde_json::to_value(&annotated).unwrap()["mounts"][0].take();
        let options = json!(["ro", "noatime", "x-bulkhead.makefs"]);
        assert_eq!((&mount["type"], &mount["options"]), (&json!("ext4"), &options));
        for (wrong, why) in [
            ("/d", "no type"),
            ("/d=nfs", "none of ext4, xfs"),
            ("/d=ext4,format", "only option"),
            ("/e=ext4", "nothing is mounted there"),
        ] {
            let mut annotated = spec(json!([bind]), wrong);
            let error = apply_annotation(&mut annotated).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(wrong), "{error}");
        }
        let tmpfs = json!({"destination": "/d", "type": "tmpfs", "source": "tmpfs"});
        let error = apply_annotation(&mut spec(json!([tmpfs]), "/d=ext4")).unwrap_err();
        assert!(error.to_string().contains("no bind mount"), "{error}");
    }

    #[test]
    fn the_guest_gets_no_source_and_no_option_of_ours() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("image"), "").unwrap();
        let disk = json!({"destination": "/d", "type": "xfs", "source": "image",
            "options": ["ro", "x-bulkhead.makefs", "nouuid"]});
        let tmpfs = json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs"});
        let mut spec = spec(json!([tmpfs, disk]), "");
        let disks = of(&spec, directory.path()).unwrap();
        let file_system = Some(FileSystem { kind: "xfs", make: true });
        let source = directory.path().join("image");
        assert_eq!(disks, [Disk { path: "/d".into(), source, read_only: true, file_system }]);
        assert_eq!(check(&spec).unwrap(), 1);
        let taken: Vec<_> = spec.mounts_mut().iter_mut().flatten().map(take_out).collect();
        assert_eq!(taken, [false, true]);
        let mount = serde_json::to_value(&spec).unwrap()["mounts"][1].take();
        assert_eq!((&mount["source"], &mount["options"]), (&Value::Null, &json!(["ro", "nouuid"])));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let disk = |kind: &str, source: &str| {
            json!([{"destination": "/d", "type": kind, "source": source,
                "options": ["x-bulkhead.makefs"]}])
        };
        let error = check(&spec(disk("vfat", "i"), "")).unwrap_err().to_string();
        assert!(error.contains("type vfat") && error.contains("ext4, xfs or btrfs"), "{error}");
        let of = |source: &str| {
            let error = of(&spec(disk("ext4", source), ""), directory.path()).unwrap_err();
            format!("{error}: {}", std::error::Error::source(&error).unwrap())
        };
        assert!(of("missing").contains("source of a disk"), "{}", of("missing"));
        assert!(of("/").contains("neither a file nor a block device"), "{}", of("/"));
    }
}
