//! `/dev/vhost-net` on this host: by it the kernel moves the frames of a machine's interface, in place
//! of the monitor.

use std::env;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

/// Set to `0`, it is not used.
const SWITCH: &str = "BULKHEAD_VHOST_NET";
const DEVICE: &str = "/dev/vhost-net";

/// Why the monitor is to move the frames.
#[derive(Debug, Error)]
pub enum WhyNot {
    /// The user wants it so.
    #[error("{SWITCH}=0 is set")]
    SwitchedOff,
    /// The host does not have it, or does not let us.
    #[error("{DEVICE} cannot be opened")]
    Device(#[source] io::Error),
}

/// Opens the device for so many pairs of queues.
///
/// # Errors
/// When there is a reason not to.
pub fn open(pairs: usize) -> Result<Vec<OwnedFd>, WhyNot> {
    if env::var_os(SWITCH).is_some_and(|value| value == "0") {
        return Err(WhyNot::SwitchedOff);
    }
    let open = |_| Ok(OpenOptions::new().read(true).write(true).open(DEVICE)?.into());
    (0..pairs).map(open).collect::<io::Result<_>>().map_err(WhyNot::Device)
}
