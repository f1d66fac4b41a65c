//! Further processes in a container: each is added by a tenant (`tenant`), awaited by the reaper
//! and forgotten once its end has been reported.
//!
//! None outlives its container: most die with the container's PID namespace, the rest with its
//! cgroup.

use std::collections::HashMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent::{Descriptor, Streams};
use tokio::task::spawn_blocking;

use super::{
    Connected, ContainerError, Containers, End, Made, failed, read_spec, signal_number,
    size_terminal, state,
};
use crate::cgroup::Cgroup;
use crate::confinement::Restrictions;
use crate::creator::ContainerFiles;
use crate::descriptors;
use crate::process::send_signal;
use crate::share;
use crate::spec::{self, PreparedProcess, SpecError};
use crate::tenant;

/// What Exec asks for; the fields are those of its message.
#[derive(Debug)]
pub(crate) struct ExecOrder {
    pub(crate) container_id: String,
    pub(crate) exec_id: String,
    pub(crate) process_json: Vec<u8>,
    pub(crate) streams: Streams,
    pub(crate) descriptors: Vec<Descriptor>,
}

/// The further processes of one container, by their ids.
#[derive(Debug, Default)]
pub(super) struct Execs(Mutex<HashMap<String, Entry>>);

#[derive(Clone, Debug)]
enum Entry {
    Starting,
    Running(Exec),
}

#[derive(Clone, Debug)]
struct Exec {
    made: Made,
    connected: Connected,
    /// It was given files of the host, which have to be dropped from the caches after its end.
    files: bool,
}

impl Execs {
    /// Reserves the id for a process that is about to be started.
    fn reserve(&self, exec_id: &str) -> Result<(), ContainerError> {
        spec::check_id(exec_id)?;
        let mut table = self.table();
        if table.contains_key(exec_id) {
            return Err(ContainerError::ExecExists(exec_id.to_owned()));
        }
        table.insert(exec_id.to_owned(), Entry::Starting);
        Ok(())
    }

