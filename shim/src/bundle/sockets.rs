//! Finds sockets of the host that a specification binds into the container by their names, where the
//! host's policy forbids that. A socket is a way out of the machine: whoever answers at its other end
//! decides what may come through.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use oci_spec::runtime::Spec;

use super::guest::is_bind;
use super::refuse::{Refusal, refuse};

/// Checks that no bind mount has a socket as its source.
///
/// # Errors
/// Names the first that has.
pub(super) fn check(spec: &Spec, bundle: &Path) -> Result<(), Refusal> {
    for mount in spec.mounts().iter().flatten().filter(|mount| is_bind(mount)) {
        let Some(source) = mount.source() else { continue };
        // A source that does not exist is named when it is opened.
        let is_socket =
            fs::metadata(bundle.join(source)).is_ok_and(|it| it.file_type().is_socket());
        if is_socket {
            let (at, source) = (mount.destination().display(), source.display());
            return Err(refuse(
                format!(
                    "mounts: {at} is the socket {source} of the host, which the policy does not \
                     allow (sockets.host)"
                ),
                "leave it out, or use a runtime whose policy allows it",
            ));
        }
    }
    Ok(())
}
