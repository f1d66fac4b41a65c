//! How far a bind mount is read-only: `ro` applies to the mount itself, `rro` also to the mounts
//! below it.
//!
//! The guest sees a mount and everything below it as one file system, and could only make all of it
//! read-only. So if there are mounts below a mount that is `ro`, only the host applies the option,
//! because it can do so for a single mount.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use oci_spec::runtime::Mount;

/// The bytes that the kernel escapes as octal numbers in a table of mounts.
const ESCAPED: &[u8] = b" \t\n\\";

/// Which mounts of a bind mount are read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReadOnly {
    /// The mount itself.
    pub(super) itself: bool,
    /// The mounts below it.
    pub(super) below: bool,
}

/// Reads a mount's options. Recursive options apply to the mount itself too, wherever they are in
/// the list.
pub(super) fn of(mount: &Mount) -> ReadOnly {
    let mut options = mount.options().iter().flatten().rev().map(String::as_str);
    let has = |name: &str| options.clone().any(|option| option == name);
    if has("rro") {
        ReadOnly { itself: true, below: true }
    } else if has("rrw") {
        ReadOnly { itself: false, below: false }
    } else {
        let last = options.find(|option| *option == "ro" || *option == "rw");
        ReadOnly { itself: last == Some("ro"), below: false }
    }
}

/// Removes `ro` from the guest's options if there are mounts below the source, which the guest
/// would make read-only too. The host still enforces it.
///
/// # Errors
/// When the source or the table of mounts cannot be read.
pub(super) fn leave_to_host(
    mount: &mut Mount,
    source: &Path,
    host: &mut HostMounts,
) -> io::Result<()> {
    let read_only = of(mount);
    if !read_only.itself || read_only.below || !host.are_below(source)? {
        return Ok(());
    }
    let options = mount.options().iter().flatten().filter(|option| *option != "ro").cloned();
    let options = options.collect();
    mount.set_options(Some(options));
    Ok(())
}

/// The host's table of mounts, which is read once and only if needed: the table can be long, and so
/// can the list of a container's mounts.
#[derive(Debug, Default)]
pub(super) struct HostMounts(Option<Vec<u8>>);

impl HostMounts {
    fn are_below(&mut self, directory: &Path) -> io::Result<bool> {
        let directory = fs::canonicalize(directory)?;
        let table = match &self.0 {
            Some(table) => table,
            None => self.0.insert(fs::read("/proc/self/mountinfo")?),
        };
        Ok(lists_below(table, &directory))
    }
}

/// Returns whether a table of mounts, proc_pid_mountinfo(5), has a mount below a directory.
fn lists_below(table: &[u8], directory: &Path) -> bool {
    let mut prefix = Vec::new();
    for byte in directory.as_os_str().as_bytes() {
        if ESCAPED.contains(byte) {
            prefix.extend(format!("\\{byte:03o}").bytes());
        } else {
            prefix.push(*byte);
        }
    }
    if !prefix.ends_with(b"/") {
        prefix.push(b'/');
    }
    let points = table.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut words = line.split(|byte| *byte == b' ');
        words.nth(4)
    });
    points.into_iter().any(|point| point.len() > prefix.len() && point.starts_with(&prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(options: &[&str]) -> Mount {
        let mut mount = Mount::default();
        mount.set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
        mount
    }

    #[test]
    fn the_last_option_counts_and_recursive_ones_wherever_they_are() {
        for (options, itself, below) in [
            (&["rbind"][..], false, false),
            (&["ro"], true, false),
            (&["ro", "rw"], false, false),
            (&["rro"], true, true),
            (&["rro", "rw"], true, true),
            (&["rro", "rrw"], true, true),
            (&["rrw", "ro"], false, false),
        ] {
            assert_eq!(of(&mount(options)), ReadOnly { itself, below }, "{options:?}");
        }
    }

    #[test]
    fn mounts_below_a_directory_are_found_whatever_it_is_called() {
        let table = b"21 1 0:20 / / rw - ext4 /dev/vda rw\n\
            22 21 0:21 / /a\\040b/below rw - tmpfs none rw\n";
        for (directory, found) in
            [("/", true), ("/a b", true), ("/a b/below", false), ("/a", false), ("/a b/bel", false)]
        {
            assert_eq!(lists_below(table, Path::new(directory)), found, "{directory}");
        }
        assert!(!lists_below(b"21 1 0:20 / / rw - ext4 /dev/vda rw\n", Path::new("/")));
    }

    #[test]
    fn where_nothing_is_below_the_guest_keeps_it_too() {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = mount(&["rbind", "ro"]);
        let mut host = HostMounts::default();
        leave_to_host(&mut mount, directory.path(), &mut host).unwrap();
        assert_eq!(mount.options().as_deref().unwrap(), ["rbind", "ro"]);
        // The root has at least /proc below it.
        leave_to_host(&mut mount, Path::new("/"), &mut host).unwrap();
        assert_eq!(mount.options().as_deref().unwrap(), ["rbind"]);
    }
}
