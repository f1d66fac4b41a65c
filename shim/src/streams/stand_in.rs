//! The process that stays behind `create`, `run --detach` and `exec --detach` and stands for a
//! process of the container. It is a program of its own, because there is one for each container,
//! for as long as that lives. It contains only the [`Relay`], and the code that gives the
//! interfaces of its network namespace back when the supervisor was killed.
//!
//! On the host it is called as the process that it stands for: its command line is that one's, and
//! so is its name. What it has to do comes through a pipe, and its environment is empty: the
//! container's would choose libraries for a program of the host
//! (`docs/decisions/0026-names-on-the-host.md`).

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::machine::spawn;
use crate::network::mirror;
use crate::network::namespace::Network;
use crate::state::Home;
use crate::state::id::ContainerId;
use crate::state::socket_path::SocketPath;
use crate::streams::preserved::{self, Preserved};
use crate::streams::relay::{Belongings, Relay, Signals};
use crate::streams::terminal::Terminal;

/// How long to wait for the end of a monitor whose supervisor is gone. It takes less.
const MONITOR_ENDS: Duration = Duration::from_secs(5);
/// The descriptor with its [`Options`], behind all that can be preserved.
const OPTIONS: RawFd = 64;

/// What a stand-in is started for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// The directory of all containers.
    pub root: PathBuf,
    /// The container.
    pub id: ContainerId,
    /// The name of a process that is executed in it; empty for its init process.
    pub exec: String,
    /// Its standard streams are a terminal, which becomes its controlling terminal.
    pub terminal: bool,
    /// The network namespace that it moves to.
    pub network: Option<Network>,
    /// How many descriptors it inherits beyond its standard streams.
    pub preserved: u32,
}

impl Options {
    /// The command that runs `program` with them, under the name of a process with these arguments.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn command(&self, program: &Path, arguments: &[String]) -> io::Result<Command> {
        let mut command = Command::new(program);
        let mut shown = arguments.iter().map(|argument| until_nul(argument));
        // A process without arguments is refused before.
        command.arg0(shown.next().unwrap_or_default()).args(shown).env_clear();
        spawn::hand_down_as(&mut command, self.pipe()?, OPTIONS)?;
        Ok(command)
    }

    /// The read end of a pipe with the options. They are much smaller than a pipe.
    fn pipe(&self) -> io::Result<OwnedFd> {
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(&serde_json::to_vec(self)?)?;
        Ok(reader.into())
    }

    fn read(pipe: OwnedFd) -> anyhow::Result<Self> {
        let mut json = Vec::new();
        File::from(pipe).read_to_end(&mut json)?;
        Ok(serde_json::from_slice(&json)?)
    }
}

/// What execve(2) takes of an argument. The guest refuses one that is longer.
fn until_nul(argument: &str) -> &str {
    argument.split('\0').next().unwrap_or_default()
}

/// The whole program; exits with the status of the process that it stands for.
#[must_use]
pub fn main() -> ExitCode {
    // Before anything is opened.
    let options = preserved::inherited(OPTIONS).context("no options").and_then(Options::read);
    let ended = options.and_then(|options| stand(&options));
    // Nobody would read a message. If the supervisor is gone, the container was killed.
    ended.unwrap_or(ExitCode::from(137))
}

fn stand(options: &Options) -> anyhow::Result<ExitCode> {
    let preserved = Preserved::take(options.preserved)?;
    // Before any thread starts.
    take_name();
    let signals = Signals::hold()?;
    let home = Home::open(&options.root, &options.id)?;
    if let Some(network) = &options.network {
        network.enter().context("network namespace")?;
    }
    let terminal = if options.terminal { Some(Terminal::own()?) } else { None };
    if let Some(terminal) = &terminal {
        terminal.control()?;
    }
    let socket = SocketPath::attach(&home)?;
    let belongings = Belongings { terminal, preserved, home: Some(home) };
    let relay = Relay::connect(socket.path(), true, belongings)?;
    // Before any caller learns its pid.
    relay.hide()?;
    relay.attach(&options.exec)?;
    let ended = relay.serve(&signals);
    if ended.is_err() && options.network.is_some() {
        // The supervisor, which would have given its interfaces back, is gone.
        mirror::restore_here(MONITOR_ENDS)?;
    }
    Ok(ExitCode::from(ended?.status))
}

/// Gives this process the name that the kernel gives to one that executes the first argument.
fn take_name() {
    let program = std::env::args_os().next().unwrap_or_default();
    // A name that cannot be set is that of this program, which is no harm.
    let _ = CString::new(name(&program)).map(|name| rustix::thread::set_name(&name));
}

/// The last part of a path, as the kernel has it: nothing after a slash at the end. The kernel cuts
/// it.
fn name(program: &OsStr) -> &[u8] {
    program.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::DESCRIPTORS_MAX;

    use super::*;

    fn plain() -> Options {
        Options {
            root: "/run/x".into(),
            id: "c".parse().unwrap(),
            exec: String::new(),
            terminal: false,
            network: None,
            preserved: 0,
        }
    }

    #[test]
    fn options_are_behind_all_descriptors_that_can_be_passed() {
        assert_eq!(usize::try_from(OPTIONS - preserved::FIRST).unwrap(), DESCRIPTORS_MAX);
    }

    #[test]
    fn options_arrive_as_they_were_given() {
        let plain = plain();
        for options in [
            plain.clone(),
            Options { exec: "0f".to_owned(), terminal: true, ..plain.clone() },
            Options { network: Some(Network::New), preserved: 7, ..plain.clone() },
            Options { network: Some(Network::Join("/n et".into())), ..plain.clone() },
        ] {
            assert_eq!(Options::read(options.pipe().unwrap()).unwrap(), options);
        }
        let (reader, _) = io::pipe().unwrap();
        assert!(Options::read(reader.into()).is_err());
    }

    #[test]
    fn a_command_shows_nothing_but_the_arguments() {
        let options = plain();
        let shown = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(|it| (*it).to_owned()).collect();
            let mut command = options.command(Path::new("/bin/sh"), &arguments).unwrap();
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        let script = "echo $#; tr '\\0' '|' < /proc/$$/cmdline; tr '\\0' '|' < /proc/$$/environ";
        let expected = format!("2\n--root|-c|{script}|x|--root|y|");
        assert_eq!(shown(&["--root", "-c", script, "x", "--root", "y\0z"]), expected);
    }

    #[test]
    fn a_name_is_the_last_part_of_the_program() {
        for (program, expected) in [("/bin/sleep", "sleep"), ("sh", "sh"), ("a/", ""), ("", "")] {
            assert_eq!(name(OsStr::new(program)), expected.as_bytes(), "{program}");
        }
    }
}
