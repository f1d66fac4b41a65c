//! `bulkhead kill`: a signal for a container's init process, or for all of its processes.

use anyhow::{Context, bail};

use super::args::{Global, Kill};
use super::client;
use crate::state::Home;
use crate::supervisor::lifecycle::Status;

/// The names of signals 1 to 31, in order, without `SIG`.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// The first real-time signal that a C library leaves to programs.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

pub(super) fn kill(global: &Global, kill: &Kill) -> anyhow::Result<()> {
    let home = Home::open(&global.root, &kill.id)?;
    let signal = number(&kill.signal)
        .with_context(|| format!("unknown signal {:?}; use a name or 0 to {RTMAX}", kill.signal))?;
    if home.read()?.observed() == Status::Stopped {
        return not_running(kill);
    }
    let sent = client::runtime()?
        .block_on(async { client::kill(&client::connect(&home)?, &home, signal, kill.all).await });
    match sent {
        // The container has ended meanwhile, and its supervisor with it.
        Err(error) if home.read().map_or(true, |state| state.observed() == Status::Stopped) => {
            tracing::debug!("{error:#}");
            not_running(kill)
        }
        sent => sent,
    }
}

/// The error that callers of runc look for.
fn not_running(kill: &Kill) -> anyhow::Result<()> {
    // With --all no process is left to signal, which is what callers that clean up want.
    if kill.all { Ok(()) } else { bail!("container not running") }
}

/// The number of a signal given as `9`, `KILL`, `SIGKILL`, `sigkill` or `RTMIN+3`; 0 only asks whether the
/// process is there.
fn number(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse() {
        return (number <= RTMAX).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(plus) = name.strip_prefix("RTMIN") {
        let number =
            RTMIN + if plus.is_empty() { 0 } else { plus.strip_prefix('+')?.parse().ok()? };
        return (number <= RTMAX).then_some(number);
    }
    (1..).zip(NAMES).find_map(|(number, known)| (known == name).then_some(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        for (text, expected) in [
            ("9", Some(9)),
            ("KILL", Some(9)),
            ("sigterm", Some(15)),
            ("SIGWINCH", Some(28)),
            ("SYS", Some(31)),
            ("64", Some(64)),
            ("RTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMIN+31", None),
            ("0", Some(0)),
            ("65", None),
            ("-1", None),
            ("NOSUCH", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text:?}");
        }
    }
}
