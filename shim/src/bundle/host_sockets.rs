//! Sockets and FIFOs of the host that a container mounts by name. They are not shared as files, because
//! a guest would find nobody at their other end: the agent makes what stands for each
//! ([`crate::sockets`]), and the specification mounts that.

use std::fs::{self, Metadata};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use bulkhead_protocol::HOST_SOCKETS_DIR;
use oci_spec::runtime::Spec;

use super::guest::is_bind;
use super::refuse::{Refusal, refuse};
use crate::state::id::ContainerId;

/// Whether a file of the host has another end that is not in the file.
pub(super) fn is_one(metadata: &Metadata) -> bool {
    metadata.file_type().is_socket() || metadata.file_type().is_fifo()
}

/// Where the agent makes what stands for a container's socket or FIFO with this index.
pub(super) fn in_guest(id: &ContainerId, index: usize) -> PathBuf {
    Path::new(HOST_SOCKETS_DIR).join(id.as_str()).join(index.to_string())
}

/// Checks that no bind mount has one as its source, where the host's policy forbids that: whoever
/// answers at its other end decides what may come through.
///
/// # Errors
/// Names the first mount that has.
pub(super) fn check(spec: &Spec, bundle: &Path) -> Result<(), Refusal> {
    for mount in spec.mounts().iter().flatten().filter(|mount| is_bind(mount)) {
        let Some(source) = mount.source() else { continue };
        // A source that does not exist is named when it is opened.
        if fs::metadata(bundle.join(source)).is_ok_and(|metadata| is_one(&metadata)) {
            let (at, source) = (mount.destination().display(), source.display());
            return Err(refuse(
                format!(
                    "mounts: {at} is the socket or FIFO {source} of the host, which the policy does \
                     not allow (sockets.host)"
                ),
                "leave it out, or use a runtime whose policy allows it",
            ));
        }
    }
    Ok(())
}
