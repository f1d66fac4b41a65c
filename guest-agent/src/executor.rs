//! Runs the user's program as the last step of a container's init, with the statuses and words of
//! runc where libcontainer's own executor differs: a program that is not there and one that cannot
//! be executed are told apart before the container counts as created, any execute permission will
//! do, and a program that then fails to run says so on its standard error and exits with 1.

// UNSAFETY: std runs a shell on a file that the kernel refuses to execute, and ignores the
// broken-pipe signal for every program that it does not start itself.
#![expect(unsafe_code, reason = "execve(2), and signal(2) before it")]

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::{CString, NulError};
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::{iter, ptr};

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::Spec;
use rustix::fs::{
    Access, AtFlags, CWD, FileType, Mode, OFlags, accessat, fchown, fstat, major, minor, open,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use rustix::termios::isatty;

use crate::confinement::Confinement;
use crate::hooks::Hooks;
use crate::report::{Line, Report};
use crate::terminal;

/// Major and minor number of `/dev/null`, Documentation/admin-guide/devices.txt.
const NULL_DEVICE: (u32, u32) = (1, 3);

/// The user's program, and where to report what is wrong with it.
#[derive(Clone)]
pub(crate) struct Program {
    report: Rc<Report>,
    /// What libcontainer leaves to this step.
    confinement: Confinement,
    /// The startContainer hooks, which run before it.
    hooks: Option<Rc<Hooks>>,
    /// Its terminal ends lines with a line feed alone.
    plain_lines: bool,
}

/// Why a program cannot be run.
#[derive(Debug)]
enum Unusable {
    NotInPath,
    /// It cannot be examined, mostly because it does not exist.
    Unseen(PathBuf, io::Error),
    NotExecutable(io::Error),
}

impl Program {
    /// A program. If it is a container's first one, startContainer hooks run before it.
    pub(crate) fn new(
        report: Rc<Report>,
        confinement: Confinement,
        hooks: Option<Rc<Hooks>>,
    ) -> Self {
        Self { report, confinement, hooks, plain_lines: false }
    }

    /// Sets whether its terminal ends lines with a line feed alone, or as terminals do.
    pub(crate) fn with_plain_lines(self, plain_lines: bool) -> Self {
        Self { plain_lines, ..self }
    }

    /// The steps before the lookup of the program, which needs the credentials of its user.
    fn prepare(&self) -> Result<(), String> {
        own_terminal().map_err(|error| {
            format!("unable to give the terminal to its user: {}", words(&error))
        })?;
        self.confinement.enter()
    }

    /// Runs hooks and becomes the program; returns only if it cannot, with the reason.
    fn become_program(&self, spec: &Spec) -> Result<Infallible, String> {
        let (name, arguments) = command(spec)?;
        let path = find(name, search_path(spec))
            .map_err(|unusable| format!("exec: {name:?}: {unusable}"))?;
        make_null_writable().map_err(|error| format!("/dev/null: {}", words(&error)))?;
        if self.plain_lines {
            let plain = terminal::end_lines_plainly(rustix::stdio::stdout());
            plain.map_err(|error| format!("terminal: {}", words(&error)))?;
        }
        if let Some(hooks) = &self.hooks {
            hooks.start(&self.confinement).map_err(|error| error.to_string())?;
        }
        let executed = self.execute(&path, arguments, environment(spec));
        executed.map_err(|error| format!("exec {}: {}", path.display(), words(&error)))
    }

    /// Becomes the program; returns only if it cannot.
    fn execute(
        &self,
        path: &Path,
        arguments: &[String],
        environment: &[String],
    ) -> Result<Infallible, io::Error> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let (arguments, environment) = (strings(arguments)?, strings(environment)?);
        let (arguments, environment) = (pointers(&arguments), pointers(&environment));
        // SAFETY: the default action is valid for this signal, and no code of ours runs on it.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        // The last step, so that the filter need not allow what this process does before.
        self.confinement.seal()?;
        // SAFETY: all three point to strings that end in NUL, the lists end in a null pointer, and
        // all of them live until after the call.
        unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
        Err(io::Error::last_os_error())
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        if let Err(reason) = self.prepare() {
            self.report.write(Line::Unprepared(reason.clone()));
            return Err(ExecutorValidationError::ArgValidationError(reason));
        }
        let (name, _) = command(spec).map_err(ExecutorValidationError::ArgValidationError)?;
        let Err(unusable) = find(name, search_path(spec)) else { return Ok(()) };
        let reason = format!("exec: {name:?}: {unusable}");
        self.report.write(match unusable {
            Unusable::NotInPath => Line::NotFound(reason.clone()),
            Unusable::Unseen(_, error) if error.kind() == ErrorKind::NotFound => {
                Line::NotFound(reason.clone())
            }
            Unusable::Unseen(..) | Unusable::NotExecutable(_) => {
                Line::NotExecutable(reason.clone())
            }
        });
        Err(ExecutorValidationError::ArgValidationError(reason))
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The program gets what its specification says, in that order; this process keeps its own.
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Err(reason) = self.become_program(spec);
        say(&reason);
        // As runc's init does. The container counts as started, so nobody else is told.
        std::process::exit(1)
    }
}

