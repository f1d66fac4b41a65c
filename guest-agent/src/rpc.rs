//! The calls of `agent.proto`: each is translated, and the only decision made here is which status
//! code an error becomes.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use bulkhead_protocol::agent::agent_server::{Agent, AgentServer};
use bulkhead_protocol::agent::{
    AddHugePagesReply, AddHugePagesRequest, AddSwapReply, AddSwapRequest, ClockReply, ClockRequest,
    ConfigureReply, ConfigureRequest, ConnectReply, ConnectRequest, CreateReply, CreateRequest,
    DeleteReply, DeleteRequest, ExecReply, ExecRequest, ExpectHugePagesReply,
    ExpectHugePagesRequest, FormatsReply, FormatsRequest, HelloReply, HelloRequest, KillReply,
    KillRequest, MemorySize, MemoryWanted, NameQuery, NamesRequest, PauseReply, PauseRequest,
    ProcessesReply, ProcessesRequest, ReleaseReply, ReleaseRequest, RescanReply, RescanRequest,
    ResizeReply, ResizeRequest, ResumeReply, ResumeRequest, StartProcessorsReply,
    StartProcessorsRequest, StartReply, StartRequest, SyncReply, SyncRequest, UpdateReply,
    UpdateRequest, WaitReply, WaitRequest,
};
use bulkhead_protocol::{MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, VERSION};
use rustix::system::uname;
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::spawn_blocking;
use tokio_vsock::{VsockConnectInfo, VsockListener};
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::container::exec::ExecOrder;
use crate::container::{ContainerError, Containers};
use crate::formats::Registered;
use crate::memory::Watch;
use crate::names::Names;
use crate::network::Network;
use crate::share::Share;
use crate::shared_sockets::SharedSockets;
use crate::sysctl::Setting;
use crate::{clock, formats, hotplug, huge_pages, logging, memory, swap, timekeeping};

/// The longest reason that is sent: a status is a header, whose size is limited.
const REASON_BYTES: usize = 2048;
/// The most queries that wait to be sent to the host.
const QUERIES: usize = 64;

/// What the calls act on.
struct Calls {
    containers: Containers,
    share: Share,
    sockets: SharedSockets,
    network: Arc<Mutex<Network>>,
    /// Set once the host has asked for it.
    names: Mutex<Option<Names>>,
    /// Set once the host has registered its own.
    formats: Mutex<Option<Registered>>,
    /// Held by the call that watches the containers' memory.
    memory: Arc<Mutex<()>>,
    /// Rung when the host's clock was set.
    clock: Arc<Notify>,
}

/// Serves the calls that come from the vsock address `host`, for ever.
///
/// # Errors
/// The listener fails.
pub(crate) async fn serve(
    listener: VsockListener,
    host: u32,
    containers: Containers,
    (share, sockets): (Share, SharedSockets),
) -> Result<(), tonic::transport::Error> {
    let clock = Arc::new(Notify::new());
    tokio::spawn(timekeeping::keep(clock.clone()));
    let service = AgentServer::new(Calls {
        containers,
        share,
        sockets,
        network: Arc::default(),
        names: Mutex::default(),
        formats: Mutex::default(),
        memory: Arc::default(),
        clock: clock.clone(),
    })
    .max_decoding_message_size(MAX_REQUEST_BYTES)
    .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let service = InterceptedService::new(service, move |request| from_host(request, host));
    Server::builder().add_service(service).serve_with_incoming(listener.incoming()).await
}

/// Refuses a call that does not come from the host.
fn from_host(request: Request<()>, host: u32) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<VsockConnectInfo>().and_then(VsockConnectInfo::peer_addr);
    if peer.is_some_and(|peer| peer.cid() == host) {
        return Ok(request);
    }
    Err(Status::unauthenticated("only the host is served"))
}

