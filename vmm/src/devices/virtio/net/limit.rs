//! The rate limits of one direction: a bucket for bytes and one for packets.

use std::time::{Duration, Instant};

use crate::config::RateLimit;
use crate::devices::token_bucket::TokenBucket;

/// Both buckets, each only if there is a limit.
#[derive(Debug)]
pub(super) struct Limit {
    bytes: Option<TokenBucket>,
    packets: Option<TokenBucket>,
}

impl Limit {
    pub(super) fn new(limit: RateLimit, now: Instant) -> Self {
        let bucket = |per_s| TokenBucket::new(per_s, now);
        let (bytes, packets) = (limit.bytes_per_s.map(bucket), limit.packets_per_s.map(bucket));
        Self { bytes, packets }
    }

    /// Time until something may pass; `None` if it may pass now.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let waits = [&self.bytes, &self.packets].map(|bucket| bucket.as_ref().map(|b| b.wait(now)));
        waits.into_iter().flatten().max().filter(|wait| !wait.is_zero())
    }

    /// Counts a frame of this many bytes.
    pub(super) fn take(&mut self, bytes: usize, now: Instant) {
        for (bucket, amount) in [(&mut self.bytes, bytes as u64), (&mut self.packets, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(amount, now);
            }
        }
    }
}
