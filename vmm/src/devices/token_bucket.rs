//! A rate limit: a bucket that fills at a fixed rate and is emptied by what passes.
//!
//! If the bucket is not empty, a caller may take more than it holds: the size of a packet is known
//! only after the packet was read. The debt is paid before anybody takes again, so the rate holds.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// How long the bucket fills while nothing is taken; more does not fit.
const BURST: Duration = Duration::from_millis(100);

/// The bucket. It keeps the moment at which its debt is paid; the time since then is its content.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    per_s: NonZeroU64,
    paid: Instant,
}

impl TokenBucket {
    /// An empty bucket that fills at `per_s`.
    pub(crate) fn new(per_s: NonZeroU64, now: Instant) -> Self {
        Self { per_s, paid: now }
    }

    /// Time until something can be taken; 0 if it can be now.
    pub(crate) fn wait(&self, now: Instant) -> Duration {
        self.paid.saturating_duration_since(now)
    }

    /// Takes `amount`.
    pub(crate) fn take(&mut self, amount: u64, now: Instant) {
        let nanos = u128::from(amount) * 1_000_000_000 / u128::from(self.per_s.get());
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let oldest = now.checked_sub(BURST).unwrap_or(now);
        let paid = self.paid.max(oldest).checked_add(cost);
        // Beyond the last `Instant`: this amount is not counted.
        self.paid = paid.unwrap_or(self.paid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn bucket(per_s: u64, now: Instant) -> TokenBucket {
        TokenBucket::new(NonZeroU64::new(per_s).unwrap(), now)
    }

    #[test]
    fn what_passes_in_a_second_is_the_rate() {
        let start = Instant::now();
        let mut bucket = bucket(1_000_000, start);
        let mut passed = 0;
        for step in 0..1000 {
            let now = start + step * MS;
            while bucket.wait(now).is_zero() {
                bucket.take(1500, now);
                passed += 1500;
            }
        }
        assert!((1_000_000..=1_001_500).contains(&passed), "{passed}");
    }

    #[test]
    fn a_debt_is_paid_before_more_passes() {
        let start = Instant::now();
        let mut bucket = bucket(1000, start);
        bucket.take(50, start);
        assert_eq!(bucket.wait(start), 50 * MS);
        assert_eq!(bucket.wait(start + 50 * MS), Duration::ZERO);
    }

    #[test]
    fn a_long_rest_allows_one_burst() {
        let start = Instant::now();
        let mut bucket = bucket(1000, start);
        let later = start + 3_600_000 * MS;
        bucket.take(150, later);
        assert_eq!(bucket.wait(later), 50 * MS);
    }

    #[test]
    fn no_amount_overflows() {
        let start = Instant::now();
        let mut bucket = bucket(1, start);
        bucket.take(u64::MAX, start);
        bucket.take(u64::MAX, start);
        assert!(!bucket.wait(start).is_zero());
    }
}
