//! Lowering the host's limit of memory while the machine runs.
//!
//! Inside, the container has its new limit already; what it has lost is free in the guest, which says
//! so after two seconds and in stretches of 2 MiB (free page reporting). A limit below what the
//! machine still holds would have the host's kernel kill it, so the host waits. What does not come
//! back, because a guest has free pages here and there only or does not say what it has, stays
//! within the limit: it is then what is held, and never more than it was.

use std::time::{Duration, Instant};

use super::{Cgroup, CgroupError, Limits};

/// How long memory may take to come back.
const PATIENCE: Duration = Duration::from_secs(6);
/// How often that is looked at.
const STEP: Duration = Duration::from_millis(50);
/// What the pod may need beside it meanwhile, in bytes.
const MARGIN: u64 = 8 << 20;

impl Cgroup {
    /// Sets limits once the pod is below that of memory, or in time one that it is below.
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

    /// Memory that the kernel cannot take back by itself, and the limit of now, in bytes; 0 where it
    /// does not tell.
    fn held(&self) -> (u64, u64) {
        let Ok(memory) = self.stats().map(|stats| stats.memory) else { return (0, 0) };
        // Of cgroup v2, or v1.
        let cached = memory.stats.get("file").or_else(|| memory.stats.get("cache"));
        let held = memory.memory.usage.saturating_sub(cached.copied().unwrap_or(0));
        (held, memory.memory.limit)
    }
}
