//! The monitor of one pod: a jailed process that runs a virtual machine.
//!
//! Its one argument, the pod's state directory, is there for `ps` to show; the monitor ignores it.
//! Descriptor 3 is its control socket; see [`bulkhead_vmm::monitor`].

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_vmm::monitor::main()
}
