//! The creator: this binary's second life, which makes one container with libcontainer and exits.
//! [`crate::tenant`] is its sibling, which adds a process to one.
//!
//! It finds everything in the container's [`ContainerFiles`] and leaves its answer in the report
//! there. Its own descriptors 0, 1 and 2 are the container's. When it has exited, the container's
//! init, which it leaves behind waiting for the start, is a child of PID 1.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{Process, Spec};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Map, Value};
use tracing::Level;

use crate::confinement::Restrictions;
use crate::executor::Program;
use crate::hooks::Hooks;
use crate::logging;
use crate::report::{self, Line, Report};
use crate::seccomp::FilterError;
use crate::{device_directories, fault, init, mount_options, propagation, spec, terminal};

/// The first argument that makes the agent a creator; the second is the container's id.
pub(crate) const VERB: &str = "create";

/// Where a container's files are in the guest.
#[derive(Clone, Debug)]
pub(crate) struct ContainerFiles {
    /// What the agent writes: `config.json` and `report`.
    pub(crate) bundle: PathBuf,
    /// What libcontainer writes.
    pub(crate) state: PathBuf,
}

impl ContainerFiles {
    const BUNDLES: &str = "/run/bulkhead/bundles";
    pub(crate) const STATES: &str = "/run/bulkhead/states";

    /// Those of the container with this id, which must have been checked.
    pub(crate) fn of(container_id: &str) -> Self {
        Self {
            bundle: Path::new(Self::BUNDLES).join(container_id),
            state: Path::new(Self::STATES).join(container_id),
        }
    }

    /// The specification that the container is made from.
    pub(crate) fn config(&self) -> PathBuf {
        self.bundle.join("config.json")
    }

    /// The creator's answer.
    pub(crate) fn report(&self) -> PathBuf {
        self.bundle.join(report::FILE)
    }

    /// Where a further process of the container has its `process.json` and report while it is made;
    /// its id must have been checked.
    pub(crate) fn exec(&self, exec_id: &str) -> PathBuf {
        self.bundle.join("execs").join(exec_id)
    }
}

