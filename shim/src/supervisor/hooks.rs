//! Hooks that run on the host: OCI runtime-spec, "POSIX-platform Hooks".
//!
//! By the specification, a container is not created if a prestart or createRuntime hook fails
//! ([`run_or_fail`]). A poststart or poststop hook that fails is logged and changes nothing
//! ([`run`], [`poststop`]). createContainer and startContainer hooks run in the guest.

use std::io;
use std::process::Command;

use oci_spec::runtime::Hook;

use crate::state::{Home, State, View};
use crate::supervisor::lifecycle::Status;

/// Runs hooks one after the other; each reads the container's state from standard input.
pub fn run(kind: &'static str, hooks: &[Hook], state: &View) {
    for hook in hooks {
        if let Err(error) = run_one(hook, state) {
            let path = hook.path().display().to_string();
            tracing::warn!(kind, path, error = %error, "hook failed");
        }
    }
}

/// Runs a container's poststop hooks, after everything else of it was removed.
pub fn poststop(home: &Home, mut state: State) {
    state.status = Status::Stopped;
    let hooks = std::mem::take(&mut state.poststop);
    run("poststop", &hooks, &home.view(state));
}

/// Runs hooks one after the other until one fails.
///
/// # Errors
/// Names the hook, and quotes its standard error.
pub fn run_or_fail(kind: &'static str, hooks: &[Hook], state: &View) -> io::Result<()> {
    hooks.iter().enumerate().try_for_each(|(number, hook)| {
        let failed = |error| bulkhead_hooks::failed(kind, number, hook.path(), &error);
        run_one(hook, state).map_err(failed)
    })
}

fn run_one(hook: &Hook, state: &View) -> io::Result<()> {
    bulkhead_hooks::run(hook, Command::new(hook.path()), &serde_json::to_vec(state)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;
    use std::path::Path;

    #[test]
    fn hooks_run_in_their_order_until_one_fails_and_read_the_state() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &"a".parse().unwrap(), Path::new("/b")).unwrap();
        let view = home.view(home.read().unwrap());
        let out = root.path().join("out");
        let hook = |status: u8| {
            let script = format!("cat >>{}; exit {status}", out.display());
            let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
            serde_json::from_value(hook).unwrap()
        };
        let hooks = [hook(0), hook(3), hook(0)];
        let error = run_or_fail("prestart", &hooks, &view).unwrap_err();
        assert!(error.to_string().starts_with("error running prestart hook #1, /bin/sh: "));
        assert_eq!(fs::read_to_string(&out).unwrap().matches(r#""id":"a""#).count(), 2);
        run("poststop", &hooks, &view);
        assert_eq!(fs::read_to_string(&out).unwrap().matches(r#""id":"a""#).count(), 5);
    }
}
