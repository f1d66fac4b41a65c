//! `bulkhead-agent`: PID 1 of the guest.
//!
//! The same binary has several lives. Started by the kernel it prepares the guest (`init`), then serves
//! the calls of `agent.proto` (`rpc`) and the standard streams (`io`) over vsock, and never returns.
//! Started by itself as `create` it makes one container with libcontainer and exits (`creator`), as
//! `exec` it adds a process to one (`tenant`), because a multi-threaded server must not run arbitrary
//! code between fork and exec. As `hooks` it is a hook that runs others (`hooks`). Started by the
//! kernel as a helper program it loads modules (`modprobe`).
//!
//! It also runs as PID 1 of a PID namespace (`unshare --pid --fork --mount bulkhead-agent`), which
//! is how its tests run it without a monitor.

mod cgroup;
mod clock;
mod confinement;
mod container;
mod copy_up;
mod creator;
mod descriptors;
mod device_directories;
mod device_rules;
mod disks;
mod executor;
mod fault;
mod formats;
mod hooks;
mod host_sockets;
mod hotplug;
mod huge_pages;
mod inherit;
mod init;
mod io;
mod logging;
mod memory;
mod modprobe;
mod mount_options;
mod names;
mod network;
mod notify;
mod process;
mod propagation;
mod report;
mod rpc;
mod seccomp;
mod share;
mod shared_sockets;
mod socket_path;
mod spec;
mod staged;
mod swap;
mod sysctl;
mod table;
mod tenant;
mod terminal;
mod timekeeping;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Not everything that the kernel passes to a helper program is text.
    let arguments = env::args_os().skip(1).map(OsString::into_string);
    let Ok(mut arguments) = arguments.collect::<Result<Vec<String>, _>>() else {
        return ExitCode::FAILURE;
    };
    if modprobe::is_asked(&arguments) {
        return modprobe::main(&arguments);
    }
    let Ok(descriptors) = inherit::settle(&mut arguments) else {
        return ExitCode::FAILURE;
    };
    match arguments.as_slice() {
        [verb, container_id] if verb == creator::VERB => creator::main(container_id, descriptors),
        [verb, container_id, exec_id, init] if verb == tenant::VERB => {
            tenant::main((container_id, exec_id, init), descriptors)
        }
        [verb, container_id] if verb == hooks::VERB => hooks::main(container_id),
        _ => init::main(),
    }
}
