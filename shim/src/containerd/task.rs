//! The supervisor's entry point: containerd's Task service (`containerd.task.v3.Task`) over ttrpc.
//!
//! Each method translates its request and calls [`Container`]. The generated service answers
//! UNIMPLEMENTED to methods that are not implemented here.

use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::agent;
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest,
    PidsResponse, ProcessInfo, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, Status as TaskStatus, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::shim_async::Task;
use oci_spec::runtime::LinuxResources;
use prost::Message;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{Notify, oneshot};
use ttrpc::r#async::TtrpcContext;
use ttrpc::error::get_rpc_status;
use ttrpc::{Code, Error};

use crate::state::Exit;
use crate::streams::attach::Attachments;
use crate::supervisor::container::{Container, ContainerError};
use crate::supervisor::exec::{ExecError, PreparedExec};
use crate::supervisor::lifecycle::Status;

/// The type of the details in the first [`ProcessInfo`] of a reply: the processes in the guest. The
/// pids of a reply are the host's, so they name stand-ins.
pub const PROCESSES: &str = "bulkhead.agent.v1.ProcessesReply";

/// The type of the limits in an update, as containerd names it.
pub const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// The metadata key with which a process waits while its container is frozen, instead of failing.
pub const IGNORE_PAUSED: &str = "ignore-paused";

/// The metadata key with which a container is deleted in any state.
pub const FORCE: &str = "force";

/// The service of one pod.
#[derive(Debug)]
pub struct Service {
    container: Arc<Container>,
    attachments: Arc<Attachments>,
    /// Notified when the pod's creator has gone away or wants the supervisor to end.
    leave: Arc<Notify>,
}

impl Service {
    /// A service for one container.
    #[must_use]
    pub fn new(container: Arc<Container>, attachments: Attachments, leave: Arc<Notify>) -> Self {
        Self { container, attachments: Arc::new(attachments), leave }
    }

    /// The container of that name, for a call about its init process.
    fn container(&self, id: &str, exec: &str) -> ttrpc::Result<&Arc<Container>> {
        if id != self.container.home().id().as_str() {
            return Err(get_rpc_status(
                Code::NOT_FOUND,
                format!("container {id:?} does not exist in this pod"),
            ));
        }
        if !exec.is_empty() {
            return Err(get_rpc_status(
                Code::NOT_FOUND,
                format!("process {exec:?}: only exec and start know further processes yet"),
            ));
        }
        Ok(&self.container)
    }
}

/// The agent's list of processes, as the details of a reply.
fn details(processes: Vec<agent::ProcessInfo>) -> Any {
    let mut details = Any::new();
    details.type_url = PROCESSES.to_owned();
    details.value = agent::ProcessesReply { processes }.encode_to_vec();
    details
}

/// The only mapping from errors to status codes.
fn status(error: ContainerError) -> Error {
    use ContainerError as E;
    let code = match &error {
        E::Transition(_) | E::NotRunning | E::Exec(ExecError::Status(_)) => {
            Code::FAILED_PRECONDITION
        }
        E::Exec(ExecError::Taken(_)) => Code::ALREADY_EXISTS,
        E::Exec(ExecError::Unknown(_)) => Code::NOT_FOUND,
        E::Exec(ExecError::TooMany) => Code::RESOURCE_EXHAUSTED,
        E::Bundle(_) | E::HostSocket(_) => Code::INVALID_ARGUMENT,
        E::Pod(_)
        | E::Sandbox(_)
        | E::State(_)
        | E::Hook(_)
        | E::StandIn(_)
        | E::Cancelled
        | E::Thread(_)
        | E::Cgroup(_)
        | E::OomScore(..) => Code::INTERNAL,
        E::Agent(_) => Code::UNKNOWN,
    };
    get_rpc_status(code, format!("{:#}", anyhow::Error::from(error)))
}

