//! What `state` and `list` show of a container, and what hooks read.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::id::ContainerId;
use super::{Home, State, users};
use crate::supervisor::lifecycle::Status;

/// The OCI runtime specification whose state is shown.
pub const OCI_VERSION: &str = "1.0.2";

/// What `state` and `list` show, and what hooks read: the OCI state with runc's additions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// [`OCI_VERSION`].
    pub oci_version: &'static str,
    /// Its name.
    pub id: ContainerId,
    /// The process that stands for it; 0 when it is stopped.
    pub pid: u32,
    /// Checked against what runs.
    #[serde(serialize_with = "shown")]
    pub status: Status,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The root file system.
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    /// From the bundle.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// A user's name.
    pub owner: String,
}

impl Home {
    /// What callers are shown.
    #[must_use]
    pub fn view(&self, state: State) -> View {
        let status = state.observed();
        let stand_in = state.stand_in.filter(|_| status != Status::Stopped);
        View {
            oci_version: OCI_VERSION,
            pid: stand_in.map_or(0, |process| process.pid),
            status,
            owner: self.owner(&state),
            id: self.id().clone(),
            bundle: state.bundle,
            rootfs: state.rootfs,
            created: state.created,
            annotations: state.annotations.into_iter().collect(),
        }
    }

    /// The name of the user who claimed the id, as `/etc/passwd` has it; else the number.
    fn owner(&self, state: &State) -> String {
        let uid = fs::metadata(self.dir()).map_or(state.owner, |metadata| metadata.uid());
        users::name(uid)
    }
}

/// A status in the words of the specification, which has fewer of them.
fn shown<S: Serializer>(status: &Status, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(status)
}
