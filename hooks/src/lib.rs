//! Hooks: OCI runtime-spec, "POSIX-platform Hooks".
//!
//! A hook is a program that reads the container's state from its standard input, and may have a
//! timeout. The supervisor runs the hooks of the host, the agent those of the guest. The caller
//! provides the [`Command`] that executes a hook; everything else is the same for both.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The most bytes of a failed hook's standard error that become part of the error.
const WORDS_MAX: u64 = 1024;

/// How long a hook may take; `None` if it has no timeout.
#[must_use]
pub fn patience(hook: &Hook) -> Option<Duration> {
    hook.timeout().map(|seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Names the hook that failed: the `number`th of its kind.
#[must_use]
pub fn failed(kind: &str, number: usize, name: &Path, error: &io::Error) -> io::Error {
    let name = name.display();
    io::Error::other(format!("error running {kind} hook #{number}, {name}: {error}"))
}

/// Runs one hook to its end by `command`, which gets its arguments and the container's state as
/// JSON. A hook without an environment of its own has that of `command`. The hook's output is
/// discarded, but its standard error becomes part of an error.
///
/// # Errors
/// When it cannot be started, ends with another status than 0, or not in time; it is killed then.
pub fn run(hook: &Hook, mut command: Command, state: &[u8]) -> io::Result<()> {
    // A file, because a pipe could fill up and block the hook.
    let mut words = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(words.try_clone()?);
    // The first argument is the name that the hook is called by.
    match hook.args().as_deref().and_then(<[String]>::split_first) {
        Some((name, args)) => command.arg0(name).args(args),
        None => command.arg0(hook.path()),
    };
    if let Some(environment) = hook.env() {
        command.env_clear();
        for variable in environment {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            command.env(name, value);
        }
    }
    let mut child = command.spawn()?;
    let patience = patience(hook);
    let ended = feed(&mut child, state, patience);
    if !matches!(ended, Ok(true)) {
        child.kill()?;
    }
    let status = child.wait()?;
    if !ended? {
        let patience = patience.unwrap_or_default();
        return Err(io::Error::other(format!("not done within {patience:?}")));
    }
    if status.success() {
        return Ok(());
    }
    let mut said = Vec::new();
    words.rewind()?;
    words.take(WORDS_MAX).read_to_end(&mut said)?;
    let said = String::from_utf8_lossy(&said);
    Err(io::Error::other(format!("{status}, stderr: {}", said.trim())))
}

/// Writes a child its input and waits for its end; returns false if its time is up before.
///
/// The child need not read its input: a pipe that is full must not hide that the time is up.
fn feed(child: &mut Child, mut input: &[u8], patience: Option<Duration>) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    // The pid is not reused until the child has been waited for.
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let mut stdin = child.stdin.take();
    if let Some(stdin) = &stdin {
        fcntl_setfl(stdin, OFlags::NONBLOCK)?;
    }
    // A deadline that no clock reaches is none.
    let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
    loop {
        stdin = stdin.filter(|_| !input.is_empty());
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut polled = vec![PollFd::new(&process, PollFlags::IN)];
        polled.extend(stdin.as_ref().map(|stdin| PollFd::new(stdin, PollFlags::OUT)));
        match poll(&mut polled, left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) if !polled[0].revents().is_empty() => return Ok(true),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let Some(pipe) = &stdin else { continue };
        match rustix::io::write(pipe, input) {
            Ok(count) => input = &input[count..],
            Err(Errno::PIPE) => stdin = None,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::HookBuilder;
    use std::fs;

    fn shell(script: &str, timeout: i64) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        let hook = HookBuilder::default().path("/bin/sh").args(args).timeout(timeout);
        hook.env(vec!["X=1".to_owned()]).build().unwrap()
    }

    fn run_here(hook: &Hook) -> io::Result<()> {
        run(hook, Command::new(hook.path()), b"the state\n")
    }

    #[test]
    fn a_hook_reads_the_state_and_has_only_its_own_environment() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let script = format!("cat >{0}; echo $X$HOME >>{0}", out.display());
        run_here(&shell(&script, 10)).unwrap();
        assert_eq!(fs::read_to_string(out).unwrap(), "the state\n1\n");
    }

    #[test]
    fn a_hook_without_an_environment_has_that_of_who_runs_it() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let mut hook = shell(&format!("echo $X$OTHERS >{}", out.display()), 10);
        hook.set_env(None);
        let run_with = |hook: &Hook| {
            let mut command = Command::new(hook.path());
            command.env("OTHERS", "here");
            run(hook, command, b"").unwrap();
            fs::read_to_string(&out).unwrap()
        };
        assert_eq!(run_with(&hook), "here\n");
        hook.set_env(Some(Vec::new()));
        assert_eq!(run_with(&hook), "\n");
    }

    #[test]
    fn a_hook_that_fails_is_an_error_with_its_words() {
        let hook = shell("echo broken >&2; exit 3", 10);
        let error = failed("prestart", 1, hook.path(), &run_here(&hook).unwrap_err());
        let words = "error running prestart hook #1, /bin/sh: exit status: 3, stderr: broken";
        assert_eq!(error.to_string(), words);
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed() {
        let started = Instant::now();
        let error = run_here(&shell("exec sleep 60", 0)).unwrap_err();
        assert!(error.to_string().contains("not done within"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    /// It is larger than a pipe, as annotations can be.
    #[test]
    fn a_large_state_is_read_whole_and_does_not_hide_that_the_time_is_up() {
        let state = vec![b'x'; 1 << 20];
        let hook = shell("test $(wc -c) = 1048576", 30);
        run(&hook, Command::new(hook.path()), &state).unwrap();
        let started = Instant::now();
        let hook = shell("exec sleep 60", 1);
        let error = run(&hook, Command::new(hook.path()), &state).unwrap_err();
        assert!(error.to_string().contains("not done within"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_hook_without_a_timeout_takes_as_long_as_it_likes() {
        let hook = HookBuilder::default().path("/bin/sh").build().unwrap();
        assert_eq!(patience(&hook), None);
        assert_eq!(patience(&shell("true", -1)), Some(Duration::ZERO));
        assert_eq!(patience(&shell("true", 3)), Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_hook_need_not_read_and_may_write_as_much_as_it_likes() {
        run_here(&shell("exec <&-", 10)).unwrap();
        run_here(&shell("head -c 200000 /dev/zero; head -c 200000 /dev/zero >&2", 10)).unwrap();
    }
}
