//! The network of a pod: the interfaces of a namespace of the host, and the name servers that answer there,
//! followed for as long as the pod lives.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use tokio::task::AbortHandle;

use super::{Pod, PodError};
use crate::network::interfaces::Bell;
use crate::network::names;

impl Pod {
    /// Gives the machine the interfaces of a network namespace, and follows what becomes of them;
    /// name servers there that `resolv_conf` names are asked by the guest.
    ///
    /// # Errors
    /// When one cannot be had; the machine may have others then.
    pub async fn attach_network(
        self: &Arc<Self>,
        namespace: PathBuf,
        resolv_conf: Option<PathBuf>,
    ) -> Result<(), PodError> {
        let bell = self.interfaces.attach((&self.machine, &self.agent), namespace.clone()).await?;
        let follower = tokio::spawn(follow(Arc::downgrade(self), bell));
        // Set once, as a pod has one network.
        let _ = self.follower.set(AbortOnDrop(follower.abort_handle()));
        if let Some(file) = resolv_conf {
            *self.names.lock().await = NameService::Unasked { file, namespace };
            self.learn_names().await;
        }
        Ok(())
    }

    /// Has the guest's interfaces be what the host's are now; what is not is a warning.
    pub async fn follow_network(&self) {
        match self.interfaces.update(&self.machine, &self.agent).await {
            Ok(false) => {}
            // Whoever adds a network with names may write down only now where they are known.
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

    /// Has the guest ask name servers of the container's network namespace, once there are any.
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
                let serving = tokio::spawn(opened.serve());
                *names = NameService::Asked { _by: AbortOnDrop(serving.abort_handle()) };
            }
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                tracing::warn!(error, "the guest cannot resolve names of the container's network");
            }
        }
    }
}

/// Whether names are asked in the container's network namespace.
#[derive(Debug, Default)]
pub(super) enum NameService {
    /// It has no such file, or no network.
    #[default]
    Unknown,
    /// No server of the namespace is in the file yet.
    Unasked { file: PathBuf, namespace: PathBuf },
    /// They are.
    Asked { _by: AbortOnDrop },
}

/// A task that ends with the pod.
#[derive(Debug)]
pub(super) struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Has a pod's network be looked at whenever it changes.
async fn follow(pod: Weak<Pod>, bell: Bell) {
    while bell.rung().await.is_ok() {
        let Some(pod) = pod.upgrade() else { return };
        pod.follow_network().await;
    }
}