/// Says why there is no program: on the container's standard error, the only place that is left.
fn say(message: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), format!("{message}\n").as_bytes());
}

/// Gives the terminal, if the streams are one, to the user that this process has become, so that its
/// program can open `/dev/stdout` again. Its group stays: file systems of terminals have their own.
fn own_terminal() -> io::Result<()> {
    let stdin = rustix::stdio::stdin();
    if !isatty(stdin) {
        return Ok(());
    }
    match fchown(stdin, Some(geteuid()), None) {
        // As under runc: the user namespace may not map its group, and `/dev` may be read-only.
        Err(Errno::INVAL | Errno::PERM | Errno::ROFS) => Ok(()),
        owned => Ok(owned?),
    }
}

/// Opens the null device again where it stands for standard output or error: libcontainer has put
/// the container's own there, but for reading only.
fn make_null_writable() -> io::Result<()> {
    let is_null = |fd: BorrowedFd<'_>| {
        fstat(fd).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
                && (major(stat.st_rdev), minor(stat.st_rdev)) == NULL_DEVICE
        })
    };
    let null = || open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    if is_null(rustix::stdio::stdout()) {
        rustix::stdio::dup2_stdout(null()?)?;
    }
    if is_null(rustix::stdio::stderr()) {
        rustix::stdio::dup2_stderr(null()?)?;
    }
    Ok(())
}

fn strings(texts: &[String]) -> Result<Vec<CString>, NulError> {
    texts.iter().map(|text| CString::new(text.as_bytes())).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain(iter::once(ptr::null())).collect()
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Docker and others look for these very words.
            Self::NotInPath => f.write_str("executable file not found in $PATH"),
            Self::Unseen(path, error) => write!(f, "stat {}: {}", path.display(), words(error)),
            Self::NotExecutable(error) => f.write_str(&words(error)),
        }
    }
}

/// The name of the program, and its arguments, which begin with that name.
fn command(spec: &Spec) -> Result<(&str, &[String]), String> {
    let process = spec.process().as_ref();
    let arguments = process.and_then(|process| process.args().as_deref()).unwrap_or_default();
    let name = arguments.first().ok_or_else(|| "process.args is empty".to_owned())?;
    Ok((name, arguments))
}

fn environment(spec: &Spec) -> &[String] {
    let process = spec.process().as_ref();
    process.and_then(|process| process.env().as_deref()).unwrap_or_default()
}

/// The container's own `PATH`, empty if it has none.
fn search_path(spec: &Spec) -> &str {
    environment(spec).iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default()
}

/// Where the program is: as a shell looks for it, in the container's root.
fn find(name: &str, search_path: &str) -> Result<PathBuf, Unusable> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return check(&path).map(|()| path);
    }
    search_path
        .split(':')
        .filter(|_| !name.is_empty())
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .find(|path| check(path).is_ok())
        .ok_or(Unusable::NotInPath)
}

/// Whether this process may execute the file.
fn check(path: &Path) -> Result<(), Unusable> {
    let found = path.metadata().map_err(|error| Unusable::Unseen(path.to_owned(), error))?;
    if found.is_dir() {
        return Err(Unusable::NotExecutable(Errno::ISDIR.into()));
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
        .map_err(|error| Unusable::NotExecutable(error.into()))
}

/// An error as C and Go word it, without Rust's number behind it.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn directory_with(name: &str, mode: u32) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        directory
    }

    #[test]
    fn a_program_is_found_in_the_search_path() {
        let directory = directory_with("tool", 0o700);
        let path = format!("/nonexistent:{}", directory.path().display());
        assert_eq!(find("tool", &path).unwrap(), directory.path().join("tool"));
    }

    #[test]
    fn missing_and_forbidden_programs_are_told_apart() {
        let directory = directory_with("data", 0o600);
        let path = directory.path().to_str().unwrap();
        let missing = find("tool", path).unwrap_err();
        assert_eq!(missing.to_string(), "executable file not found in $PATH");
        let missing = find("/no/such/tool", path).unwrap_err();
        assert!(matches!(missing, Unusable::Unseen(..)));
        assert_eq!(missing.to_string(), "stat /no/such/tool: no such file or directory");
        let forbidden = find(&format!("{path}/data"), path).unwrap_err();
        assert!(matches!(forbidden, Unusable::NotExecutable(_)));
        assert_eq!(forbidden.to_string(), "permission denied");
        let directory = find(path, path).unwrap_err();
        assert_eq!(directory.to_string(), "is a directory");
    }

    #[test]
    fn an_empty_name_is_not_found() {
        assert!(matches!(find("", "/bin"), Err(Unusable::NotInPath)));
    }
}
