//! Units of systemd: `slice:prefix:name` in `linux.cgroupsPath`, as in runc.

use std::path::{Path, PathBuf};

use super::CgroupError;
use crate::state::id::ContainerId;

/// The default prefix of a scope's name.
const SCOPE_PREFIX: &str = "bulkhead";

/// The unit that a container's `linux.cgroupsPath` names.
pub(super) fn name(container: &ContainerId, given: Option<&Path>) -> Result<PathBuf, CgroupError> {
    let Some(given) = given else {
        return Ok(format!("system.slice:{SCOPE_PREFIX}:{container}").into());
    };
    match given.to_str().map(|path| path.split(':').count()) {
        Some(3) => Ok(given.to_owned()),
        _ => Err(CgroupError::NotAUnit(given.to_owned())),
    }
}

/// The path of a unit's cgroup: systemd.slice(5), systemd.scope(5). A slice `a-b.slice` is in
/// `a.slice`; `-.slice` is the root.
pub(super) fn path(unit: &Path) -> PathBuf {
    let unit = unit.to_string_lossy();
    let mut parts = unit.split(':');
    let mut next = || parts.next().unwrap_or_default();
    let (slice, prefix, name) = (next(), next(), next());
    let mut path = PathBuf::from("/");
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.trim_end_matches(".slice");
    let ends = stem.match_indices('-').map(|(end, _)| end).chain([stem.len()]);
    for end in ends.filter(|_| stem != "-") {
        path.push(format!("{}.slice", &stem[..end]));
    }
    path.push(if name.ends_with(".slice") {
        name.to_owned()
    } else {
        format!("{prefix}-{name}.scope")
    });
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_have_three_parts() {
        let id: ContainerId = "c".parse().unwrap();
        assert_eq!(name(&id, None).unwrap(), Path::new("system.slice:bulkhead:c"));
        let given = Path::new("machine.slice:libpod:1");
        assert_eq!(name(&id, Some(given)).unwrap(), given);
        for given in ["/docker/x", "a:b", "a:b:c:d"] {
            let error = name(&id, Some(Path::new(given))).unwrap_err().to_string();
            assert!(error.contains("slice:prefix:name") && error.contains(given), "{error}");
        }
    }

    #[test]
    fn a_slice_is_in_the_one_before_its_dash() {
        for (unit, expected) in [
            ("system.slice:bulkhead:c", "/system.slice/bulkhead-c.scope"),
            (":docker:c", "/system.slice/docker-c.scope"),
            ("-.slice:docker:c", "/docker-c.scope"),
            ("a-b-c.slice:x:y", "/a.slice/a-b.slice/a-b-c.slice/x-y.scope"),
            ("a.slice:x:y.slice", "/a.slice/y.slice"),
        ] {
            assert_eq!(path(Path::new(unit)), Path::new(expected), "{unit}");
        }
    }
}
