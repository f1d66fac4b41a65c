//! Further processes of a container. Each has a name and a stand-in of its own, and ends at the
//! latest with the container.
//!
//! As in containerd's Task service, a caller first names a process ([`Container::prepare_exec`])
//! and starts it later ([`Container::start_exec`]). The process is forgotten once it has ended and
//! its stand-in has been told.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent::ExecRequest;
use thiserror::Error;
use tokio::sync::{RwLock, RwLockReadGuard, watch};

use crate::machine::agent::Target;
use crate::state::process::Process;
use crate::streams::attach::{Attachments, StandIn};
use crate::supervisor::container::{Container, ContainerError};
use crate::supervisor::lifecycle::Status;
use crate::supervisor::pod::Pod;
use crate::supervisor::proxy::{self, Ends};

/// The largest number of further processes of a container, prepared or running.
const EXECS_MAX: usize = 4096;

/// Why a process is not started.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExecError {
    /// The container's status does not allow a new process.
    #[error("cannot exec in a container that is {0}")]
    Status(Status),
    /// Another process has the name.
    #[error("process {0:?} exists")]
    Taken(String),
    /// The process was not prepared, or was started before.
    #[error("process {0:?} does not exist, or was started before")]
    Unknown(String),
    /// The container has too many further processes already.
    #[error("the container has {EXECS_MAX} further processes already")]
    TooMany,
}

/// A process that is to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedExec {
    /// The `process` object of an OCI specification.
    pub process_json: Vec<u8>,
    /// If the container is frozen, the start waits until it is thawed instead of failing.
    pub ignore_paused: bool,
}

/// The further processes of one container.
#[derive(Debug, Default)]
pub(crate) struct Execs {
    table: Mutex<HashMap<String, Entry>>,
    /// Held for reading while a process is started, and for writing while the container is being
    /// frozen.
    pub(crate) gate: RwLock<()>,
}

/// A further process.
#[derive(Debug)]
enum Entry {
    /// Prepared, not started.
    Named(PreparedExec),
    /// Being started in the guest.
    Starting,
    /// Running; its stand-in.
    Running(Process),
}

impl Execs {
    /// The stand-ins of the processes that run.
    pub(crate) fn stand_ins(&self) -> Vec<Process> {
        let of = |entry: &Entry| match entry {
            Entry::Running(process) => Some(*process),
            Entry::Named(_) | Entry::Starting => None,
        };
        self.table().values().filter_map(of).collect()
    }

    fn prepare(&self, name: &str, prepared: PreparedExec) -> Result<(), ExecError> {
        let mut table = self.table();
        if table.contains_key(name) {
            return Err(ExecError::Taken(name.to_owned()));
        }
        if table.len() >= EXECS_MAX {
            return Err(ExecError::TooMany);
        }
        table.insert(name.to_owned(), Entry::Named(prepared));
        Ok(())
    }

    fn start(&self, name: &str) -> Result<PreparedExec, ExecError> {
        let mut table = self.table();
        let unknown = || ExecError::Unknown(name.to_owned());
        let entry = table.get_mut(name).filter(|entry| matches!(entry, Entry::Named(_)));
        match std::mem::replace(entry.ok_or_else(unknown)?, Entry::Starting) {
            Entry::Named(prepared) => Ok(prepared),
            Entry::Starting | Entry::Running(_) => Err(unknown()),
        }
    }

    fn running(&self, name: &str, stand_in: Process) {
        self.table().insert(name.to_owned(), Entry::Running(stand_in));
    }

