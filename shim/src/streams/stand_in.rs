//! The process that stays behind `create`, `run --detach` and `exec --detach` and stands for a
//! process of the container. It is a program of its own, because there is one for each container,
//! for as long as that lives. It contains only the [`Relay`], and the code that gives the
//! interfaces of its network namespace back when the supervisor was killed.
//!
//! Its command line is both written and parsed here.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Context;
use lexopt::{Arg, Parser, ValueExt};

use crate::network::mirror;
use crate::network::namespace::Network;
use crate::state::Home;
use crate::state::id::ContainerId;
use crate::state::socket_path::SocketPath;
use crate::streams::preserved::Preserved;
use crate::streams::relay::{Belongings, Relay, Signals};
use crate::streams::terminal::Terminal;

/// How long to wait for the end of a monitor whose supervisor is gone. It takes less.
const MONITOR_ENDS: Duration = Duration::from_secs(5);

/// What a stand-in is started for.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The command that runs `program` with them.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("--root").arg(&self.root);
        if !self.exec.is_empty() {
            command.arg("--exec").arg(&self.exec);
        }
        if self.terminal {
            command.arg("--terminal");
        }
        match &self.network {
            Some(Network::New) => {
                command.arg("--new-network");
            }
            Some(Network::Join(path)) => {
                command.arg("--join-network").arg(path);
            }
            None => {}
        }
        if self.preserved != 0 {
            command.arg("--preserve-fds").arg(self.preserved.to_string());
        }
        command.arg(self.id.as_str());
        command
    }

    fn parse(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<Self> {
        let (mut root, mut id) = (None, None);
        let (mut exec, mut terminal, mut network) = (String::new(), false, None);
        let mut preserved = 0;
        let mut parser = Parser::from_args(arguments);
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("root") => root = Some(parser.value()?.into()),
                Arg::Long("exec") => exec = parser.value()?.string()?,
                Arg::Long("terminal") => terminal = true,
                Arg::Long("new-network") => network = Some(Network::New),
                Arg::Long("join-network") => network = Some(Network::Join(parser.value()?.into())),
                Arg::Long("preserve-fds") => preserved = parser.value()?.parse()?,
                Arg::Value(name) => id = Some(name.parse()?),
                other => return Err(other.unexpected().into()),
            }
        }
        let (root, id) = (root.context("no --root")?, id.context("no container")?);
        Ok(Self { root, id, exec, terminal, network, preserved })
    }
}

/// The whole program; exits with the status of the process that it stands for.
#[must_use]
pub fn main() -> ExitCode {
    let ended = Options::parse(env::args_os().skip(1)).and_then(|options| stand(&options));
    // Nobody would read a message. If the supervisor is gone, the container was killed.
    ended.unwrap_or(ExitCode::from(137))
}

fn stand(options: &Options) -> anyhow::Result<ExitCode> {
    // Before anything is opened.
    let preserved = Preserved::take(options.preserved)?;
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
    let belongings = Belongings { terminal, preserved };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_arrive_as_they_were_given() {
        let plain = Options {
            root: "/run/x".into(),
            id: "c".parse().unwrap(),
            exec: String::new(),
            terminal: false,
            network: None,
            preserved: 0,
        };
        for options in [
            plain.clone(),
            Options { exec: "0f".to_owned(), terminal: true, ..plain.clone() },
            Options { network: Some(Network::New), preserved: 7, ..plain.clone() },
            Options { network: Some(Network::Join("/n et".into())), ..plain.clone() },
        ] {
            let command = options.command(Path::new("/bin/x"));
            let arguments = command.get_args().map(ToOwned::to_owned);
            assert_eq!(Options::parse(arguments).unwrap(), options);
        }
        for wrong in [vec![], vec!["--root", "/x"], vec!["--root", "/x", "--other", "c"]] {
            assert!(Options::parse(wrong.into_iter().map(OsString::from)).is_err());
        }
    }
}
