//! As which users connections are made. A server of the host decides by the user that it sees, and
//! the host's kernel by the permissions of the socket: both have to see the user that the process
//! inside has.

use std::io;
use std::ops::Range;

use bulkhead_protocol::HOST_SOCKET_GROUPS_MAX;
pub(super) use bulkhead_relay::User;
use oci_spec::runtime::{LinuxIdMapping, Spec};

/// The users and groups of the host that a container has.
#[derive(Clone, Debug, Default)]
pub struct Users {
    /// Without a user namespace a container has all.
    uids: Option<Vec<Range<u64>>>,
    gids: Option<Vec<Range<u64>>>,
    root: User,
}

impl Users {
    /// Those of the container with this specification.
    #[must_use]
    pub fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let uids = linux.and_then(|linux| linux.uid_mappings().as_deref()).unwrap_or_default();
        let gids = linux.and_then(|linux| linux.gid_mappings().as_deref()).unwrap_or_default();
        let root = User { uid: root(uids), gid: root(gids), groups: Vec::new() };
        Self { uids: ranges(uids), gids: ranges(gids), root }
    }

    /// The user with these ids, which the guest has named.
    ///
    /// # Errors
    /// When the container has no such user or group, or one is no id at all.
    pub(super) fn find(&self, uid: u32, gid: u32, groups: &[u32]) -> io::Result<User> {
        let known = has(self.uids.as_deref(), uid)
            && has(self.gids.as_deref(), gid)
            && groups.iter().all(|group| has(self.gids.as_deref(), *group));
        if !known || groups.len() > HOST_SOCKET_GROUPS_MAX {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("the container has no user {uid} with group {gid} and groups {groups:?}"),
            ));
        }
        Ok(User { uid, gid, groups: groups.to_vec() })
    }

    /// The container's root.
    pub(super) fn root(&self) -> User {
        self.root.clone()
    }
}

/// The user of the host that a container's root is.
fn root(mappings: &[LinuxIdMapping]) -> u32 {
    mappings.iter().find(|mapping| mapping.container_id() == 0).map_or(0, LinuxIdMapping::host_id)
}

fn ranges(mappings: &[LinuxIdMapping]) -> Option<Vec<Range<u64>>> {
    let range = |mapping: &LinuxIdMapping| {
        let first = u64::from(mapping.host_id());
        first..first + u64::from(mapping.size())
    };
    (!mappings.is_empty()).then(|| mappings.iter().map(range).collect())
}

fn has(ranges: Option<&[Range<u64>]>, id: u32) -> bool {
    // setresuid(2) takes the highest number for "no change", which would leave the thread root.
    id != u32::MAX
        && ranges.is_none_or(|ranges| ranges.iter().any(|range| range.contains(&u64::from(id))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_guest_is_only_users_that_its_container_has() {
        let all = Users::default();
        assert!(all.find(0, 0, &[]).is_ok() && all.find(1000, 5, &[998]).is_ok());
        for (uid, gid, groups) in [
            (u32::MAX, 0, vec![]),
            (0, u32::MAX, vec![]),
            (0, 0, vec![u32::MAX]),
            (0, 0, vec![7; 257]),
        ] {
            assert!(all.find(uid, gid, &groups).is_err(), "{uid} {gid} {groups:?}");
        }
        let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        let spec = json!({"ociVersion": "1.0.2", "linux": {
            "uidMappings": mappings, "gidMappings": mappings,
        }});
        let mapped = Users::of(&serde_json::from_value(spec).unwrap());
        assert_eq!(mapped.root().uid, 100_000);
        assert!(mapped.find(100_999, 100_000, &[100_005]).is_ok());
        for (uid, gid, groups) in [
            (0, 100_000, vec![]),
            (101_000, 100_000, vec![]),
            (100_000, 0, vec![]),
            (100_000, 100_000, vec![0]),
        ] {
            assert!(mapped.find(uid, gid, &groups).is_err(), "{uid} {gid} {groups:?}");
        }
    }

    #[tokio::test]
    #[ignore = "needs the test host"]
    async fn a_thread_alone_becomes_a_user() {
        let user = User { uid: 4242, gid: 4243, groups: vec![4244] };
        let status = || std::fs::read_to_string("/proc/thread-self/status");
        let inside = user.run(status).await.unwrap();
        for line in [
            "Uid:\t0\t4242\t0\t4242",
            "Gid:\t0\t4243\t0\t4243",
            "Groups:\t4244",
            "CapEff:\t0000000000000000",
        ] {
            assert!(inside.contains(line), "{line}: {inside}");
        }
        assert!(status().unwrap().contains("Uid:\t0\t0"));
    }
}
