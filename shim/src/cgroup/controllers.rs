//! Controllers of cgroup v2, which are enabled from the root down
//! (Documentation/admin-guide/cgroup-v2.rst, "Enabling and Disabling").

use std::fs;
use std::path::Path;

use libcgroups::common::DEFAULT_CGROUP_ROOT;

/// Enables every controller of the host for a cgroup, as runc does: libcgroups and systemd enable
/// only those that they know.
pub(super) fn enable(directory: &Path) {
    enable_below(Path::new(DEFAULT_CGROUP_ROOT), directory);
}

fn enable_below(root: &Path, directory: &Path) {
    let Ok(below) = directory.strip_prefix(root) else { return };
    let mut parent = root.to_owned();
    for name in below {
        let read = |file: &str| fs::read_to_string(parent.join(file)).unwrap_or_default();
        let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
        let missing = |name: &&str| !enabled.split_whitespace().any(|other| other == *name);
        for controller in available.split_whitespace().filter(missing) {
            // If a controller cannot be enabled, setting a limit that needs it fails later.
            let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        parent.push(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_enabled_on_the_way_down() {
        let root = tempfile::tempdir().unwrap();
        let leaf = root.path().join("a/b");
        fs::create_dir_all(&leaf).unwrap();
        for (directory, enabled) in [(root.path(), "cpu memory\n"), (&root.path().join("a"), "")] {
            fs::write(directory.join("cgroup.controllers"), "cpu misc memory\n").unwrap();
            fs::write(directory.join("cgroup.subtree_control"), enabled).unwrap();
        }
        enable_below(root.path(), &leaf);
        let asked = |directory: &Path| {
            fs::read_to_string(directory.join("cgroup.subtree_control")).unwrap()
        };
        assert_eq!(asked(root.path()), "+misc");
        // A real cgroup adds one controller with each write; this plain file keeps only the last.
        assert_eq!(asked(&root.path().join("a")), "+memory");
        assert!(!leaf.join("cgroup.subtree_control").exists());
    }
}
