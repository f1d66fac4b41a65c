//! The OCI command line: runc's verbs, flags, output and exit codes. One file for each verb.
//!
//! An error is one line of the log, which is standard error unless `--log` names a file; then standard
//! error has the words alone. The exit code is 1, and 255 for `exec`, as with runc.

mod activation;
pub mod args;
pub mod client;
mod config;
mod create;
mod creation;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod notify;
mod obituary;
mod pause;
mod ps;
mod run;
mod signals;
pub mod spec;
mod spelling;
mod start;
mod state;
mod update;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::error::ErrorKind;
use clap::{Command, FromArgMatches};

use self::args::{CommandLine, Verb};
use crate::machine::spawn;
use crate::policy::{InForce, RuntimeName};
use crate::streams::preserved::Preserved;
use crate::supervisor::oom;
use crate::{logging, supervisor};

/// The exit code for a verb that does not exist.
const NO_SUCH_VERB: u8 = 3;

/// Reads the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    let mut command = args::command();
    command.build();
    let line = match spelling::read(&command, env::args_os().skip(1)) {
        Ok(line) => line,
        Err(misuse) => return misused(&mut command, misuse.verb.as_deref(), &misuse.words),
    };
    let verb = line.verb.clone();
    let words = [OsString::from("bulkhead")].into_iter().chain(line.words);
    let parsed = command.try_get_matches_from_mut(words);
    match parsed.and_then(|matches| CommandLine::from_arg_matches(&matches)) {
        Ok(line) => run_line(&line),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                // Nothing is left to do about a closed stream.
                let _ = error.print();
                ExitCode::SUCCESS
            }
            ErrorKind::MissingSubcommand if verb.is_none() => {
                let _ = write!(io::stdout(), "{}", command.render_help());
                ExitCode::SUCCESS
            }
            // `help` for a verb that does not exist.
            ErrorKind::InvalidSubcommand => {
                logging::print_error(&one_line(&first_part(&error)));
                ExitCode::from(NO_SUCH_VERB)
            }
            _ => {
                logging::print_error(&one_line(&first_part(&error)));
                ExitCode::FAILURE
            }
        },
    }
}

/// Says what is wrong with a command line, and what a right one looks like.
fn misused(command: &mut Command, verb: Option<&str>, words: &str) -> ExitCode {
    let help = match verb.and_then(|verb| command.find_subcommand_mut(verb)) {
        Some(verb) => verb.render_help(),
        None => command.render_help(),
    };
    let _ = write!(io::stdout(), "Incorrect Usage.\n\n{help}");
    logging::print_error(words);
    ExitCode::FAILURE
}

/// What is wrong, without the hints that follow.
fn first_part(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    first.strip_prefix("error: ").unwrap_or(first).to_owned()
}

fn run_line(line: &CommandLine) -> ExitCode {
    match dispatch(line) {
        Ok(code) => code,
        Err(error) => {
            let words = one_line(&format!("{error:#}"));
            tracing::error!("{words}");
            if is_own(&line.verb) || line.global.log.is_some() && logging::has_started() {
                let _ = writeln!(io::stderr(), "{words}");
            } else if !logging::has_started() {
                logging::print_error(&words);
            }
            match line.verb {
                // So that it cannot be taken for the status of a program.
                Verb::Exec(_) => ExitCode::from(255),
                Verb::Other(_) => ExitCode::from(NO_SUCH_VERB),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn dispatch(line: &CommandLine) -> anyhow::Result<ExitCode> {
    let global = &line.global;
    if matches!(line.verb, Verb::Supervise { .. }) {
        supervisor::run()?;
        return Ok(ExitCode::SUCCESS);
    }
    spawn::close_inherited_on_exec()?;
    // Before anything is opened, which would take a number that a caller has left free.
    let preserved = preserved(&line.verb);
    let name = RuntimeName::of(global.runtime_name.as_deref());
    // What does not create a container does without a policy that cannot be read.
    let policy = InForce::read(&name);
    if !is_own(&line.verb) {
        let level = policy.as_ref().map(|read| read.policy.log.level);
        logging::start(&global.log_target(level.unwrap_or_default()))?;
    }
    tracing::debug!("{} {:?}", env!("CARGO_PKG_VERSION"), line.verb);
    match &line.verb {
        Verb::Run(run) => return run::run((global, &policy?.policy), run, preserved?),
        Verb::Exec(exec) => return exec::exec(global, exec, preserved?),
        Verb::Create(create) => create::create((global, &policy?.policy), create, &preserved?)?,
        Verb::Start(named) => start::start(global, &named.id)?,
        Verb::State(named) => state::state(global, &named.id)?,
        Verb::Kill(kill) => kill::kill(global, kill)?,
        Verb::Pause(named) => pause::pause(global, &named.id)?,
        Verb::Resume(named) => pause::resume(global, &named.id)?,
        Verb::Ps(ps) => ps::ps(global, ps)?,
        Verb::Update(update) => update::update(global, update)?,
        Verb::Delete(delete) => delete::delete(global, delete)?,
        Verb::List(list) => list::list(global, list)?,
        Verb::Spec(spec) => spec::spec(spec)?,
        Verb::Events(events) => events::events(global, events)?,
        Verb::Features => features::features(&policy?.policy)?,
        Verb::Config => config::config(&name, &policy?)?,
        Verb::Checkpoint { .. } => bail!("checkpoint is not supported yet"),
        Verb::Restore { .. } => bail!("restore is not supported yet"),
        Verb::OomVictim => oom::victim()?,
        Verb::Supervise { .. } => {}
        Verb::Other(words) => {
            let verb = words.first().map_or("", String::as_str);
            bail!("No help topic for '{verb}'; \"bulkhead help\" lists the commands");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether it is a verb with which this program calls itself.
fn is_own(verb: &Verb) -> bool {
    matches!(verb, Verb::Supervise { .. } | Verb::OomVictim)
}

/// The descriptors that a process of the container gets besides its standard streams.
fn preserved(verb: &Verb) -> anyhow::Result<Preserved> {
    let activated = match verb {
        Verb::Run(_) | Verb::Create(_) => activation::descriptors(),
        _ => 0,
    };
    let taken = Preserved::take(activated.saturating_add(verb.preserved()));
    match activated {
        0 => Ok(taken?),
        count => taken.with_context(|| format!("socket activation (LISTEN_FDS={count})")),
    }
}

fn one_line(words: &str) -> String {
    words.split('\n').map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}