    fn running(&self, exec_id: &str) -> Result<Exec, ContainerError> {
        match self.table().get(exec_id) {
            Some(Entry::Running(exec)) => Ok(exec.clone()),
            Some(Entry::Starting) => Err(not_now(exec_id, "is being started")),
            None => Err(ContainerError::ExecUnknown(exec_id.to_owned())),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Nothing panics while it holds the lock, so the table is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Containers {
    /// Runs a process in a container and returns its pid. Runs to its end even if nobody waits.
    ///
    /// # Errors
    /// See [`ContainerError`]; no process is left then.
    pub(crate) async fn exec(&self, order: ExecOrder) -> Result<u32, ContainerError> {
        let containers = self.clone();
        let started = tokio::spawn(async move {
            let container = containers.created(&order.container_id)?;
            let exec_id = order.exec_id.clone();
            let files = descriptors::has_files(&order.descriptors);
            container.execs.reserve(&exec_id)?;
            let started = containers.start_exec(order).await;
            let mut table = container.execs.table();
            match started {
                Ok(exec) => {
                    let pid = exec.made.pid.as_raw_nonzero().get().unsigned_abs();
                    table.insert(exec_id, Entry::Running(exec));
                    Ok(pid)
                }
                Err(error) => {
                    table.remove(&exec_id);
                    if files {
                        forget();
                    }
                    Err(error)
                }
            }
        });
        started.await.map_err(|error| failed("wait for the process")(error.into()))?
    }

    /// Sends a signal to a process that Exec started.
    ///
    /// # Errors
    /// There is no such signal or process.
    pub(crate) fn kill_exec(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
    ) -> Result<(), ContainerError> {
        let exec = self.created(id)?.execs.running(exec_id)?;
        let number = signal_number(signal)?;
        // The kernel does not reuse the pid until the reaper has collected it, which shows here.
        if exec.made.end.ended().is_some() {
            return Err(not_now(exec_id, "has ended"));
        }
        send_signal(exec.made.pid, number).map_err(failed("signal the process"))
    }

    /// Tells the terminal of a process that Exec started its size.
    ///
    /// # Errors
    /// There is no such process, or it has no terminal.
    pub(crate) fn resize_exec(
        &self,
        id: &str,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), ContainerError> {
        let exec = self.created(id)?.execs.running(exec_id)?;
        let terminal =
            exec.connected.terminal.ok_or_else(|| not_now(exec_id, "has no terminal"))?;
        terminal.resize(rows, columns).map_err(failed("resize the terminal"))
    }

    /// Waits for the end of a process that Exec started, and forgets it.
    ///
    /// # Errors
    /// There is no such process.
    pub(crate) async fn wait_exec(&self, id: &str, exec_id: &str) -> Result<End, ContainerError> {
        let container = self.created(id)?;
        let mut exec = container.execs.running(exec_id)?;
        let exit = exec.made.end.wait().await;
        let written = exec.connected.outputs.written();
        container.execs.table().remove(exec_id);
        if exec.files {
            forget();
        }
        Ok(End { exit, oom_killed: false, written })
    }

    /// Starts a process whose id is reserved, or leaves nothing of it.
    async fn start_exec(&self, order: ExecOrder) -> Result<Exec, ContainerError> {
        let shares_files = descriptors::has_files(&order.descriptors);
        let ExecOrder { container_id: id, exec_id, process_json, mut streams, descriptors } = order;
        let of = self.created(&id)?;
        if of.init.ended().is_some() {
            return Err(state(&id, "has ended"));
        }
        // The new process would freeze on its way in.
        if Cgroup::of(&id).is_frozen().map_err(failed("look whether it is frozen"))? {
            return Err(state(&id, "is frozen"));
        }
        let files = ContainerFiles::of(&id);
        let container = files.clone();
        let terminal = streams.terminal.is_some();
        let prepared = spawn_blocking(move || {
            let spec = read_spec(&container)?;
            let restrictions = Restrictions::read(&container.bundle)
                .map_err(failed("read the container's restrictions"))?;
            let container = (&spec, &restrictions);
            spec::prepare_process(container, &process_json, terminal).map_err(ContainerError::from)
        });
        let prepared = prepared.await.map_err(|e| failed("read the process")(e.into()))??;
        let directory = files.exec(&exec_id);
        let started = async {
            fs::create_dir_all(&directory).map_err(failed("make the process's directory"))?;
            let PreparedProcess { process, restrictions, stream_owner } = prepared;
            restrictions.write(&directory).map_err(failed("write the restrictions"))?;
            size_terminal(&mut streams, &process);
            let process = serde_json::to_vec(&process).map_err(SpecError::from)?;
            fs::write(directory.join(tenant::PROCESS), process)
                .map_err(failed("write the process"))?;
            let init = of.pid.as_raw_nonzero().to_string();
            let arguments = [tenant::VERB, &id, &exec_id, &init];
            let ends = (streams, descriptors);
            self.make_process(&arguments, stream_owner, &directory, ends).await
        }
        .await;
        if let Err(error) = fs::remove_dir_all(&directory) {
            tracing::error!(process = exec_id, %error, "cannot remove the files of a process");
        }
        let (made, connected) = started?;
        match connected {
            Ok(connected) => Ok(Exec { made, connected, files: shares_files }),
            Err(error) => {
                // It may have ended by itself.
                let _ = send_signal(made.pid, libc::SIGKILL);
                Err(error.into())
            }
        }
    }
}

/// Drops cached files that nobody uses any more, without waiting for that.
fn forget() {
    drop(spawn_blocking(|| {
        if let Err(error) = share::forget() {
            tracing::warn!(%error, "cannot release the files that were passed");
        }
    }));
}

fn not_now(exec_id: &str, state: &'static str) -> ContainerError {
    ContainerError::State { what: format!("process {exec_id}"), state }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_while_its_process_is_started() {
        let execs = Execs::default();
        execs.reserve("one").unwrap();
        assert!(matches!(execs.reserve("one"), Err(ContainerError::ExecExists(_))));
        assert_eq!(execs.running("one").unwrap_err().to_string(), "process one is being started");
        assert_eq!(execs.running("two").unwrap_err().to_string(), "process two does not exist");
        assert!(matches!(execs.reserve("../up"), Err(ContainerError::Spec(SpecError::Id(_)))));
    }
}
