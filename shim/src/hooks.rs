//! Hooks that run on the host: OCI runtime-spec, "POSIX-platform Hooks".
//!
//! By the specification a container is not created when one of prestart or createRuntime fails
//! ([`run_or_fail`]); one of poststart or poststop that fails is reported and changes nothing
//! ([`run`], [`poststop`]). startContainer belongs to the guest, and createContainer is refused
//! ([`crate::bundle::refuse`]).

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use oci_spec::runtime::Hook;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::lifecycle::Status;
use crate::process::Process;
use crate::state::{Home, State, View};

/// For hooks without a timeout of their own.
const PATIENCE: Duration = Duration::from_secs(60);
/// As much of a failed hook's standard error becomes part of the error, in bytes.
const WORDS_MAX: u64 = 1024;

/// Runs hooks one after the other; each reads the container's state.
pub fn run(kind: &'static str, hooks: &[Hook], state: &View) {
    for hook in hooks {
        if let Err(error) = run_one(hook, state) {
            let path = hook.path().display().to_string();
            tracing::warn!(kind, path, error = %error, "hook failed");
        }
    }
}

/// Runs a container's poststop hooks, the last thing that happens to it.
pub fn poststop(home: &Home, mut state: State) {
    state.status = Status::Stopped;
    let hooks = std::mem::take(&mut state.poststop);
    run("poststop", &hooks, &home.view(state));
}

/// Runs hooks one after the other until one fails.
///
/// # Errors
/// Says which, and what it said on standard error.
pub fn run_or_fail(kind: &'static str, hooks: &[Hook], state: &View) -> io::Result<()> {
    for (number, hook) in hooks.iter().enumerate() {
        run_one(hook, state).map_err(|error| {
            let path = hook.path().display();
            io::Error::other(format!("error running {kind} hook #{number}, {path}: {error}"))
        })?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &View) -> io::Result<()> {
    let mut command = Command::new(hook.path());
    // A file, which never fills up as a pipe would.
    let mut words = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(words.try_clone()?).env_clear();
    // The first argument is the name that the hook is called by.
    if let Some((name, args)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(args);
    }
    for variable in hook.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(name, value);
    }
    let mut child = command.spawn()?;
    let json = serde_json::to_vec(state)?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(&json));
    let patience = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let patience = patience.map_or(PATIENCE, Duration::from_secs);
    let ended = Process::find(child.id()).is_ok_and(|process| process.wait(patience));
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    match written {
        _ if !ended => Err(io::Error::other(format!("not done within {patience:?}"))),
        _ if !status.success() => {
            let mut said = Vec::new();
            words.rewind()?;
            words.take(WORDS_MAX).read_to_end(&mut said)?;
            let said = String::from_utf8_lossy(&said);
            Err(io::Error::other(format!("{status}, stderr: {}", said.trim())))
        }
        // A hook need not read its input.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;
    use std::path::Path;

    fn view() -> (tempfile::TempDir, View) {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &"a".parse().unwrap(), Path::new("/b")).unwrap();
        let state = home.read().unwrap();
        let view = home.view(state);
        (root, view)
    }

    fn shell(script: &str, timeout: i64) -> Hook {
        let hook = json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["X=1"], "timeout": timeout
        });
        serde_json::from_value(hook).unwrap()
    }

    #[test]
    fn a_hook_reads_the_state_and_has_only_its_own_environment() {
        let (root, view) = view();
        let out = root.path().join("out");
        let script = format!("cat >{0}; echo $X$HOME >>{0}", out.display());
        run_one(&shell(&script, 10), &view).unwrap();
        let text = fs::read_to_string(out).unwrap();
        assert!(text.contains(r#""id":"a""#) && text.ends_with("}1\n"), "{text}");
    }

    #[test]
    fn a_hook_that_fails_or_takes_too_long_is_an_error() {
        let (_root, view) = view();
        let hooks = [shell("true", 10), shell("echo broken >&2; exit 3", 10)];
        let error = run_or_fail("prestart", &hooks, &view).unwrap_err();
        let words = "error running prestart hook #1, /bin/sh: exit status: 3, stderr: broken";
        assert_eq!(error.to_string(), words);
        let error = run_one(&shell("sleep 60", 0), &view).unwrap_err();
        assert!(error.to_string().contains("not done within"), "{error}");
        run_one(&shell("exec <&-", 10), &view).unwrap();
    }
}
