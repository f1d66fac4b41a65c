//! Hooks that run in the guest: OCI runtime-spec, "POSIX-platform Hooks".
//!
//! startContainer hooks run in the container's init, right before its program ([`Hooks::start`]).
//!
//! createContainer hooks run when the container's mounts are made and its init is not yet confined
//! to them. Libcontainer would start them in the agent's own root, which has no programs. So it
//! gets a single hook, this binary in its fourth life ([`main`]), which makes the container's root
//! its own and runs the hooks there.

// UNSAFETY: std has no safe way to have a child do something before its program runs.
#![expect(unsafe_code, reason = "pre_exec")]

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use bulkhead_protocol::SHARE_DIR;
use oci_spec::runtime::{ContainerState, Hook, Hooks as InSpec, HooksBuilder, Spec, State};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{chroot, getppid};
use serde::{Deserialize, Serialize};

use crate::confinement::Confinement;
use crate::creator::ContainerFiles;
use crate::report::{Line, Report};

/// The first argument that makes the agent run createContainer hooks; the second is the container's id.
pub(crate) const VERB: &str = "hooks";
/// The message if a program, or the interpreter of a script, does not exist.
const NOT_FOUND: &str = "it, or what interprets it, is not in the container's root, and libraries of the \
                         host are not there: link it statically, or put it into the container";
/// The name of the file, in the bundle.
const FILE: &str = "hooks.json";

/// The hooks of a container that run in the guest, and the state that they read.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hooks {
    root: PathBuf,
    state: State,
    create_container: Vec<Hook>,
    start_container: Vec<Hook>,
}

impl Hooks {
    /// Takes the hooks out of a specification that has been checked, and adds the hook that runs
    /// createContainer hooks; `None` if there are none. `bundle` is the container's directory on
    /// the host.
    pub(crate) fn take(spec: &mut Spec, id: &str, bundle: &str) -> io::Result<Option<Self>> {
        let Some(hooks) = spec.hooks_mut().take() else { return Ok(None) };
        let process = spec.process().as_ref();
        // As under runc a hook without an environment gets the container's, never the agent's own.
        let environment = process.and_then(|process| process.env().clone()).unwrap_or_default();
        let take = |list: &Option<Vec<Hook>>| {
            let mut list = list.clone().unwrap_or_default();
            for hook in list.iter_mut().filter(|hook| hook.env().is_none()) {
                hook.set_env(Some(environment.clone()));
            }
            list
        };
        let (create, start) = (take(hooks.create_container()), take(hooks.start_container()));
        if create.is_empty() && start.is_empty() {
            return Ok(None);
        }
        if !create.is_empty() {
            spec.set_hooks(Some(this_binary(id)?));
        }
        let mut state = State::default();
        state.set_version(spec.version().clone()).set_id(id.to_owned());
        state.set_bundle(bundle.into()).set_annotations(spec.annotations().clone());
        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        Ok(Some(Self { root, state, create_container: create, start_container: start }))
    }

    /// Writes them for the creator and for [`main`], which may be in a user namespace and writes to
    /// the report.
    pub(crate) fn write(&self, files: &ContainerFiles) -> io::Result<()> {
        fs::write(files.bundle.join(FILE), serde_json::to_vec(self)?)?;
        drop(Report::open(&files.report())?);
        fs::set_permissions(files.report(), Permissions::from_mode(0o666))
    }

    /// Reads those that [`Hooks::write`] has left, if it has.
    pub(crate) fn read(files: &ContainerFiles) -> io::Result<Option<Self>> {
        match fs::read(files.bundle.join(FILE)) {
            Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs the startContainer hooks. This process is the container's init, and its filter applies
    /// to them already.
    pub(crate) fn start(&self, confinement: &Confinement) -> io::Result<()> {
        let state = self.state(ContainerState::Created, std::process::id())?;
        self.start_container.iter().enumerate().try_for_each(|(number, hook)| {
            let mut command = Command::new(hook.path());
            let confinement = confinement.clone();
            // SAFETY: the closure makes system calls and nothing else, and allocates no memory.
            unsafe { command.pre_exec(move || confinement.seal()) };
            run(("startContainer", number, hook), command, &state)
        })
    }

    /// Runs the createContainer hooks. This process is a child of the container's init, which is
    /// not yet confined to its root.
    fn create(&self) -> io::Result<()> {
        let init = getppid().map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs());
        let state = self.state(ContainerState::Creating, init)?;
        let programs = self.create_container.iter().map(Program::open);
        let programs = programs.collect::<io::Result<Vec<_>>>()?;
        chroot(&self.root)?;
        std::env::set_current_dir("/")?;
        let mut list = self.create_container.iter().zip(&programs).enumerate();
        list.try_for_each(|(number, (hook, program))| {
            run(("createContainer", number, hook), Command::new(program.path()), &state)
        })
    }

    /// The state that hooks read.
    fn state(&self, status: ContainerState, init: u32) -> io::Result<Vec<u8>> {
        let mut state = self.state.clone();
        state.set_status(status).set_pid(i32::try_from(init).ok());
        Ok(serde_json::to_vec(&state)?)
    }
}

/// The program of a createContainer hook.
enum Program {
    /// A file of the host, to which no path in the container's root leads.
    OfHost(File),
    /// A path in the container's root.
    OfContainer(PathBuf),
}

impl Program {
    fn open(hook: &Hook) -> io::Result<Self> {
        if !hook.path().starts_with(SHARE_DIR) {
            return Ok(Self::OfContainer(hook.path().clone()));
        }
        let file = File::open(hook.path())?;
        // Not close-on-exec, because a script's interpreter opens it again.
        fcntl_setfd(&file, FdFlags::empty())?;
        Ok(Self::OfHost(file))
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::OfHost(file) => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            Self::OfContainer(path) => path.clone(),
        }
    }
}