    fn forget(&self, name: &str) {
        self.table().remove(name);
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Container {
    /// Prepares a process that is to be started, under a name.
    ///
    /// # Errors
    /// When the container's status does not allow a new process, the name is taken, or there are
    /// too many processes.
    pub async fn prepare_exec(
        &self,
        name: &str,
        prepared: PreparedExec,
    ) -> Result<(), ContainerError> {
        self.takes_processes(prepared.ignore_paused).await?;
        Ok(self.execs.prepare(name, prepared)?)
    }

    /// Starts a prepared process and hands its streams to its stand-in. If the start has to wait
    /// for a frozen container, it is given up when `caller_gone` completes.
    ///
    /// # Errors
    /// When the guest cannot start it, or no stand-in connects; the process is forgotten then.
    pub async fn start_exec(
        self: &Arc<Self>,
        name: &str,
        attachments: &Attachments,
        caller_gone: impl Future<Output = ()>,
    ) -> Result<Process, ContainerError> {
        let PreparedExec { process_json, ignore_paused } = self.execs.start(name)?;
        let started = async {
            let stand_in = attachments.take(name).await.map_err(ContainerError::StandIn)?;
            let open = self.enter(ignore_paused, &stand_in, caller_gone).await?;
            self.start_prepared(name, process_json, stand_in, open).await
        }
        .await;
        match started {
            Ok((pod, stand_in)) => {
                let process = stand_in.process;
                self.execs.running(name, process);
                tokio::spawn(self.clone().watch_exec(name.to_owned(), pod, stand_in));
                Ok(process)
            }
            Err(error) => {
                self.execs.forget(name);
                Err(error)
            }
        }
    }

    /// Waits until a process may be started. The container cannot be frozen while the returned
    /// guard is held.
    async fn enter(
        &self,
        ignore_paused: bool,
        stand_in: &StandIn,
        caller_gone: impl Future<Output = ()>,
    ) -> Result<RwLockReadGuard<'_, ()>, ContainerError> {
        let mut caller_gone = pin!(caller_gone);
        loop {
            if ignore_paused {
                tokio::select! {
                    () = self.is_thawed() => {}
                    // Signals are dropped: there is no process yet that could receive them.
                    () = async { while stand_in.said().await.is_some() {} } => return Err(given_up()),
                    () = &mut caller_gone => return Err(given_up()),
                }
            }
            let open = self.execs.gate.read().await;
            self.takes_processes(ignore_paused).await?;
            // The container may have been frozen again before the lock was taken; now it cannot be.
            if !self.state().await.status.is_paused() {
                return Ok(open);
            }
        }
    }

    async fn start_prepared(
        &self,
        name: &str,
        process_json: Vec<u8>,
        stand_in: StandIn,
        _open: RwLockReadGuard<'_, ()>,
    ) -> Result<(Arc<Pod>, StandIn), ContainerError> {
        let pod = self.pod().await?;
        self.adopt(&stand_in).await?;
        let Ends { streams, descriptors, sockets, lent } = proxy::open(&pod, &stand_in).await?;
        let (container_id, exec_id) = (self.home().id().to_string(), name.to_owned());
        let streams = Some(streams);
        let request = ExecRequest { container_id, exec_id, process_json, streams, descriptors };
        pod.follow_network().await;
        pod.agent.exec(request).await?;
        drop(lent);
        if let Err(error) = stand_in.hand_over(&sockets).await {
            let target = Target { container: self.home().id(), exec: name };
            // Without a stand-in the process is killed.
            let _ = pod.agent.kill(target, 9, false).await;
            return Err(ContainerError::StandIn(error));
        }
        Ok((pod, stand_in))
    }

    async fn takes_processes(&self, ignore_paused: bool) -> Result<(), ContainerError> {
        match self.state().await.status {
            Status::Created | Status::Running => Ok(()),
            status if status.is_paused() && ignore_paused => Ok(()),
            status => Err(ExecError::Status(status).into()),
        }
    }

    /// Waits for the end of a process, whatever its cause, and tells its stand-in.
    async fn watch_exec(self: Arc<Self>, name: String, pod: Arc<Pod>, stand_in: StandIn) {
        let target = Target { container: self.home().id(), exec: &name };
        // A process that SIGKILL does not end does not end the machine: it stays in its container,
        // as on a host.
        let (doomed, _) = watch::channel(false);
        let patience = async { proxy::patience(false) };
        let end = proxy::until_end(&pod, target, &stand_in, (&doomed, patience)).await;
        self.take_leave(&pod, &stand_in, end).await;
        self.execs.forget(&name);
    }
}

/// The error of a start whose caller or stand-in is gone.
fn given_up() -> ContainerError {
    ContainerError::StandIn(ErrorKind::BrokenPipe.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(process: &str) -> PreparedExec {
        PreparedExec { process_json: process.into(), ignore_paused: false }
    }

    #[test]
    fn a_process_is_named_once_and_started_once() {
        let execs = Execs::default();
        execs.prepare("one", prepared("{}")).unwrap();
        assert_eq!(execs.prepare("one", prepared("")), Err(ExecError::Taken("one".to_owned())));
        assert_eq!(execs.start("one").unwrap(), prepared("{}"));
        assert_eq!(execs.start("one"), Err(ExecError::Unknown("one".to_owned())));
        assert!(execs.stand_ins().is_empty());
        let stand_in = Process::current().unwrap();
        execs.running("one", stand_in);
        assert_eq!(execs.stand_ins(), [stand_in]);
        // The name is taken while the process runs.
        assert_eq!(execs.prepare("one", prepared("")), Err(ExecError::Taken("one".to_owned())));
        execs.forget("one");
        execs.prepare("one", prepared("")).unwrap();
        assert_eq!(execs.start("two"), Err(ExecError::Unknown("two".to_owned())));
    }

    #[test]
    fn processes_are_bounded() {
        let execs = Execs::default();
        for number in 0..EXECS_MAX {
            execs.prepare(&number.to_string(), prepared("")).unwrap();
        }
        assert_eq!(execs.prepare("more", prepared("")), Err(ExecError::TooMany));
    }
}