#[tonic::async_trait]
impl Agent for Calls {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let HelloRequest { version, time_ns, entropy, hostname, sysctls, settings } =
            request.into_inner();
        if version != VERSION {
            return Err(Status::failed_precondition(format!(
                "host speaks version {version} of the protocol, this guest version {VERSION}"
            )));
        }
        if entropy.len() > clock::ENTROPY_BYTES {
            let limit = clock::ENTROPY_BYTES;
            return Err(Status::invalid_argument(format!("entropy has more than {limit} bytes")));
        }
        if time_ns != 0 {
            set_time(time_ns)?;
        }
        if !entropy.is_empty() {
            clock::add_entropy(&entropy).map_err(internal("cannot add entropy"))?;
        }
        if !hostname.is_empty() {
            clock::set_hostname(&hostname)
                .map_err(|error| Status::invalid_argument(format!("host name: {error}")))?;
        }
        for (name, value) in settings {
            if let Err(error) = Setting::of_the_machine(&name, value).and_then(Setting::make) {
                tracing::info!(%error, "a setting of the host is not the guest's");
            }
        }
        // The caller's own settings come last.
        for (name, value) in sysctls {
            Setting::new(&name, value)
                .and_then(Setting::make)
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
        }
        Ok(Response::new(HelloReply {
            version: VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: uname().release().to_string_lossy().into_owned(),
        }))
    }

    async fn register_formats(
        &self,
        request: Request<FormatsRequest>,
    ) -> Result<Response<FormatsReply>, Status> {
        let mut registered = self.formats.lock().await;
        if registered.is_some() {
            return Err(Status::failed_precondition("formats are registered already"));
        }
        self.share.mount().await.map_err(internal("cannot mount the share"))?;
        let request = request.into_inner();
        let done = blocking(move || formats::register(request)).await?;
        *registered = Some(done.map_err(internal("cannot register formats"))?);
        Ok(Response::new(FormatsReply {}))
    }

    async fn create(
        &self,
        request: Request<CreateRequest>,
    ) -> Result<Response<CreateReply>, Status> {
        let pid = self.containers.create(request.into_inner()).await?;
        Ok(Response::new(CreateReply { pid }))
    }

    async fn start(&self, request: Request<StartRequest>) -> Result<Response<StartReply>, Status> {
        self.containers.start(&request.into_inner().container_id).await?;
        Ok(Response::new(StartReply {}))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<KillReply>, Status> {
        let KillRequest { container_id, signal, all, exec_id } = request.into_inner();
        if all || exec_id.is_empty() {
            self.containers.kill(&container_id, signal, all)?;
        } else {
            self.containers.kill_exec(&container_id, &exec_id, signal)?;
        }
        Ok(Response::new(KillReply {}))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Result<Response<WaitReply>, Status> {
        let WaitRequest { container_id, exec_id } = request.into_inner();
        let end = if exec_id.is_empty() {
            self.containers.wait(&container_id).await?
        } else {
            self.containers.wait_exec(&container_id, &exec_id).await?
        };
        let at = end.exit.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Response::new(WaitReply {
            exit_status: end.exit.status,
            exited_at_ns: u64::try_from(at.as_nanos()).unwrap_or(u64::MAX),
            oom_killed: end.oom_killed,
            stdout_bytes: end.written.stdout,
            stderr_bytes: end.written.stderr,
        }))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteReply>, Status> {
        self.containers.delete(&request.into_inner().container_id).await?;
        Ok(Response::new(DeleteReply {}))
    }

    async fn processes(
        &self,
        request: Request<ProcessesRequest>,
    ) -> Result<Response<ProcessesReply>, Status> {
        let processes = self.containers.processes(&request.into_inner().container_id)?;
        Ok(Response::new(ProcessesReply { processes }))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecReply>, Status> {
        let ExecRequest { container_id, exec_id, process_json, streams, descriptors } =
            request.into_inner();
        let streams = streams.unwrap_or_default();
        let order = ExecOrder { container_id, exec_id, process_json, streams, descriptors };
        let pid = self.containers.exec(order).await?;
        Ok(Response::new(ExecReply { pid }))
    }

    async fn resize(
        &self,
        request: Request<ResizeRequest>,
    ) -> Result<Response<ResizeReply>, Status> {
        let ResizeRequest { container_id, exec_id, rows, columns } = request.into_inner();
        if exec_id.is_empty() {
            self.containers.resize(&container_id, rows, columns)?;
        } else {
            self.containers.resize_exec(&container_id, &exec_id, rows, columns)?;
        }
        Ok(Response::new(ResizeReply {}))
    }

    async fn pause(&self, request: Request<PauseRequest>) -> Result<Response<PauseReply>, Status> {
        self.containers.pause(&request.into_inner().container_id).await?;
        Ok(Response::new(PauseReply {}))
    }

    async fn resume(
        &self,
        request: Request<ResumeRequest>,
    ) -> Result<Response<ResumeReply>, Status> {
        self.containers.resume(&request.into_inner().container_id)?;
        Ok(Response::new(ResumeReply {}))
    }

    async fn update(
        &self,
        request: Request<UpdateRequest>,
    ) -> Result<Response<UpdateReply>, Status> {
        let UpdateRequest { container_id, resources_json } = request.into_inner();
        self.containers.update(&container_id, &resources_json).await?;
        Ok(Response::new(UpdateReply {}))
    }

    async fn rescan(&self, _: Request<RescanRequest>) -> Result<Response<RescanReply>, Status> {
        let bound = blocking(|| hotplug::rescan(Path::new(hotplug::PLATFORM_BUS)))
            .await?
            .map_err(internal("cannot bind a slot"))?;
        if !bound.is_empty() {
            self.share.mount().await.map_err(internal("cannot mount the share"))?;
        }
        Ok(Response::new(RescanReply { bound }))
    }

    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureReply>, Status> {
        let ConfigureRequest { interfaces, settings, ipv6 } = request.into_inner();
        let mut network = self.network.clone().lock_owned().await;
        blocking(move || network.configure(interfaces, &settings, ipv6))
            .await?
            .map_err(|error| Status::failed_precondition(logging::chain(&error)))?;
        Ok(Response::new(ConfigureReply {}))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseReply>, Status> {
        let slots = request.into_inner().slots;
        let mut network = self.network.clone().lock_owned().await;
        blocking(move || network.release(&slots))
            .await?
            .map_err(internal("cannot release an interface"))?;
        Ok(Response::new(ReleaseReply {}))
    }

    type NamesStream = ReceiverStream<Result<NameQuery, Status>>;

    async fn names(
        &self,
        request: Request<Streaming<NamesRequest>>,
    ) -> Result<Response<Self::NamesStream>, Status> {
        let mut answers = request.into_inner();
        let first = answers.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("no servers are named"))?;
        let mut names = self.names.lock().await;
        if names.is_some() {
            return Err(Status::failed_precondition("name servers are stood in for already"));
        }
        let (queries, asked) = mpsc::channel(QUERIES);
        let serving = Names::serve(&first.servers, answers, queries).await;
        *names = Some(serving.map_err(internal("cannot answer for name servers"))?);
        Ok(Response::new(ReceiverStream::new(asked)))
    }

    async fn connect_socket(
        &self,
        request: Request<ConnectRequest>,
    ) -> Result<Response<ConnectReply>, Status> {
        let connected = self.sockets.connect(request.into_inner()).await;
        connected.map_err(|error| Status::failed_precondition(logging::chain(&error)))?;
        Ok(Response::new(ConnectReply {}))
    }

    async fn start_processors(
        &self,
        request: Request<StartProcessorsRequest>,
    ) -> Result<Response<StartProcessorsReply>, Status> {
        let count = request.into_inner().count;
        let start = move || hotplug::start_processors(Path::new(hotplug::PROCESSORS), count);
        let started =
            blocking(start).await?.map_err(internal("cannot start a processor of the guest"))?;
        tracing::info!(count = started as u64, "processors started");
        Ok(Response::new(StartProcessorsReply {}))
    }

    async fn expect_huge_pages(
        &self,
        _: Request<ExpectHugePagesRequest>,
    ) -> Result<Response<ExpectHugePagesReply>, Status> {
        blocking(huge_pages::expect).await?.map_err(internal("cannot prepare for huge pages"))?;
        Ok(Response::new(ExpectHugePagesReply {}))
    }

    async fn add_huge_pages(
        &self,
        request: Request<AddHugePagesRequest>,
    ) -> Result<Response<AddHugePagesReply>, Status> {
        let AddHugePagesRequest { pages, plugged_mib } = request.into_inner();
        blocking(move || huge_pages::add(pages, plugged_mib))
            .await?
            .map_err(internal("cannot make huge pages"))?;
        Ok(Response::new(AddHugePagesReply {}))
    }

    async fn clock(&self, request: Request<ClockRequest>) -> Result<Response<ClockReply>, Status> {
        set_time(request.into_inner().time_ns)?;
        self.clock.notify_one();
        Ok(Response::new(ClockReply {}))
    }

    type MemoryStream = ReceiverStream<Result<MemoryWanted, Status>>;

    async fn memory(
        &self,
        request: Request<Streaming<MemorySize>>,
    ) -> Result<Response<Self::MemoryStream>, Status> {
        let held = self.memory.clone().try_lock_owned();
        let held = held.map_err(|_| Status::failed_precondition("memory is watched already"))?;
        let mut sizes = request.into_inner();
        let first = sizes.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("no size is named"))?;
        let watch = Watch::open(&first).await.map_err(internal("cannot watch the memory"))?;
        let (wants, wanted) = mpsc::channel(1);
        let watched = memory::watch(watch, sizes, wants);
        tokio::spawn(async move {
            if let Err(error) = watched.await {
                tracing::warn!(%error, "cannot see how much memory the containers need");
            }
            drop(held);
        });
        Ok(Response::new(ReceiverStream::new(wanted)))
    }

    async fn add_swap(
        &self,
        request: Request<AddSwapRequest>,
    ) -> Result<Response<AddSwapReply>, Status> {
        let serial = request.into_inner().serial;
        blocking(move || swap::add(serial))
            .await?
            .map_err(|error| Status::failed_precondition(logging::chain(&error)))?;
        Ok(Response::new(AddSwapReply {}))
    }

    async fn sync(&self, _: Request<SyncRequest>) -> Result<Response<SyncReply>, Status> {
        self.containers.settle().await;
        blocking(rustix::fs::sync).await?;
        Ok(Response::new(SyncReply {}))
    }
}

impl From<ContainerError> for Status {
    fn from(error: ContainerError) -> Self {
        use crate::io::StreamError;
        use crate::spec::SpecError;
        let mut reason = logging::chain(&error);
        reason.truncate(reason.floor_char_boundary(REASON_BYTES));
        match error {
            ContainerError::Spec(SpecError::Terminal | SpecError::HostHooks(_)) => {
                Self::failed_precondition(reason)
            }
            ContainerError::Stream(StreamError::Missing { .. }) => Self::deadline_exceeded(reason),
            ContainerError::Stream(StreamError::Pipe { .. }) => Self::internal(reason),
            ContainerError::Spec(_) | ContainerError::Stream(_) | ContainerError::Signal(_) => {
                Self::invalid_argument(reason)
            }
            ContainerError::Exists(_) | ContainerError::ExecExists(_) => {
                Self::already_exists(reason)
            }
            ContainerError::Unknown(_)
            | ContainerError::ExecUnknown(_)
            | ContainerError::ProgramNotFound(_) => Self::not_found(reason),
            ContainerError::Freeze => Self::deadline_exceeded(reason),
            ContainerError::ProgramNotExecutable(_) => Self::permission_denied(reason),
            ContainerError::State { .. }
            | ContainerError::Setting(..)
            | ContainerError::Limits(_)
            | ContainerError::Disk(_)
            | ContainerError::Create(_) => Self::failed_precondition(reason),
            ContainerError::Step { .. } => Self::internal(reason),
        }
    }
}

/// Takes over the host's time: exactly if the kernel can read it, else as it was sent.
fn set_time(time_ns: u64) -> Result<(), Status> {
    let set = match timekeeping::ahead() {
        Ok(ahead) => timekeeping::step(ahead),
        Err(_) => clock::set_time(time_ns),
    };
    set.map_err(internal("cannot set the clock"))
}

/// Runs what may block in another thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    spawn_blocking(work).await.map_err(|error| Status::internal(error.to_string()))
}

