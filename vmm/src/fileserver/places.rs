//! The parts of the share, and what they mean for the files in them: who else may change a file,
//! and so what the guest may remember of it, and to which of the guest's file systems it belongs.

use std::ffi::CStr;
use std::time::Duration;

/// The name of a container's root file system in its directory.
const ROOT_FILE_SYSTEM: &CStr = c"rootfs";

/// A part of the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The root, which has a directory for each container.
    Root,
    /// The directory of a container, which has only mount points.
    MountPoints,
    /// The root file system of a container: only its processes write to it, apart from such as
    /// `docker cp`.
    Own,
    /// A directory of the host, or another file system below one: anybody may write to it.
    Shared,
    /// A file of the host that is mounted alone.
    Alone,
}

impl Place {
    /// Where a file is that has this name in a directory which is here. `mounted` if it is the root
    /// of a mount.
    pub(super) fn below(self, name: &CStr, mounted: bool, directory: bool) -> Self {
        match self {
            Self::Root => Self::MountPoints,
            Self::MountPoints if !mounted => Self::MountPoints,
            Self::MountPoints if !directory => Self::Alone,
            Self::MountPoints if name == ROOT_FILE_SYSTEM => Self::Own,
            Self::Own if !mounted => Self::Own,
            Self::MountPoints | Self::Own | Self::Shared | Self::Alone => Self::Shared,
        }
    }

    /// How long the guest may believe the name and the attributes of a file or directory.
    ///
    /// A file that others may change is asked for each time. It is too expensive to ask for every
    /// directory of every path again, and for the files of a root file system; the commands that
    /// change one from outside take longer than this.
    pub(super) const fn valid(self, directory: bool) -> Duration {
        match self {
            Self::Root | Self::MountPoints => Duration::from_secs(1),
            Self::Shared | Self::Alone if !directory => Duration::ZERO,
            Self::Own | Self::Shared | Self::Alone => Duration::from_millis(100),
        }
    }

    /// Whether the guest may act as if nobody else used the files here: locks hold in it only, and
    /// what is written to mappings may be written back late.
    pub(super) const fn is_unshared(self) -> bool {
        matches!(self, Self::Own)
    }

    /// Whether the guest mounts the root of a mount here as a file system of its own, with its own
    /// device number.
    pub(super) const fn is_submount(self) -> bool {
        matches!(self, Self::Own | Self::Shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_follows_from_the_way_there() {
        let container = Place::Root.below(c"0", true, true);
        assert_eq!(container, Place::MountPoints);
        let root = container.below(c"rootfs", true, true);
        assert_eq!(root, Place::Own);
        assert_eq!(root.below(c"etc", false, true), Place::Own);
        assert_eq!(root.below(c"volume", true, true), Place::Shared, "a mount in the root");
        let mounts = container.below(c"mounts", false, true);
        assert_eq!(mounts, Place::MountPoints);
        assert_eq!(mounts.below(c"0", true, true), Place::Shared);
        assert_eq!(mounts.below(c"0", true, true).below(c"rootfs", false, true), Place::Shared);
        assert_eq!(mounts.below(c"1", true, false), Place::Alone);
    }

    #[test]
    fn a_file_that_others_may_change_is_never_believed() {
        assert_eq!(Place::Shared.valid(false), Duration::ZERO);
        assert_eq!(Place::Alone.valid(false), Duration::ZERO);
        assert!(!Place::Shared.is_unshared() && !Place::Alone.is_unshared());
    }
}
