//! Limits how much the processes of a pod log, because a guest can cause log lines without end.
//!
//! When half of the log is full, only errors are written, which come from the host. So the log has
//! the reason of an end, whatever the guest did before. When all of it is full, nothing is written.

use std::sync::atomic::{AtomicU64, Ordering};

/// The most that a jailed process logs, in bytes.
pub const BYTES_MAX: u64 = 1 << 20;

/// What a process may still log.
#[derive(Debug)]
pub struct Allowance {
    written: AtomicU64,
    bytes_max: u64,
}

impl Allowance {
    /// The allowance of a process that has logged nothing, and may log so many bytes. Lines other
    /// than errors can use half of them.
    #[must_use]
    pub const fn new(bytes_max: u64) -> Self {
        Self { written: AtomicU64::new(0), bytes_max }
    }

    /// Whether there is room for another error, or for another line that is not an error.
    #[must_use]
    pub fn has_room(&self, error: bool) -> bool {
        self.written.load(Ordering::Relaxed) < self.max(error)
    }

    /// Takes this many bytes for a line, if there is room for its kind; returns the notices that
    /// follow the line if it fills the log, or the part for its kind.
    #[must_use]
    pub fn take(
        &self,
        error: bool,
        bytes: u64,
    ) -> Option<impl Iterator<Item = &'static str> + use<>> {
        let room =
            |written: u64| (written < self.max(error)).then(|| written.saturating_add(bytes));
        let before = self.written.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).ok()?;
        let taken = before..before.saturating_add(bytes);
        let notices = [
            (self.max(false), "this log is half full: from now on only errors are logged"),
            (self.max(true), "this log is full: nothing more is logged"),
        ];
        let reached = move |(full, words): (u64, _)| taken.contains(&(full - 1)).then_some(words);
        Some(notices.into_iter().filter_map(reached))
    }

    const fn max(&self, error: bool) -> u64 {
        if error { self.bytes_max } else { self.bytes_max / 2 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_full_is_said_once_and_errors_have_room_of_their_own() {
        let allowance = Allowance::new(BYTES_MAX);
        let take = |error, bytes| allowance.take(error, bytes).map(Iterator::collect::<Vec<_>>);
        assert_eq!(take(false, BYTES_MAX / 2 - 1), Some(vec![]));
        let half = take(false, 10).unwrap();
        assert!(half.len() == 1 && half[0].contains("half full"), "{half:?}");
        assert_eq!(take(false, 1), None);
        assert!(!allowance.has_room(false) && allowance.has_room(true));
        let full = take(true, BYTES_MAX).unwrap();
        assert!(full.len() == 1 && full[0].contains("nothing more is logged"), "{full:?}");
        assert_eq!(take(true, 1), None);
    }
}
