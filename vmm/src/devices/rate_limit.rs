//! Log lines that a guest can provoke, bounded.
//!
//! A guest that misbehaves on purpose must neither hide other log lines nor make the monitor spend
//! its time on writing them. Each place that logs what a guest did uses [`guest_warn!`], which lets
//! a few lines pass in each window and reports in the next window how many it held back.
//! [`crate::logging`] bounds the size of the log.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// Lines that pass in one window.
const BURST: u32 = 8;
/// Length of a window, seconds.
const WINDOW_S: u64 = 10;

/// The limit of one place in the code.
#[derive(Debug)]
pub(crate) struct RateLimit {
    /// Seconds of the monotonic clock, divided by the window.
    window: AtomicU64,
    /// Lines asked for in this window.
    asked: AtomicU32,
}

impl RateLimit {
    /// The limit of a place that has not logged yet.
    pub(crate) const fn new() -> Self {
        Self { window: AtomicU64::new(0), asked: AtomicU32::new(0) }
    }

    /// Whether a line may pass now; if so, how many were held back before it.
    pub(crate) fn admit(&self) -> Option<u32> {
        let seconds = clock_gettime(ClockId::Monotonic).tv_sec;
        self.admit_at(u64::try_from(seconds).unwrap_or(0) / WINDOW_S)
    }

    fn admit_at(&self, window: u64) -> Option<u32> {
        // If two threads open a window at once, one line too many passes, which does no harm.
        if self.window.swap(window, Ordering::Relaxed) != window {
            let asked = self.asked.swap(1, Ordering::Relaxed);
            return Some(asked.saturating_sub(BURST));
        }
        let asked = self.asked.load(Ordering::Relaxed);
        self.asked.store(asked.saturating_add(1), Ordering::Relaxed);
        (asked < BURST).then_some(0)
    }
}

/// `log::warn!` about what the guest did, with a rate limit for each place that uses it.
macro_rules! guest_warn {
    ($($line:tt)+) => {{
        static LIMIT: $crate::devices::rate_limit::RateLimit =
            $crate::devices::rate_limit::RateLimit::new();
        if let Some(held_back) = LIMIT.admit() {
            if held_back > 0 {
                log::warn!("{held_back} lines like the next were held back");
            }
            log::warn!($($line)+);
        }
    }};
}
pub(crate) use guest_warn;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let limit = RateLimit::new();
        assert_eq!(limit.admit_at(1), Some(0));
        assert_eq!((1..20).filter(|_| limit.admit_at(1).is_some()).count(), BURST as usize - 1);
        assert_eq!(limit.admit_at(2), Some(20 - BURST));
    }
}
