//! Compares the clock that a container has with the clock of its file server's host, by the times of
//! files: `clock DIRECTORY` creates files there and prints by how many microseconds, at most, a file
//! was newer than the moment after it was made, and older than the moment before.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// How many files are made: some of them right after a tick of the host's clock.
const FILES: u32 = 100;

fn main() -> Result<()> {
    let directory = PathBuf::from(env::args().nth(1).context("no directory")?);
    let (mut newer, mut older) = (i128::MIN, i128::MIN);
    for number in 0..FILES {
        let path = directory.join(format!("clock-{number}"));
        let before = SystemTime::now();
        let file = File::create_new(&path)?;
        let made = file.metadata()?.modified()?;
        let after = SystemTime::now();
        newer = newer.max(micros(made) - micros(after));
        older = older.max(micros(before) - micros(made));
        fs::remove_file(&path)?;
        sleep(Duration::from_micros(700));
    }
    writeln!(io::stdout(), "newer {newer} older {older}").context("write the result")
}

/// Microseconds since the epoch.
fn micros(time: SystemTime) -> i128 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => since.as_micros().cast_signed(),
        Err(error) => -error.duration().as_micros().cast_signed(),
    }
}