/// Runs one hook: its kind, and its number among them.
fn run(
    (kind, number, hook): (&str, usize, &Hook),
    command: Command,
    state: &[u8],
) -> io::Result<()> {
    bulkhead_hooks::run(hook, command, state).map_err(|error| {
        let error = match error.kind() {
            io::ErrorKind::NotFound => io::Error::other(NOT_FOUND),
            _ => error,
        };
        let called = hook.args().iter().flatten().next();
        let name = called.map_or(hook.path().as_path(), Path::new);
        bulkhead_hooks::failed(kind, number, name, &error)
    })
}

/// The hook that libcontainer runs instead of those of the specification.
fn this_binary(id: &str) -> io::Result<InSpec> {
    let arguments = ["bulkhead-agent", VERB, id].map(str::to_owned);
    let mut hook = Hook::default();
    hook.set_path(std::env::current_exe()?).set_args(Some(arguments.to_vec()));
    HooksBuilder::default().create_container(vec![hook]).build().map_err(io::Error::other)
}

/// Runs a container's createContainer hooks, and reports the one that failed.
pub(crate) fn main(container_id: &str) -> ExitCode {
    let files = ContainerFiles::of(container_id);
    // Opened first, because the container's root has no report.
    let Ok(report) = Report::open(&files.report()) else { return ExitCode::FAILURE };
    let ran = Hooks::read(&files).and_then(|hooks| hooks.map_or(Ok(()), |hooks| hooks.create()));
    let Err(error) = ran else { return ExitCode::SUCCESS };
    report.write(Line::Detail(error.to_string()));
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confinement::Restrictions;
    use serde_json::{Value, json};

    fn spec(hooks: &Value) -> Spec {
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/r"},
            "annotations": {"a": "b"},
            "process": {"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["C=1"]},
            "hooks": hooks
        });
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn hooks_are_taken_out_and_one_that_runs_them_is_left() {
        let mut spec = spec(&json!({
            "createContainer": [{"path": "/x"}],
            "startContainer": [{"path": "/y", "env": ["D=2"]}]
        }));
        let hooks = Hooks::take(&mut spec, "one", "/b").unwrap().unwrap();
        assert_eq!(hooks.create_container[0].env().as_deref(), Some(&["C=1".to_owned()][..]));
        assert_eq!(hooks.start_container[0].env().as_deref(), Some(&["D=2".to_owned()][..]));
        let state = hooks.state(ContainerState::Creating, 7).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        let expected = json!({
            "ociVersion": "1.0.2", "id": "one", "status": "creating", "pid": 7, "bundle": "/b",
            "annotations": {"a": "b"}
        });
        assert_eq!(state, expected);
        let left = serde_json::to_value(spec.hooks()).unwrap();
        assert_eq!(left["createContainer"][0]["args"], json!(["bulkhead-agent", "hooks", "one"]));
        assert!(left.get("startContainer").is_none());
    }

    #[test]
    fn a_specification_without_hooks_is_left_alone() {
        for hooks in [json!({}), json!({"createContainer": []})] {
            let mut spec = spec(&hooks);
            assert_eq!(Hooks::take(&mut spec, "one", "/b").unwrap(), None);
            assert!(spec.hooks().is_none());
        }
    }

    #[test]
    fn hooks_that_were_written_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let bundle = directory.path().to_owned();
        let files = ContainerFiles { state: bundle.clone(), bundle };
        assert_eq!(Hooks::read(&files).unwrap(), None);
        let mut spec = spec(&json!({"startContainer": [{"path": "/y"}]}));
        let hooks = Hooks::take(&mut spec, "one", "/b").unwrap().unwrap();
        hooks.write(&files).unwrap();
        assert_eq!(Hooks::read(&files).unwrap(), Some(hooks));
    }

    #[test]
    fn the_hook_that_fails_is_named_as_it_was_called() {
        let mut spec = spec(&json!({"startContainer": [
            {"path": "/bin/true"},
            {"path": "/bin/sh", "args": ["broken", "-c", "echo why >&2; exit 4"]}
        ]}));
        let hooks = Hooks::take(&mut spec, "one", "/b").unwrap().unwrap();
        let words = "error running startContainer hook #1, broken: exit status: 4, stderr: why";
        let confinement = Restrictions::default().prepare().unwrap();
        assert_eq!(hooks.start(&confinement).unwrap_err().to_string(), words);
    }
}
