//! Propagation of a container's mounts, mount_namespaces(7), which libcontainer takes for flags of
//! a mount and does not apply.
//!
//! It is applied when the container is created and not yet started. The mounts are handled in the
//! order in which they were made, as if each had got its propagation before the next was made.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use oci_spec::runtime::{Mount, Spec};
use rustix::mount::{MountPropagationFlags, mount_change};

/// The meaning of each option. Nothing is mounted below a mount yet when it gets its propagation,
/// so that the recursive options mean the same as the others.
const OPTIONS: [(&str, MountPropagationFlags); 8] = [
    ("shared", MountPropagationFlags::SHARED),
    ("rshared", MountPropagationFlags::SHARED),
    ("slave", MountPropagationFlags::DOWNSTREAM),
    ("rslave", MountPropagationFlags::DOWNSTREAM),
    ("private", MountPropagationFlags::PRIVATE),
    ("rprivate", MountPropagationFlags::PRIVATE),
    ("unbindable", MountPropagationFlags::UNBINDABLE),
    ("runbindable", MountPropagationFlags::UNBINDABLE),
];

/// Whether an option of a mount is one of its propagation.
pub(crate) fn is_option(option: &str) -> bool {
    OPTIONS.iter().any(|(name, _)| *name == option)
}

/// Whether any mount is to change. Mounts are private already, and making one a slave keeps it so.
pub(crate) fn matters(spec: &Spec) -> bool {
    let other = |flag: &MountPropagationFlags| {
        let kept = MountPropagationFlags::PRIVATE | MountPropagationFlags::DOWNSTREAM;
        !kept.contains(*flag)
    };
    spec.mounts().iter().flatten().any(|mount| asked(mount).iter().any(other))
}

/// Gives the mounts of a container their propagation. This process is in the container's mount
/// namespace; `table` is what is mounted there, proc(5).
///
/// # Errors
/// Names the mount.
pub(crate) fn apply(spec: &Spec, table: &str) -> Result<(), (PathBuf, io::Error)> {
    let mut wanted = HashMap::new();
    for mount in spec.mounts().iter().flatten() {
        let flags = asked(mount);
        if !flags.is_empty() {
            let at = mount.destination();
            let place = fs::canonicalize(at).map_err(|error| (at.clone(), error))?;
            wanted.insert(place, flags);
        }
    }
    for (place, flags) in changes(&mounts(table), &wanted) {
        for flag in flags {
            mount_change(&place, flag).map_err(|error| (place.clone(), error.into()))?;
        }
    }
    Ok(())
}

fn asked(mount: &Mount) -> Vec<MountPropagationFlags> {
    let meaning = |option: &String| OPTIONS.iter().find(|(name, _)| name == option);
    mount.options().iter().flatten().filter_map(meaning).map(|(_, flag)| *flag).collect()
}

/// An existing mount.
#[derive(Debug)]
struct Mounted {
    id: u32,
    parent: u32,
    place: PathBuf,
}

/// Lists the mounts in the order in which they were made, which is the table's since Linux 6.8.
fn mounts(table: &str) -> Vec<Mounted> {
    let line = |line: &str| {
        let mut words = line.split(' ');
        let (id, parent) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Mounted { id, parent, place: plain(words.nth(2)?) })
    };
    table.lines().filter_map(line).collect()
}

/// A path with its octal escapes for white space and backslashes decoded.
fn plain(escaped: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = escaped.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let number = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// The changes at each place: the propagation that a mount asks for, and that a mount on a shared
/// one is shared.
fn changes(
    mounts: &[Mounted],
    wanted: &HashMap<PathBuf, Vec<MountPropagationFlags>>,
) -> Vec<(PathBuf, Vec<MountPropagationFlags>)> {
    let mut shared: HashMap<u32, bool> = HashMap::new();
    let mut changes = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        // No path leads to a mount that is covered by another.
        if mounts.iter().skip(index + 1).any(|later| later.place == mount.place) {
            continue;
        }
        let mut flags = Vec::new();
        if shared.get(&mount.parent) == Some(&true) {
            flags.push(MountPropagationFlags::SHARED);
        }
        flags.extend(wanted.get(&mount.place).into_iter().flatten());
        let Some(last) = flags.last() else { continue };
        shared.insert(mount.id, *last == MountPropagationFlags::SHARED);
        changes.push((mount.place.clone(), flags));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(options: &[&str]) -> Spec {
        let mounts = json!([{"destination": "/m", "type": "tmpfs", "options": options}]);
        serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": mounts})).unwrap()
    }

    #[test]
    fn what_a_mount_is_anyhow_need_not_be_asked_for() {
        assert!(!matters(&spec(&["ro", "rprivate", "slave"])));
        assert!(matters(&spec(&["private", "rshared"])));
        assert!(matters(&spec(&["unbindable"])));
    }

    #[test]
    fn what_is_mounted_on_a_shared_mount_is_shared_unless_it_is_asked_otherwise() {
        let table = "40 30 0:1 / / rw - tmpfs none rw\n\
            44 40 0:2 / /a\\040b rw - tmpfs none rw\n\
            42 44 0:3 / /a\\040b/below rw - tmpfs none rw\n\
            47 42 0:3 / /a\\040b/below/own rw - tmpfs none rw\n\
            41 47 0:3 / /a\\040b/below/own/file rw - tmpfs none rw\n\
            48 40 0:3 / /other rw - tmpfs none rw\n";
        let (shared, private) = (MountPropagationFlags::SHARED, MountPropagationFlags::PRIVATE);
        let wanted = HashMap::from([
            (PathBuf::from("/a b"), vec![private, shared]),
            (PathBuf::from("/a b/below/own"), vec![private]),
        ]);
        let expected = [
            ("/a b", vec![private, shared]),
            ("/a b/below", vec![shared]),
            ("/a b/below/own", vec![shared, private]),
        ];
        let expected = expected.map(|(place, flags)| (PathBuf::from(place), flags));
        assert_eq!(changes(&mounts(table), &wanted), expected);
    }

    #[test]
    fn a_mount_that_is_covered_is_left_alone() {
        let table = "44 40 0:2 / /a rw - tmpfs none rw\n45 44 0:2 / /a rw - tmpfs none rw\n";
        let wanted =
            HashMap::from([(PathBuf::from("/a"), vec![MountPropagationFlags::UNBINDABLE])]);
        assert_eq!(changes(&mounts(table), &wanted).len(), 1);
    }
}
