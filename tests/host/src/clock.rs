//! The rate of this machine's time stamp counter, which TCG passes to its guests unchanged.
//!
//! The host's kernel would measure it against an emulated timer, which fails on a busy machine.

// UNSAFETY: reading the counter is an intrinsic.
#![expect(unsafe_code, reason = "rdtsc is an intrinsic that is declared unsafe")]

use std::thread;
use std::time::{Duration, Instant};

const SAMPLE: Duration = Duration::from_millis(20);

/// Counts per millisecond, measured over 20 ms, with an error of a few parts in ten thousand.
pub(crate) fn tsc_khz() -> u128 {
    let (started, first) = (Instant::now(), counter());
    thread::sleep(SAMPLE);
    let (took, last) = (started.elapsed(), counter());
    u128::from(last.wrapping_sub(first)) * 1_000_000 / took.as_nanos()
}

fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction and Linux lets user mode use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}
