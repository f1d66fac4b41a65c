//! The benchmark: the cost of a container in its own machine, compared with its peers, in one boot
//! of one host. `cargo xtask bench` runs it in the test host.
//!
//! Rounds are interleaved, so that any disturbance of the host affects all contenders; the table
//! shows medians. Under emulation absolute times mean nothing, and ratios say how much code is
//! translated. Where the host counts instructions (`test-host --count`), they say how much code is
//! executed. Memory figures are real.
//!
//! `bench [--rounds N] [--json FILE] [--only start,verbs,memory,files,network,soak]`

mod files;
mod memory;
mod network;
mod soak;
mod start;
mod table;
mod verbs;

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use rustix::system::{RebootCommand, reboot};
use serde_json::{Map, Value};

/// How often each contender runs, unless told otherwise.
const ROUNDS: usize = 7;

/// The parts, in the order in which they run.
const PARTS: [(&str, Measure); 6] = [
    ("start", start::measure),
    ("verbs", verbs::measure),
    ("memory", memory::measure),
    ("files", files::measure),
    ("network", network::measure),
    (SOAK, soak::measure),
];
/// A part that takes half an hour and is more a test than a measurement: it runs only when it is
/// named.
const SOAK: &str = "soak";

/// Measures in this number of rounds, prints its tables and returns its figures.
type Measure = fn(usize) -> Result<Value>;

struct Arguments {
    rounds: usize,
    json: Option<PathBuf>,
    /// The parts to run; if empty, all but [`SOAK`].
    only: Vec<String>,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut arguments = Self { rounds: ROUNDS, json: None, only: Vec::new() };
        while let Some(word) = words.next() {
            let value = words.next().with_context(|| format!("{word} needs a value"))?;
            match word.as_str() {
                "--rounds" => arguments.rounds = value.parse().context("--rounds")?,
                "--json" => arguments.json = Some(value.into()),
                "--only" => arguments.only = value.split(',').map(str::to_owned).collect(),
                _ => bail!("unknown argument {word}: --rounds N, --json FILE or --only PARTS"),
            }
        }
        for part in &arguments.only {
            let known = PARTS.iter().any(|(name, _)| name == part);
            let names = PARTS.map(|(name, _)| name).join(", ");
            anyhow::ensure!(known, "--only is of {names}, not {part}");
        }
        anyhow::ensure!(arguments.rounds > 0, "--rounds must be at least 1");
        Ok(arguments)
    }
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // The two ends of the network measurements.
        ["near"] => network::near(),
        ["wait", address] => network::wait(address.parse()?),
        ["far", address] => far(address.parse()?),
        // The init of the bare boot: only the time until here is measured.
        _ if std::process::id() == 1 => Ok(reboot(RebootCommand::Restart)?),
        _ => bench(&Arguments::parse(words.into_iter())?),
    }
}

#[expect(clippy::print_stdout, reason = "the figures go to whoever asked for them")]
fn far(address: Ipv4Addr) -> Result<()> {
    println!("{}", network::far(address)?);
    Ok(())
}

fn bench(arguments: &Arguments) -> Result<()> {
    let mut results = Map::new();
    results.insert("rounds".into(), Value::from(arguments.rounds));
    for (part, measure) in PARTS {
        let named = arguments.only.iter().any(|name| name == part);
        if named || (arguments.only.is_empty() && part != SOAK) {
            results.insert(part.into(), measure(arguments.rounds).context(part)?);
        }
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&results)?)
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}
