//! Keeps the guest's clock on that of its host (`docs/decisions/0022-the-guests-clock.md`).
//!
//! The guest's kernel shows how far the host's clock is ahead. It is looked at when the host says
//! that its clock was set, and after pauses that grow to a minute. A difference that a program could
//! notice is a step; a smaller one is drift, which is slewed away and held against. CLOCK_MONOTONIC
//! never steps.

// UNSAFETY: no safe wrapper has adjtimex(2).
#![expect(unsafe_code, reason = "adjtimex(2)")]

use std::fs;
use std::io;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

/// Nanoseconds by which the persistent clock is ahead, by a patch of ours.
const AHEAD: &str = "/proc/sys/kernel/persistent_clock_ahead_ns";
/// From this difference on the clock is stepped, in nanoseconds. Up to it, slewing takes a second.
const STEP: i64 = 500_000;
/// The pause after which the clock is looked at for the first time, and the longest one.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(64)];
/// The unit of timex's frequency: a millionth, of which 16 bits are behind the point.
const PART_PER_MILLION: f64 = 65_536.0;
/// The largest correction of the frequency that the kernel takes, in millionths.
const RATE_MAX: f64 = 500.0;

/// Nanoseconds by which the host's clock is ahead of the guest's.
///
/// # Errors
/// This kernel does not show it, or has no clock of its host.
pub(crate) fn ahead() -> io::Result<i64> {
    fs::read_to_string(AHEAD)?.trim().parse().map_err(io::Error::other)
}

/// Steps the clock by so many nanoseconds.
///
/// # Errors
/// The kernel refuses the time or the caller.
pub(crate) fn step(nanoseconds: i64) -> io::Result<()> {
    let mut change = unchanged(libc::ADJ_SETOFFSET | libc::ADJ_NANO);
    // The part of a second is never negative.
    change.time.tv_sec = nanoseconds.div_euclid(1_000_000_000);
    change.time.tv_usec = nanoseconds.rem_euclid(1_000_000_000);
    adjust(&mut change)
}

/// Keeps the clock for ever; `rung` says that it was stepped, so that the difference until then was
/// no drift. Returns at once where the kernel does not show the host's clock.
pub(crate) async fn keep(rung: Arc<Notify>) {
    let [shortest, longest] = PAUSES;
    let mut pause = shortest;
    let mut last = Instant::now();
    let mut rate = 0.0;
    while ahead().is_ok() {
        tokio::select! {
            () = sleep(pause) => pause = longest.min(pause * 2),
            () = rung.notified() => {
                last = Instant::now();
                continue;
            }
        }
        let passed = last.elapsed();
        last = Instant::now();
        match ahead().and_then(|ahead| correct(ahead, passed, &mut rate)) {
            Ok(false) => {}
            // Whoever has set the clock may have changed its rate too.
            Ok(true) => pause = shortest,
            Err(error) => tracing::warn!(%error, "cannot correct the clock"),
        }
    }
}

/// Corrects a difference that has come about in the time that has passed; returns whether the clock
/// was stepped.
fn correct(ahead: i64, passed: Duration, rate: &mut f64) -> io::Result<bool> {
    if ahead.abs() >= STEP {
        tracing::info!(ahead_ns = ahead, "the clock is stepped");
        return step(ahead).map(|()| true);
    }
    *rate = faster(*rate, ahead, passed);
    let mut change = unchanged(libc::ADJ_FREQUENCY);
    #[expect(clippy::cast_possible_truncation, reason = "500 millionths are 26 bits")]
    {
        change.freq = (*rate * PART_PER_MILLION) as libc::c_long;
    }
    adjust(&mut change)?;
    let mut change = unchanged(libc::ADJ_OFFSET_SINGLESHOT);
    change.offset = ahead / 1000;
    adjust(&mut change).map(|()| false)
}

/// The rate in millionths with which the difference would not have come about.
#[expect(clippy::cast_precision_loss, reason = "less than STEP")]
fn faster(rate: f64, ahead: i64, passed: Duration) -> f64 {
    // A suspended machine may have slept for less than it asked for.
    let passed = passed.max(PAUSES[0]);
    (rate + ahead as f64 / 1000.0 / passed.as_secs_f64()).clamp(-RATE_MAX, RATE_MAX)
}

/// A request of these changes, and of no others.
fn unchanged(modes: libc::c_uint) -> libc::timex {
    // SAFETY: a timex is made of numbers, for which zero is valid.
    let mut change: libc::timex = unsafe { mem::zeroed() };
    change.modes = modes;
    change
}

fn adjust(change: &mut libc::timex) -> io::Result<()> {
    // SAFETY: the argument is a timex that the kernel reads and fills.
    match unsafe { libc::adjtimex(change) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_learnt_from_what_has_come_about() {
        let minute = Duration::from_secs(64);
        // 64 microseconds in 64 seconds are a millionth.
        assert!((faster(0.0, 64_000, minute) - 1.0).abs() < 1e-9);
        assert!((faster(3.0, -64_000, minute) - 2.0).abs() < 1e-9);
        assert!((faster(0.0, 1_000, Duration::ZERO) - 1.0).abs() < 1e-9);
        assert!((faster(400.0, 499_999, Duration::ZERO) - 500.0).abs() < 1e-9);
    }
}
