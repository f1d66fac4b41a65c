//! The network of a pod: the interfaces of a network namespace of the host, and the name servers on
//! its loopback. They are mirrored and served for as long as the pod lives.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use super::{AbortOnDrop, Pod, PodError};
use crate::network::interfaces::Bell;
use crate::network::names;

impl Pod {
    /// Mirrors the interfaces of a network namespace in the machine, and follows their changes. The
    /// guest can query the name servers on that namespace's loopback that `resolv_conf` lists.
    ///
    /// # Errors
    /// When an interface cannot be mirrored; the machine may have others then.
    pub async fn attach_network(
        self: &Arc<Self>,
        namespace: PathBuf,
        resolv_conf: Option<PathBuf>,
    ) -> Result<(), PodError> {
        let bell = self.interfaces.attach((&self.machine, &self.agent), namespace.clone()).await?;
        // This is the only call: a pod has one network.
        let _ = self.follower.set(AbortOnDrop::spawn(follow(Arc::downgrade(self), bell)));
        if let Some(file) = resolv_conf {
            *self.names.lock().await = NameService::Unasked { file, namespace };
            self.learn_names().await;
        }
        Ok(())
    }

    /// Updates the guest's interfaces to match the host's; logs a warning if that fails.
    pub async fn follow_network(&self) {
        match self.interfaces.update(&self.machine, &self.agent).await {
            Ok(false) => {}
            // A caller that adds a network with its own name server may write resolv.conf only now.
            Ok(true) => self.learn_names().await,
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                tracing::warn!(
                    error,
                    "cannot apply a change of the container's network in the guest"
                );
            }
        }
    }

    /// Lets the guest query name servers of the container's network namespace, once resolv.conf
    /// lists any.
    async fn learn_names(&self) {
        let mut names = self.names.lock().await;
        let NameService::Unasked { file, namespace } = &*names else { return };
        let servers = names::on_loopback(file).unwrap_or_else(|error| {
            tracing::debug!(error = %error, "cannot read resolv.conf");
            Vec::new()
        });
        if servers.is_empty() {
            return;
        }
        if let Err(error) = self.interfaces.share_answers().await {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(error, "the name servers of the container's network cannot ask others");
        }
        match names::NameServers::open(&self.agent, namespace, &servers).await {
            Ok(opened) => {
                *names = NameService::Asked { _by: AbortOnDrop::spawn(opened.serve()) };
            }
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                tracing::warn!(error, "the guest cannot resolve names of the container's network");
            }
        }
    }
}

/// Whether name servers in the container's network namespace serve the guest.
#[derive(Debug, Default)]
pub(super) enum NameService {
    /// The container has no resolv.conf of its own, or no network.
    #[default]
    Unknown,
    /// The file lists no server of the namespace yet.
    Unasked { file: PathBuf, namespace: PathBuf },
    /// They do.
    Asked { _by: AbortOnDrop },
}

/// Updates a pod's network whenever the namespace changes.
async fn follow(pod: Weak<Pod>, bell: Bell) {
    while bell.rung().await.is_ok() {
        let Some(pod) = pod.upgrade() else { return };
        pod.follow_network().await;
    }
}
