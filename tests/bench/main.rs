//! The benchmark: what a container in its own machine costs, beside its peers, in one boot of one
//! host. `cargo xtask bench` runs it in the test host.
//!
//! Rounds are interleaved, so that whatever disturbs the host disturbs everybody; the table shows
//! medians. Under emulation absolute times mean little and ratios much; memory figures are real.
//!
//! `bench [--rounds N] [--json FILE]`

mod files;
mod memory;
mod start;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// How often each contender runs, unless told otherwise.
const ROUNDS: usize = 7;

struct Arguments {
    rounds: usize,
    json: Option<PathBuf>,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut arguments = Self { rounds: ROUNDS, json: None };
        while let Some(word) = words.next() {
            let value = words.next().with_context(|| format!("{word} needs a value"))?;
            match word.as_str() {
                "--rounds" => arguments.rounds = value.parse().context("--rounds")?,
                "--json" => arguments.json = Some(value.into()),
                _ => bail!("unknown argument {word}: bench [--rounds N] [--json FILE]"),
            }
        }
        anyhow::ensure!(arguments.rounds > 0, "--rounds must be at least 1");
        Ok(arguments)
    }
}

fn main() -> Result<()> {
    if std::process::id() == 1 {
        // The guest of the bare boot: it got as far as its init, which is all that is timed.
        rustix::system::reboot(rustix::system::RebootCommand::Restart)?;
    }
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    let mut results = Map::new();
    results.insert("rounds".into(), Value::from(arguments.rounds));
    results.insert("start".into(), start::measure(arguments.rounds)?);
    results.insert("memory".into(), memory::measure(arguments.rounds)?);
    results.insert("files".into(), files::measure(arguments.rounds)?);
    if let Some(path) = arguments.json {
        std::fs::write(&path, serde_json::to_vec_pretty(&results)?)
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}
