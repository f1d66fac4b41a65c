//! A container ends: by itself, killed, with its machine, or before it was ever created.

use std::sync::Arc;
use std::time::Duration;

use super::{Container, Life, SIGKILL};
use crate::cgroup;
use crate::machine::agent::Target;
use crate::state::Exit;
use crate::streams::attach::StandIn;
use crate::supervisor::lifecycle::Event;
use crate::supervisor::oom;
use crate::supervisor::pod::Pod;
use crate::supervisor::proxy::{self, End};
use crate::supervisor::sandbox::Departure;
use crate::trace::Phase;

impl Container {
    /// Waits until its creation is given up.
    pub async fn is_cancelled(&self) {
        // The sender lives in this container.
        let _ = self.cancelled.subscribe().wait_for(|cancelled| *cancelled).await;
    }

    /// Takes everything back of a container whose creator has gone away before it was created.
    pub async fn abandon(&self) {
        // Its creation holds the lock, and lets it go when it ends where it stands.
        self.cancelled.send_replace(true);
        let mut life = self.life.lock().await;
        if life.pod.is_some() {
            drop(life);
            // Just so. If it does not end, nothing else will either.
            let _ = self.kill(SIGKILL, true).await;
            self.hurry.send_replace(true);
            self.is_over().await;
        } else {
            if self.sandbox.depart(self.home.id()).await == Departure::OthersStay {
                self.outlive(&mut life);
            }
            self.over.send_replace(true);
        }
    }

    /// Writes down that the pod goes on without this container.
    fn outlive(&self, life: &mut Life) {
        life.state.outlived = true;
        if let Err(error) = self.home.write(&life.state) {
            tracing::error!(error = %error, "cannot record the end of the container");
        }
    }

    /// Waits for the end, whichever it is, tells everybody, and takes the pod down.
    pub(super) async fn watch_over(self: Arc<Self>, pod: Arc<Pod>, stand_in: StandIn) {
        let target = Target::init(self.home.id());
        let patience = async { proxy::patience(self.sandbox.is_alone()) };
        let end = proxy::until_end(&pod, target, &stand_in, (&self.doomed, patience)).await;
        let exit = end.exit;
        if end.immortal {
            pod.condemn();
        }
        if exit.oom_killed {
            // Before anybody sees the end, so that it is known why.
            self.report_oom().await;
        }
        self.has_ended(exit).await;
        let phase = Phase::begin("drain");
        self.take_leave(&pod, &stand_in, end).await;
        phase.end();
        match self.sandbox.depart(self.home.id()).await {
            Departure::Last => self.take_down(pod).await,
            Departure::OthersStay => {
                drop(pod);
                self.outlive(&mut *self.life.lock().await);
            }
        }
        self.over.send_replace(true);
    }

    /// Has the host count that the guest has killed for want of memory.
    async fn report_oom(&self) {
        let state = self.state().await;
        // The pod's processes are in another container's cgroup, or were.
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
        // Verbs hold the pod for the length of a call; each call is bounded.
        let pod = loop {
            match Arc::try_unwrap(pod) {
                Ok(pod) => break pod,
                Err(shared) => pod = shared,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        // The machine takes its time to end, and so does the kernel.
        let id = self.home.id().clone();
        let leave = self.ephemeral.then(|| tokio::task::spawn_blocking(move || cgroup::leave(&id)));
        pod.end().await;
        if let Some(leave) = leave {
            // What fails here is said by whoever removes the cgroup.
            let _ = leave.await;
        }
    }

    /// Tells a stand-in that its process has ended, and waits until it has passed on what that wrote,
    /// nobody waits for that any more, or there is nothing to pass on.
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
            // It closes its connection when it has passed all on; it may still be sent signals.
            () = async { while stand_in.said().await.is_some() {} } => {}
            _ = hurry.wait_for(|hurry| *hurry) => {}
            _ = pod.broken() => {}
        }
    }
}
