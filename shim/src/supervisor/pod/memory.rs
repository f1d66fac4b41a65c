//! The memory of a pod whose containers have no limit: the machine starts small and gets more
//! whenever they need it (`docs/decisions/0021-memory-on-demand.md`).

use std::sync::{Arc, Weak};

use bulkhead_protocol::agent::MemoryWanted;
use tonic::Streaming;

use super::{AbortOnDrop, Pod, PodError};

impl Pod {
    /// Adds memory from now on whenever the guest asks for it.
    ///
    /// # Errors
    /// When the guest cannot watch what its containers need.
    pub async fn provide_memory(self: &Arc<Self>) -> Result<(), PodError> {
        let wanted = self.growth.listen(&self.agent).await?;
        // This is the only call: a pod is brought up once.
        let _ = self.provider.set(AbortOnDrop::spawn(provide(Arc::downgrade(self), wanted)));
        Ok(())
    }
}

/// Meets the guest's requests until the pod ends.
async fn provide(pod: Weak<Pod>, mut wanted: Streaming<MemoryWanted>) {
    while let Ok(Some(MemoryWanted {})) = wanted.message().await {
        let Some(pod) = pod.upgrade() else { return };
        pod.growth.meet(&pod.machine, &pod.agent).await;
    }
}
