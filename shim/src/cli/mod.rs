//! The OCI command line: runc's verbs, flags, output and exit codes. One file for each verb.
//!
//! An error is one line on standard error, and one in the log file if there is one; then the exit
//! code is 1, and 255 for `exec`, as with runc.

pub mod args;
pub mod client;
mod create;
mod creation;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod pause;
mod ps;
mod run;
mod signals;
pub mod spec;
mod start;
mod state;
mod update;

use std::io::Write;
use std::process::ExitCode;

use anyhow::bail;
use clap::Parser;

use self::args::{CommandLine, Verb};
use crate::machine::spawn;
use crate::streams::preserved::Preserved;
use crate::supervisor::oom;
use crate::{logging, supervisor};

/// Reads the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(usage) => {
            // Nothing is left to do about a closed stream.
            let _ = usage.print();
            return ExitCode::from(u8::from(usage.use_stderr()));
        }
    };
    match dispatch(&line) {
        Ok(code) => code,
        Err(error) => {
            if line.global.log.is_some() {
                tracing::error!("{error:#}");
            }
            let _ = writeln!(std::io::stderr(), "bulkhead: {}", one_line(&format!("{error:#}")));
            match line.verb {
                // So that it cannot be taken for the status of a program.
                Verb::Exec(_) => ExitCode::from(255),
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
    let preserved = Preserved::take(line.verb.preserved());
    if global.log.is_some() || global.debug {
        logging::start(&global.log_target())?;
    }
    match &line.verb {
        Verb::Run(run) => return run::run(global, run, preserved?),
        Verb::Exec(exec) => return exec::exec(global, exec, preserved?),
        Verb::Create(create) => create::create(global, create, &preserved?)?,
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
        Verb::Features => features::features()?,
        Verb::OomVictim => oom::victim()?,
        Verb::Supervise { .. } => {}
        Verb::Other(words) => {
            let verb = words.first().map_or("", String::as_str);
            bail!("{verb:?} is not supported yet; \"bulkhead --help\" lists what is");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn one_line(words: &str) -> String {
    words.split('\n').map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}
