//! The file server of one pod: a jailed process that serves files over a socket.
//!
//! Takes no arguments. Descriptor 3 is its control socket; see
//! [`bulkhead_vmm::fileserver`].

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_vmm::fileserver::main()
}
