//! Finds out why a supervisor does not answer: if it ends while a caller waits, the caller is told
//! why.

use std::io::Read;
use std::time::Duration;

use anyhow::anyhow;
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

use crate::state::Home;
use crate::state::process::Process;
use crate::supervisor;

/// How long a process may take to be gone after its sockets were closed.
const GOING: Duration = Duration::from_secs(5);
/// The signal that a program sends itself when it fails; it has written why.
const ABORTED: i32 = Signal::ABORT.as_raw();
const KILLED: i32 = Signal::KILL.as_raw();

/// The error message of a failed call: the supervisor's own, or how the supervisor ended.
pub(super) fn words(
    home: &Home,
    supervisor: Option<Process>,
    error: ttrpc::Error,
) -> anyhow::Error {
    match error {
        ttrpc::Error::RpcStatus(status) => anyhow!(status.message),
        broken if supervisor.is_none_or(|it| it.wait(GOING)) => {
            anyhow!(end(home, supervisor, &broken))
        }
        broken => anyhow!("the connection to the pod's supervisor failed: {broken}"),
    }
}

/// How a supervisor that is gone has ended.
fn end(home: &Home, supervisor: Option<Process>, broken: &ttrpc::Error) -> String {
    let signal = supervisor.and_then(signal).filter(|signal| *signal != ABORTED);
    match (signal, last_words(home)) {
        (Some(KILLED), _) => {
            "the pod's supervisor was killed by signal 9: by the kernel if memory \
                              ran out (see dmesg), or by another process"
                .to_owned()
        }
        (Some(signal), _) => format!("the pod's supervisor was killed by signal {signal}"),
        (None, Some(words)) => format!("the pod's supervisor failed: {words}"),
        (None, None) => format!("the pod's supervisor has ended: {broken}"),
    }
}

/// The last line that it wrote.
fn last_words(home: &Home) -> Option<String> {
    let mut log = Vec::new();
    home.file(supervisor::LOG, OFlags::RDONLY).ok()?.read_to_end(&mut log).ok()?;
    let log = String::from_utf8_lossy(&log);
    log.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
}

/// The signal that killed a child of this process; it can still be waited for.
fn signal(child: Process) -> Option<i32> {
    let pid = Pid::from_raw(child.pid.cast_signed())?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::Pid(pid), options).ok()??.terminating_signal()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::{Child, Command};

    fn ended(script: &str) -> (Child, Process) {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let process = Process::find(child.id()).unwrap();
        (child, process)
    }

    fn told(home: &Home, script: &str) -> String {
        let (mut child, process) = ended(script);
        let error = words(home, Some(process), ttrpc::Error::Socket("early eof".to_owned()));
        child.wait().unwrap();
        error.to_string()
    }

    #[test]
    fn whatever_ends_a_supervisor_is_told() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &"a".parse().unwrap(), Path::new("/b")).unwrap();
        let killed = told(&home, "kill -9 $$");
        assert!(killed.starts_with("the pod's supervisor was killed by signal 9: "), "{killed}");
        assert_eq!(told(&home, "kill -11 $$"), "the pod's supervisor was killed by signal 11");
        let silent = "the pod's supervisor has ended: socket err: early eof";
        assert_eq!(told(&home, "exit 1"), silent);
        std::fs::write(home.dir().join(supervisor::LOG), "first\n\npanicked at x.rs:1:2: oh\n\n")
            .unwrap();
        let failed = "the pod's supervisor failed: panicked at x.rs:1:2: oh";
        assert_eq!(told(&home, "kill -6 $$"), failed);
    }

    #[test]
    fn the_words_of_one_that_answers_are_its_own() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &"a".parse().unwrap(), Path::new("/b")).unwrap();
        let status = ttrpc::error::get_rpc_status(ttrpc::Code::INTERNAL, "no room");
        let error = words(&home, Process::current().ok(), status);
        assert_eq!(error.to_string(), "no room");
    }
}