/// Names the part of the guest that failed.
fn internal(what: &'static str) -> impl FnOnce(io::Error) -> Status {
    move |error| Status::internal(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL, VsockAddr, VsockStream};
    use tonic::Code;
    use tonic::transport::server::Connected as _;

    use super::*;
    use crate::io::{StreamError, StreamKind};
    use crate::spec::SpecError;

    /// A call with a connection from the address 1, as the agent gets it.
    async fn call() -> Request<()> {
        let address = |cid| VsockAddr::new(cid, 4242);
        let listener = VsockListener::bind(address(VMADDR_CID_ANY)).unwrap();
        let connecting = VsockStream::connect(address(VMADDR_CID_LOCAL));
        let (accepted, _connected) = tokio::join!(listener.accept(), connecting);
        let mut request = Request::new(());
        request.extensions_mut().insert(accepted.unwrap().0.connect_info());
        request
    }

    #[tokio::test]
    #[ignore = "needs the test host"]
    async fn a_call_from_anywhere_but_the_host_is_refused() {
        assert!(from_host(call().await, VMADDR_CID_LOCAL).is_ok());
        let status = from_host(call().await, VMADDR_CID_HOST).unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert_eq!(status.message(), "only the host is served");
    }

    #[test]
    fn a_call_from_nowhere_is_refused() {
        let status = from_host(Request::new(()), VMADDR_CID_HOST).unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
    }

    #[test]
    fn a_reason_that_is_too_long_is_cut() {
        let status = Status::from(ContainerError::Create("ä".repeat(REASON_BYTES)));
        // A letter of two bytes may not have fitted.
        assert!((REASON_BYTES - 1..=REASON_BYTES).contains(&status.message().len()));
    }

    #[test]
    fn errors_become_the_codes_that_the_contract_names() {
        let id = || "one".to_owned();
        let table = [
            (ContainerError::Exists(id()), Code::AlreadyExists),
            (ContainerError::Unknown(id()), Code::NotFound),
            (ContainerError::ProgramNotFound(id()), Code::NotFound),
            (ContainerError::ProgramNotExecutable(id()), Code::PermissionDenied),
            (ContainerError::Create(id()), Code::FailedPrecondition),
            (ContainerError::State { what: id(), state: "has ended" }, Code::FailedPrecondition),
            (ContainerError::ExecExists(id()), Code::AlreadyExists),
            (ContainerError::ExecUnknown(id()), Code::NotFound),
            (ContainerError::Freeze, Code::DeadlineExceeded),
            (ContainerError::Signal(99), Code::InvalidArgument),
            (SpecError::Terminal.into(), Code::FailedPrecondition),
            (SpecError::Id(id()).into(), Code::InvalidArgument),
            (StreamError::Missing { stream: StreamKind::Stdin }.into(), Code::DeadlineExceeded),
            (StreamError::Taken { stream: StreamKind::Stdin }.into(), Code::InvalidArgument),
        ];
        for (error, code) in table {
            let words = error.to_string();
            let status = Status::from(error);
            assert_eq!(status.code(), code, "{words}");
            assert_eq!(status.message(), words);
        }
    }
}
