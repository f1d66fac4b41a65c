//! Lowers the host's memory limit while the machine runs.
//!
//! In the guest, the container has its new limit already. The memory that it had to give up is free
//! there, and the guest reports it after two seconds, in blocks of 2 MiB (free page reporting). If
//! the host's limit were below what the machine still holds, the host's kernel would kill it, so
//! the supervisor waits. Memory may not come back, because the guest's free pages are scattered or
//! it does not report them. The limit is then what the machine still holds, and never more than the
//! limit before.

use std::time::{Duration, Instant};

use super::{Cgroup, CgroupError, Limits};

/// How long the guest may take to give memory back.
const PATIENCE: Duration = Duration::from_secs(6);
/// How often the usage is checked.
const STEP: Duration = Duration::from_millis(50);
/// How much more than it holds the pod may need meanwhile, in bytes.
const MARGIN: u64 = 8 << 20;

impl Cgroup {
    /// Sets limits once the pod uses less memory than the limit. If that takes too long, sets a
    /// memory limit that the pod is below.
    ///
    /// # Errors
    /// When the host has no such limit, or refuses the value.
    pub async fn limit_when_free(&self, limits: &Limits) -> Result<(), CgroupError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (held, most) = self.held();
            let needed = held.saturating_add(MARGIN).min(most);
            if limits.memory().is_none_or(|limit| needed <= limit) {
                return self.limit_async(limits.whole().clone()).await;
            }
            if Instant::now() > deadline {
                tracing::warn!(
                    held = needed,
                    "the guest has not given back enough memory; the limit is what it still has"
                );
                return self.limit_async(limits.with_memory(needed)).await;
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// Returns the memory that the kernel cannot reclaim by itself and the current limit, in bytes;
    /// 0 if they cannot be read.
    fn held(&self) -> (u64, u64) {
        let Ok(memory) = self.stats().map(|stats| stats.memory) else { return (0, 0) };
        // The names of cgroup v2 and v1.
        let cached = memory.stats.get("file").or_else(|| memory.stats.get("cache"));
        let held = memory.memory.usage.saturating_sub(cached.copied().unwrap_or(0));
        (held, memory.memory.limit)
    }
}
