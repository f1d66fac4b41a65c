//! The tenant: this binary's third life, which adds one process to a container and exits.
//!
//! Like the creator it finds everything in the container's [`Place`] and answers by a report.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::Process;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::confinement::Restrictions;
use crate::creator::{self, Place};
use crate::executor::Program;
use crate::report::{self, Report};
use crate::seccomp::FilterError;
use crate::terminal;

/// The first argument that makes the agent a tenant; the container's and the process's id follow.
pub(crate) const VERB: &str = "exec";

/// The process as the agent has prepared it.
pub(crate) const PROCESS: &str = "process.json";

/// Libcontainer's state of a container, in its directory.
const STATE: &str = "state.json";

/// An error of adding a process.
#[derive(Debug, thiserror::Error)]
enum TenantError {
    #[error(transparent)]
    Libcontainer(#[from] LibcontainerError),
    #[error("process cannot be read back")]
    Read(#[from] std::io::Error),
    #[error("libcontainer's state of the container tells no pid")]
    NoInit,
    #[error("cgroup of the container cannot be read")]
    Cgroup(#[source] std::io::Error),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error("process cannot be read back")]
    Json(#[from] serde_json::Error),
}

/// Adds the process, which gets so many descriptors beyond the standard streams, and reports how it
/// went.
pub(crate) fn main(container_id: &str, exec_id: &str, descriptors: i32) -> ExitCode {
    let place = Place::of(container_id);
    let directory = place.exec(exec_id);
    let path = directory.join(report::FILE);
    let Ok(report) = Report::open(&path) else {
        return ExitCode::FAILURE;
    };
    creator::log_to(&path);
    let report = Rc::new(report);
    let joined = join(container_id, (&place, &directory), descriptors, Rc::clone(&report));
    creator::conclude(&report, joined)
}

fn join(
    container_id: &str,
    (place, directory): (&Place, &Path),
    descriptors: i32,
    report: Rc<Report>,
) -> Result<i32, TenantError> {
    let path = directory.join(PROCESS);
    let process: Process = serde_json::from_slice(&fs::read(&path)?)?;
    let confinement = Restrictions::read(directory)?.prepare()?;
    // Libcontainer leaves sockets beside the state that it reads. This copy goes with the rest of the
    // process's directory.
    let state = directory.join(container_id);
    fs::create_dir(&state)?;
    fs::copy(place.state.join(STATE), state.join(STATE))?;
    let described: Value = serde_json::from_slice(&fs::read(state.join(STATE))?)?;
    let init = described["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    let init = init.ok_or(TenantError::NoInit)?;
    let below = Cgroup::of(container_id).joined(init).map_err(TenantError::Cgroup)?;
    let console = directory.join(terminal::SOCKET);
    let has_terminal = process.terminal() == Some(true);
    let pid = ContainerBuilder::new(container_id.to_owned(), SyscallType::default())
        .with_root_path(directory)?
        .with_executor(
            Program::new(report, confinement, None).with_plain_lines(terminal::is_plain(directory)),
        )
        .with_console_socket(has_terminal.then_some(console))
        .with_preserved_fds(descriptors)
        .as_tenant()
        .with_detach(true)
        .with_sub_cgroup(below.map(|path| path.to_string_lossy().into_owned()))
        .with_process(Some(&path))
        .build()?;
    Ok(pid.as_raw())
}
