//! `/dev/vhost-net` of this host: with it the host's kernel moves the frames of a machine's
//! interface instead of the monitor.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

use crate::policy::NetworkPolicy;

const DEVICE: &str = "/dev/vhost-net";

/// Why vhost-net is not used.
#[derive(Debug, Error)]
pub enum WhyNot {
    /// The administrator has switched it off.
    #[error("the policy does not allow it (network.vhost)")]
    SwitchedOff,
    /// The host does not have the device, or does not allow it to be opened.
    #[error("{DEVICE} cannot be opened")]
    Device(#[source] io::Error),
}

/// Opens the device once for each of so many queue pairs.
///
/// # Errors
/// When there is a reason not to.
pub fn open(pairs: usize, policy: NetworkPolicy) -> Result<Vec<OwnedFd>, WhyNot> {
    if !policy.vhost {
        return Err(WhyNot::SwitchedOff);
    }
    let open = |_| Ok(OpenOptions::new().read(true).write(true).open(DEVICE)?.into());
    (0..pairs).map(open).collect::<io::Result<_>>().map_err(WhyNot::Device)
}
