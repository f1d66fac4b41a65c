//! The end of a container: by itself, by a signal, with its machine, or before it was created.

use std::sync::Arc;
use std::time::Duration;

use super::{Container, Life, SIGKILL};
use crate::cgroup;
use crate::machine::agent::Target;
use crate::sockets::Connections;
use crate::state::Exit;
use crate::streams::attach::StandIn;
use crate::supervisor::lifecycle::Event;
use crate::supervisor::oom;
use crate::supervisor::pod::Pod;
use crate::supervisor::proxy::{self, End};
use crate::supervisor::sandbox::Departure;
use crate::trace::Phase;

impl Container {
    /// Waits until its creation is cancelled.
    pub async fn is_cancelled(&self) {
        // The container owns the sender, so waiting does not fail.
        let _ = self.cancelled.subscribe().wait_for(|cancelled| *cancelled).await;
    }

    /// Removes everything of a container whose creator has exited before it was created.
    pub async fn abandon(&self) {
        // The creation holds the lock and releases it when it is cancelled.
        self.cancelled.send_replace(true);
        let mut life = self.life.lock().await;
        if life.pod.is_some() {
            drop(life);
            // The creation has just finished. If this kill fails, there is nothing else to try.
            let _ = self.kill(SIGKILL, true).await;
            self.hurry.send_replace(true);
            self.is_over().await;
        } else {
            life.connections = Connections::default();
            if self.sandbox.depart(self.home.id()).await == Departure::OthersStay {
                self.outlive(&mut life);
            }
            self.over.send_replace(true);
        }
    }

    /// Records that the pod continues without this container.
    fn outlive(&self, life: &mut Life) {
        life.state.outlived = true;
        if let Err(error) = self.home.write(&life.state) {
            tracing::error!(error = %error, "cannot record the end of the container");
        }
    }

    /// Waits for the end of the container, reports it, and stops the pod if no other container is
    /// in it.
    pub(super) async fn watch_over(self: Arc<Self>, pod: Arc<Pod>, stand_in: StandIn) {
        let target = Target::init(self.home.id());
        let patience = async { proxy::patience(self.sandbox.is_alone()) };
        let end = proxy::until_end(&pod, target, &stand_in, (&self.doomed, patience)).await;
        let exit = end.exit;
        if end.immortal {
            pod.condemn();
        }
        if exit.oom_killed {
            // Before the end is reported, so that the OOM kill is known by then.
            self.report_oom().await;
        }
        self.has_ended(exit).await;
        let phase = Phase::begin("drain");
        self.take_leave(&pod, &stand_in, end).await;
        phase.end();
        let connections = std::mem::take(&mut self.life.lock().await.connections);
        match self.sandbox.depart(self.home.id()).await {
            Departure::Last => self.take_down(pod).await,
            Departure::OthersStay => {
                drop(pod);
                self.outlive(&mut *self.life.lock().await);
            }
        }
        connections.settle().await;
        self.over.send_replace(true);
    }

    /// Makes the host count an OOM kill of the guest.
    async fn report_oom(&self) {
        let state = self.state().await;
        // If the container joined the pod, the pod's processes are or were in another container's
        // cgroup.
        let own = state.cgroup.filter(|_| state.joined);
        let reported = tokio::task::spawn_blocking(move || oom::report(own.as_ref())).await;
        if let Err(error) = reported.map_err(std::io::Error::from).flatten() {
            tracing::warn!(error = %error, "cannot report to the host that memory ran out");
        }
    }

    async fn has_ended(&self, exit: Exit) {
        let mut life = self.life.lock().await;
        life.state.exit = Some(exit);
        life.pod = None;
        if let Err(error) = self.advance(&mut life, Event::Exited) {
            tracing::error!(error = %error, "cannot record the end of the container");
        }
        drop(life);
        self.exit.send_replace(Some(exit));
    }

    /// Ends the pod.
    async fn take_down(&self, mut pod: Arc<Pod>) {
        // Calls in progress hold the pod; each call is bounded in time.
        let pod = loop {
            match Arc::try_unwrap(pod) {
                Ok(pod) => break pod,
                Err(shared) => pod = shared,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        // Leaving the cgroup takes time in the kernel, so it runs while the machine ends.
        let id = self.home.id().clone();
        let leave = self.ephemeral.then(|| tokio::task::spawn_blocking(move || cgroup::leave(&id)));
        pod.end().await;
        if let Some(leave) = leave {
            // An error here shows when the cgroup is removed.
            let _ = leave.await;
        }
    }

    /// Tells a stand-in that its process has ended, and waits until it has forwarded the process's
    /// output. Returns earlier if nobody waits for the output any more, or the pod is gone.
    pub(crate) async fn take_leave(
        &self,
        pod: &Pod,
        stand_in: &StandIn,
        End { exit, reason, written, .. }: End,
    ) {
        if stand_in.tell_exit(exit.status, reason, written).await.is_err() {
            return;
        }
        let mut hurry = self.hurry.subscribe();
        tokio::select! {
            // The stand-in closes its connection when it has forwarded everything; until then it
            // may still send signals.
            () = async { while stand_in.said().await.is_some() {} } => {}
            _ = hurry.wait_for(|hurry| *hurry) => {}
            _ = pod.broken() => {}
        }
    }
}
