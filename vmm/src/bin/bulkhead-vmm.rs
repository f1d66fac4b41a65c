//! The monitor of one pod. It is started by the supervisor, with the control socket as descriptor
//! 3 and nothing else; run by hand it says so and ends.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use bulkhead_vmm::{logging, monitor};

/// Where the supervisor puts the control socket.
const CONTROL: i32 = 3;

fn main() -> ExitCode {
    logging::start();
    let Some(control) = inherited_socket() else {
        log::error!("descriptor 3 is not a socket: bulkhead-vmm is started by bulkhead");
        return ExitCode::FAILURE;
    };
    match monitor::run(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}: {:?}", std::error::Error::source(&error));
            ExitCode::FAILURE
        }
    }
}

// UNSAFETY: an inherited descriptor has no owner that Rust knows of.
#[expect(unsafe_code, reason = "descriptor 3 is inherited")]
fn inherited_socket() -> Option<OwnedFd> {
    // SAFETY: nothing in this process has opened a descriptor yet, so nothing else owns this one;
    // if it is closed, the first use fails, and it is checked right below.
    let socket = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    rustix::net::sockopt::socket_type(&socket).ok()?;
    Some(socket)
}
