//! The tenant: this binary's third life, which adds one process to a container and exits.
//!
//! Like the creator it finds everything in the container's [`ContainerFiles`] and answers by a report.
//! It does not use libcontainer's builder for such processes, which ignores the container's user
//! namespace: the arguments that the builder would pass on are made here.

use std::fs;
use std::io::{self, PipeReader, Read as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use libcgroups::common::CgroupConfig;
use libcontainer::notify_socket::{NotifyListener, NotifyListenerError, NotifySocket};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::{ProcessError, container_main_process};
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{Process, Spec};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::cgroup::Cgroup;
use crate::confinement::Restrictions;
use crate::creator::{self, ContainerFiles};
use crate::executor::Program;
use crate::fault;
use crate::report::{self, Report};
use crate::seccomp::FilterError;
use crate::terminal;

/// The first argument that makes the agent a tenant; the container's id, the process's and the pid of
/// the container's init follow.
pub(crate) const VERB: &str = "exec";

/// The process as the agent has prepared it.
pub(crate) const PROCESS: &str = "process.json";

/// The socket that the process waits at until it may run its program.
const NOTIFY: &str = "notify.sock";

/// An error of adding a process.
#[derive(Debug, thiserror::Error)]
enum TenantError {
    #[error("{0}")]
    Libcontainer(#[from] ProcessError),
    #[error("cannot tell the process to start")]
    Notify(#[from] NotifyListenerError),
    #[error("cannot read the specification back")]
    Spec(#[from] oci_spec::OciSpecError),
    #[error("cannot read the process back")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error("{0}")]
    Step(&'static str, #[source] io::Error),
    #[error("{0}")]
    Failed(String),
}

/// Adds the process, which gets so many descriptors beyond the standard streams, and reports how it
/// went.
pub(crate) fn main(
    (container_id, exec_id, init): (&str, &str, &str),
    descriptors: i32,
) -> ExitCode {
    let files = ContainerFiles::of(container_id);
    let directory = files.exec(exec_id);
    let path = directory.join(report::FILE);
    let Ok(report) = Report::open(&path) else {
        return ExitCode::FAILURE;
    };
    creator::log_to(&path);
    fault::watch_life(VERB);
    let report = Rc::new(report);
    let joined = join((container_id, init), (&files, &directory), descriptors, Rc::clone(&report));
    creator::conclude(&report, joined)
}

fn join(
    (container_id, init): (&str, &str),
    (files, directory): (&ContainerFiles, &Path),
    descriptors: i32,
    report: Rc<Report>,
) -> Result<i32, TenantError> {
    let step = |name| move |error| TenantError::Step(name, error);
    let process = fs::read(directory.join(PROCESS)).map_err(step("read the process back"))?;
    let process: Process = serde_json::from_slice(&process)?;
    let restrictions = Restrictions::read(directory).map_err(step("read restrictions back"))?;
    let program = Program::new(report, restrictions.prepare()?, None)
        .with_plain_lines(terminal::is_plain(directory));
    let cgroup = cgroup(container_id, init).map_err(step("read the container's cgroup"))?;
    let terminal = process.terminal() == Some(true);
    let console = terminal.then(|| terminal::connect(directory)).transpose();
    let console = console.map_err(step("connect to the console socket"))?;
    let (failure, failing) = io::pipe().map_err(step("make a pipe"))?;
    if let Some(score) = process.oom_score_adj() {
        let set = fs::write("/proc/self/oom_score_adj", score.to_string());
        set.map_err(step("set process.oomScoreAdj"))?;
    }
    let container = Spec::load(files.config())?;
    let rootfs = container.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let notify = directory.join(NOTIFY);
    let arguments = ContainerArgs {
        container_type: ContainerType::TenantContainer { exec_notify_fd: failing.as_raw_fd() },
        syscall: SyscallType::default(),
        spec: Rc::new(joining(container, process, init)),
        rootfs,
        console_socket: console.as_ref().map(|console| console.as_raw_fd()),
        notify_listener: NotifyListener::new(&notify)?,
        preserve_fds: descriptors,
        container: None,
        user_ns_config: None,
        cgroup_config: cgroup,
        detached: true,
        executor: Box::new(program),
        no_pivot: false,
        stdin: None,
        stdout: None,
        stderr: None,
        as_sibling: false,
        pid_file: None,
    };
    // No process of the container may inspect this one once it has joined them.
    let hidden = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    hidden.map_err(|error| TenantError::Step("hide from the container", error.into()))?;
    let pid = container_main_process(&arguments)?;
    NotifySocket::new(notify).notify_container_start()?;
    drop(failing);
    ran(failure)?;
    Ok(pid.as_raw())
}

/// Waits until the program runs, or has said why it cannot.
fn ran(mut failure: PipeReader) -> Result<(), TenantError> {
    let mut reason = String::new();
    let read = failure.read_to_string(&mut reason);
    read.map_err(|error| TenantError::Step("wait for the program", error))?;
    if reason.is_empty() { Ok(()) } else { Err(TenantError::Failed(reason)) }
}

/// The cgroup of the process: the container's, or the one below it that the container's init is in.
fn cgroup(container_id: &str, init: &str) -> io::Result<CgroupConfig> {
    let init = init.parse().map_err(io::Error::other)?;
    let mut cgroup_path = Cgroup::path(container_id);
    if let Some(below) = Cgroup::of(container_id).joined(init)? {
        cgroup_path.push(below);
    }
    Ok(CgroupConfig { cgroup_path, systemd_cgroup: false, container_name: container_id.to_owned() })
}

/// The container's specification for a process that joins every namespace of its init. libcontainer
/// then ignores what is set up only once for a container.
fn joining(mut container: Spec, process: Process, init: &str) -> Spec {
    let linux = container.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut());
    for namespace in linux.into_iter().flatten() {
        // namespaces(7) has them by these names.
        let path = format!("/proc/{init}/ns/{}", namespace.typ());
        namespace.set_path(Some(path.into()));
    }
    container.set_process(Some(process));
    container
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn every_namespace_of_the_container_is_joined() {
        let container = json!({
            "ociVersion": "1.0.2",
            "linux": {"namespaces": [
                {"type": "user"}, {"type": "mount"}, {"type": "pid", "path": "/proc/7/ns/pid"}
            ]}
        });
        let container: Spec = serde_json::from_value(container).unwrap();
        let process = json!({"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        let spec = joining(container, serde_json::from_value(process).unwrap(), "9");
        let spec: Value = serde_json::to_value(spec).unwrap();
        let expected = json!([
            {"type": "user", "path": "/proc/9/ns/user"},
            {"type": "mount", "path": "/proc/9/ns/mnt"},
            {"type": "pid", "path": "/proc/9/ns/pid"}
        ]);
        assert_eq!(spec["linux"]["namespaces"], expected);
        assert_eq!(spec["process"]["args"], json!(["x"]));
    }
}