/// An error of making a container.
#[derive(Debug, thiserror::Error)]
enum CreateError {
    #[error(transparent)]
    Libcontainer(#[from] LibcontainerError),
    #[error("libcontainer reports no pid")]
    NoPid,
    #[error("cannot read the specification back")]
    Spec(#[from] oci_spec::OciSpecError),
    #[error("cannot read the hooks back")]
    Hooks(#[source] std::io::Error),
    #[error("cannot read the restrictions back")]
    Restrictions(#[source] std::io::Error),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error("cannot bring up the loopback interface of the new network namespace")]
    Loopback(#[source] std::io::Error),
    #[error("cannot join the mount namespace of the container")]
    Mounts(#[source] std::io::Error),
    #[error("cannot set the propagation of the mount at {}", .0.display())]
    Propagation(PathBuf, #[source] std::io::Error),
    #[error("cannot make /dev read-only")]
    Dev(#[source] std::io::Error),
    #[error("cannot set the mode of {}", .0.display())]
    Directory(PathBuf, #[source] std::io::Error),
}

/// Creates the container, whose init gets so many descriptors beyond the standard streams, and reports
/// how it went.
pub(crate) fn main(container_id: &str, descriptors: i32) -> ExitCode {
    let files = ContainerFiles::of(container_id);
    let Ok(report) = Report::open(&files.report()) else {
        return ExitCode::FAILURE;
    };
    log_to(&files.report());
    fault::watch_life(VERB);
    let report = Rc::new(report);
    conclude(&report, create(container_id, &files, descriptors, Rc::clone(&report)))
}

/// Reports the pid that was made, or why none was.
pub(crate) fn conclude<E>(report: &Report, made: Result<i32, E>) -> ExitCode
where
    E: std::error::Error + 'static,
{
    match made {
        Ok(pid) => {
            report.write(Line::Created(pid));
            ExitCode::SUCCESS
        }
        Err(error) => {
            report.write(Line::Failed(logging::chain(&error)));
            ExitCode::FAILURE
        }
    }
}

/// Makes libcontainer's own errors, and a panic, part of the report: its processes pass only the
/// outermost text of an error to one another.
pub(crate) fn log_to(path: &Path) {
    if let Ok(details) = Report::open(path) {
        logging::install_with(Level::ERROR, move |fields| {
            details.write(Line::Detail(sentence(&fields)));
        });
    }
    if let Ok(panics) = Report::open(path) {
        std::panic::set_hook(Box::new(move |panic| {
            panics.write(Line::Failed(format!("creator panicked: {panic}")));
        }));
    }
}

/// An event's message and its other values in one line.
fn sentence(fields: &Map<String, Value>) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut sentence = fields.get("message").map(text).unwrap_or_default();
    for (name, value) in fields {
        if !matches!(name.as_str(), "message" | "level") {
            sentence.push_str(&format!(", {name}={}", text(value)));
        }
    }
    sentence
}

fn create(
    container_id: &str,
    files: &ContainerFiles,
    descriptors: i32,
    report: Rc<Report>,
) -> Result<i32, CreateError> {
    let spec = Spec::load(files.config())?;
    let terminal = spec.process().as_ref().and_then(Process::terminal) == Some(true);
    let hooks = Hooks::read(files).map_err(CreateError::Hooks)?;
    let restrictions = Restrictions::read(&files.bundle).map_err(CreateError::Restrictions)?;
    let confinement = restrictions.prepare()?;
    let console = files.bundle.join(terminal::SOCKET);
    let container = ContainerBuilder::new(container_id.to_owned(), SyscallType::default())
        .with_root_path(ContainerFiles::STATES)?
        .with_executor(
            Program::new(report, confinement, hooks.map(Rc::new))
                .with_plain_lines(terminal::is_plain(&files.bundle)),
        )
        .with_console_socket(terminal.then_some(console))
        .with_preserved_fds(descriptors)
        .as_init(&files.bundle)
        .with_systemd(false)
        .build()?;
    let pid = container.pid().ok_or(CreateError::NoPid)?.as_raw();
    if spec::has_new_network(&spec) {
        let path = format!("/proc/{pid}/ns/net");
        let namespace = File::open(path).map_err(CreateError::Loopback)?;
        // This process needs no network before it exits, so it need not come back.
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|error| CreateError::Loopback(error.into()))?;
        init::raise_loopback().map_err(|error| CreateError::Loopback(error.into()))?;
    }
    // The last step, because no path of the guest is found after it.
    finish_mounts(&spec, pid)?;
    Ok(pid)
}

/// Applies to the container's mounts, from inside, what libcontainer does not.
fn finish_mounts(spec: &Spec, pid: i32) -> Result<(), CreateError> {
    let (directories, propagation) = (device_directories::of(spec), propagation::matters(spec));
    let read_only_dev = mount_options::has_read_only_dev(spec);
    if directories.is_empty() && !propagation && !read_only_dev {
        return Ok(());
    }
    let table = join_mounts(pid).map_err(CreateError::Mounts)?;
    device_directories::set_right(directories)
        .map_err(|(directory, error)| CreateError::Directory(directory, error))?;
    if propagation {
        propagation::apply(spec, &table)
            .map_err(|(path, error)| CreateError::Propagation(path, error))?;
    }
    if read_only_dev {
        mount_options::close_dev().map_err(CreateError::Dev)?;
    }
    Ok(())
}

/// Enters a process's mount namespace, which only a single-threaded process can; returns what is
/// mounted there.
fn join_mounts(pid: i32) -> std::io::Result<String> {
    let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logged_error_becomes_one_sentence() {
        let mut fields = Map::new();
        fields.insert("level".to_owned(), "error".into());
        fields.insert("message".to_owned(), "mount failed".into());
        fields.insert("err".to_owned(), "ENOENT".into());
        assert_eq!(sentence(&fields), "mount failed, err=ENOENT");
    }
}