/// Runs `work` to its end, even if the caller goes away: a call is cancelled when its caller goes
/// away, and nothing would know of a process that is half started then. (A container that is half
/// created needs no such care: [`crate::supervisor`] takes everything down.)
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ContainerError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await;
    let done = done.map_err(|error| get_rpc_status(Code::INTERNAL, error.to_string()))?;
    done.map_err(status)
}

fn time(exit: Option<Exit>) -> MessageField<Timestamp> {
    let Some(exit) = exit else { return MessageField::none() };
    let mut time = Timestamp::new();
    time.seconds = i64::try_from(exit.at_ns / 1_000_000_000).unwrap_or(i64::MAX);
    time.nanos = i32::try_from(exit.at_ns % 1_000_000_000).unwrap_or(0);
    MessageField::some(time)
}

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let container = self.container(&request.id, "")?;
        let pid = container.create(&self.attachments).await.map_err(status)?.pid;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.container(&request.id, "")?.clone();
        let attachments = self.attachments.clone();
        // Dropped with the call, which ends when its caller goes away.
        let (_caller, gone) = oneshot::channel::<()>();
        let started = to_its_end(async move {
            let gone = async { drop(gone.await) };
            match request.exec_id.as_str() {
                "" => container.start().await,
                exec => container.start_exec(exec, &attachments, gone).await,
            }
        });
        let pid = started.await?.pid;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id, &request.exec_id)?;
        container.kill(request.signal, request.all).await.map_err(status)?;
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        context: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let container = self.container(&request.id, &request.exec_id)?;
        let force = context.metadata.contains_key(FORCE);
        let exit = container.delete(force).await.map_err(status)?;
        let (exit_status, exited_at) = (exit.status.into(), time(Some(exit)));
        Ok(DeleteResponse { exit_status, exited_at, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let state = self.container(&request.id, &request.exec_id)?.state().await;
        let status = match state.observed() {
            Status::Creating | Status::Created => TaskStatus::CREATED,
            Status::Running => TaskStatus::RUNNING,
            Status::Paused | Status::CreatedPaused => TaskStatus::PAUSED,
            Status::Stopped => TaskStatus::STOPPED,
        };
        Ok(StateResponse {
            id: request.id,
            bundle: state.bundle.to_string_lossy().into_owned(),
            pid: state.stand_in.map_or(0, |process| process.pid),
            status: status.into(),
            exit_status: state.exit.map_or(0, |exit| exit.status.into()),
            exited_at: time(state.exit),
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.container(&request.id, &request.exec_id)?.wait().await;
        let (exit_status, exited_at) = (exit.status.into(), time(Some(exit)));
        Ok(WaitResponse { exit_status, exited_at, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.container(&request.id, "")?;
        let processes = container.processes().await.map_err(status)?;
        let stand_ins = container.stand_ins().await.into_iter();
        let mut details = MessageField::some(details(processes));
        let processes = stand_ins.map(|stand_in| ProcessInfo {
            pid: stand_in.pid,
            info: details.take().into(),
            ..Default::default()
        });
        let processes = processes.collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let state = self.container(&request.id, "")?.state().await;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: state.stand_in.map_or(0, |process| process.pid),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.leave.notify_one();
        Ok(Empty::new())
    }

    async fn exec(
        &self,
        context: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id, "")?;
        let process_json = request.spec.into_option().unwrap_or_default().value;
        let ignore_paused = context.metadata.contains_key(IGNORE_PAUSED);
        let prepared = PreparedExec { process_json, ignore_paused };
        container.prepare_exec(&request.exec_id, prepared).await.map_err(status)?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id, "")?.clone();
        to_its_end(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id, "")?.clone();
        let resources = request.resources.into_option().unwrap_or_default().value;
        let resources: LinuxResources = serde_json::from_slice(&resources).map_err(|error| {
            get_rpc_status(Code::INVALID_ARGUMENT, format!("resources: {error}"))
        })?;
        to_its_end(async move { container.update(&resources).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id, "")?.clone();
        to_its_end(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }
}
