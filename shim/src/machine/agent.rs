//! The client of the agent: gRPC over one vsock stream that the monitor handed out.
//!
//! The agent is not trusted: the protocol limits the size of every answer, and this client limits
//! the time. Only [`Agent::wait`] may take as long as the container lives, and [`Agent::create`] as
//! long as its hooks.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::agent_client::AgentClient;
use bulkhead_protocol::agent::{
    AddHugePagesRequest, AddSwapRequest, ClockRequest, ConfigureRequest, ConnectRequest,
    CreateRequest, DeleteRequest, ExecRequest, ExpectHugePagesRequest, FormatsRequest,
    HelloRequest, KillRequest, MemorySize, MemoryWanted, NameQuery, NamesRequest, PauseRequest,
    ProcessInfo, ProcessesRequest, ReleaseRequest, RescanRequest, ResizeRequest, ResumeRequest,
    StartProcessorsRequest, StartRequest, SyncRequest, UpdateRequest, WaitReply, WaitRequest,
};
use bulkhead_protocol::{MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, VERSION};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::tokio_stream::{self, StreamExt};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};

use crate::machine::words::printable;
use crate::state::id::ContainerId;
use crate::streams::attach::TerminalSize;

/// The time limit of most calls.
const SHORT: Duration = Duration::from_secs(20);
/// The time limit for creating a container or a process: the agent reads the program from the share
/// and waits for streams.
const CREATE: Duration = Duration::from_secs(60);
/// The time limit for starting processors, which takes some time for each.
const PROCESSORS: Duration = Duration::from_secs(60);
/// The time limit for adding huge pages.
const HUGE_PAGES: Duration = Duration::from_secs(60);
/// How much longer for each page: both kernels fill it with zeroes.
const HUGE_PAGE: Duration = Duration::from_millis(20);
/// The time limit for writing everything back.
const SYNC: Duration = Duration::from_secs(30);

/// Why a call to the agent failed.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The agent returned an error.
    #[error("{0}")]
    Refused(String, Code),
    /// The agent did not answer in time.
    #[error("the guest's agent did not answer {call} within {patience:?}")]
    Late {
        /// The call.
        call: &'static str,
        /// The time limit.
        patience: Duration,
    },
    /// The connection failed.
    #[error("connection to the guest's agent")]
    Connect(#[source] tonic::transport::Error),
}

impl AgentError {
    /// The container or process does not exist.
    #[must_use]
    pub const fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(_, Code::NotFound))
    }

    /// The request is invalid.
    #[must_use]
    pub const fn is_invalid(&self) -> bool {
        matches!(self, Self::Refused(_, Code::InvalidArgument))
    }

    /// The container or process does not exist any more, or is in the wrong state.
    #[must_use]
    pub const fn is_too_late(&self) -> bool {
        matches!(self, Self::Refused(_, Code::NotFound | Code::FailedPrecondition))
    }
}

impl From<Status> for AgentError {
    fn from(status: Status) -> Self {
        Self::Refused(printable(status.message()), status.code())
    }
}

/// A process of a container.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The container.
    pub container: &'a ContainerId,
    /// The name of a process that was executed in it; empty for its init process.
    pub exec: &'a str,
}

/// A connection to the agent.
#[derive(Clone, Debug)]
pub struct Agent {
    client: AgentClient<Channel>,
}

impl Agent {
    /// Connects over an open stream to the agent.
    ///
    /// # Errors
    /// When the other end does not speak HTTP/2.
    pub async fn connect(stream: UnixStream) -> Result<Self, AgentError> {
        // The channel may ask for a connection more than once; only the first request gets the
        // stream.
        let once = Mutex::new(Some(stream));
        let connector = tower::service_fn(move |_: Uri| {
            let stream = once.lock().unwrap_or_else(PoisonError::into_inner).take();
            async move {
                let stream = stream.ok_or(io::ErrorKind::NotConnected)?;
                stream.set_nonblocking(true)?;
                io::Result::Ok(TokioIo::new(tokio::net::UnixStream::from_std(stream)?))
            }
        });
        // The name is only sent as a header; it is not resolved.
        let endpoint = Endpoint::from_static("http://agent");
        let connected = timeout(SHORT, endpoint.connect_with_connector(connector)).await;
        let channel = connected
            .map_err(|_| AgentError::Late { call: "connect", patience: SHORT })?
            .map_err(AgentError::Connect)?;
        let client = AgentClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        Ok(Self { client })
    }

    /// The first call; returns the guest's kernel release.
    ///
    /// # Errors
    /// When the agent speaks another version, or the guest refuses a sysctl.
    pub async fn hello(
        &self,
        (hostname, entropy): (&str, &[u8]),
        sysctls: &BTreeMap<String, String>,
        settings: BTreeMap<String, String>,
    ) -> Result<String, AgentError> {
        let request = HelloRequest {
            version: VERSION,
            time_ns: now_ns(),
            entropy: entropy.to_vec(),
            hostname: hostname.to_owned(),
            sysctls: sysctls.clone().into_iter().collect(),
            settings: settings.into_iter().collect(),
        };
        let mut client = self.client.clone();
        Ok(within(SHORT, "Hello", client.hello(request)).await?.kernel_release)
    }

    /// Registers the host's binary formats.
    ///
    /// # Errors
    /// When the guest's kernel has none.
    pub async fn register_formats(&self, request: FormatsRequest) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        within(SHORT, "RegisterFormats", client.register_formats(request)).await.map(drop)
    }

    /// Creates a container whose disks have been attached to the machine. `hooks` is additional
    /// time for its hooks; `None` means no time limit.
    ///
    /// # Errors
    /// When the guest fails.
    pub async fn create(
        &self,
        request: CreateRequest,
        hooks: Option<Duration>,
    ) -> Result<u32, AgentError> {
        let mut client = self.client.clone();
        let created = client.create(request);
        Ok(match hooks {
            Some(hooks) => within(CREATE + hooks, "Create", created).await?.pid,
            None => created.await?.into_inner().pid,
        })
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// When the guest fails.
    pub async fn start(&self, id: &ContainerId) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = StartRequest { container_id: id.to_string() };
        within(SHORT, "Start", client.start(request)).await.map(drop)
    }

    /// Runs a further process in a container.
    ///
    /// # Errors
    /// When the guest fails.
    pub async fn exec(&self, request: ExecRequest) -> Result<u32, AgentError> {
        let mut client = self.client.clone();
        Ok(within(CREATE, "Exec", client.exec(request)).await?.pid)
    }

    /// Signals a process, or every process of its container if `all` is set.
    ///
    /// # Errors
    /// When there is nothing to signal.
    pub async fn kill(&self, target: Target<'_>, signal: u32, all: bool) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let (container_id, exec_id) = target.names();
        let request = KillRequest { container_id, signal, all, exec_id };
        within(SHORT, "Kill", client.kill(request)).await.map(drop)
    }

    /// Waits for the end of a process, without a time limit.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn wait(&self, target: Target<'_>) -> Result<WaitReply, AgentError> {
        let (container_id, exec_id) = target.names();
        let request = WaitRequest { container_id, exec_id };
        Ok(self.client.clone().wait(request).await?.into_inner())
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// When the process has no terminal.
    pub async fn resize(&self, target: Target<'_>, size: TerminalSize) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let (container_id, exec_id) = target.names();
        let (rows, columns) = (size.rows.into(), size.columns.into());
        let request = ResizeRequest { container_id, exec_id, rows, columns };
        within(SHORT, "Resize", client.resize(request)).await.map(drop)
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// When a process does not freeze.
    pub async fn pause(&self, id: &ContainerId) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = PauseRequest { container_id: id.to_string() };
        within(SHORT, "Pause", client.pause(request)).await.map(drop)
    }

    /// Lets a frozen container run again.
    ///
    /// # Errors
    /// When the guest fails.
    pub async fn resume(&self, id: &ContainerId) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = ResumeRequest { container_id: id.to_string() };
        within(SHORT, "Resume", client.resume(request)).await.map(drop)
    }

    /// Sets the limits of a container; `resources_json` has all limits, not only those that change.
    ///
    /// # Errors
    /// When the guest's kernel refuses one.
    pub async fn update(
        &self,
        id: &ContainerId,
        resources_json: Vec<u8>,
    ) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = UpdateRequest { container_id: id.to_string(), resources_json };
        within(SHORT, "Update", client.update(request)).await.map(drop)
    }

    /// The processes of a container, with the pids of the guest.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn processes(&self, id: &ContainerId) -> Result<Vec<ProcessInfo>, AgentError> {
        let mut client = self.client.clone();
        let request = ProcessesRequest { container_id: id.to_string() };
        Ok(within(SHORT, "Processes", client.processes(request)).await?.processes)
    }

    /// Removes a container that does not run.
    ///
    /// # Errors
    /// When it runs, is being created, or does not exist.
    pub async fn delete(&self, id: &ContainerId) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = DeleteRequest { container_id: id.to_string() };
        within(SYNC, "Delete", client.delete(request)).await.map(drop)
    }

    /// Lets the guest bind drivers to devices that were attached.
    ///
    /// # Errors
    /// When a driver refuses its device.
    pub async fn rescan(&self) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        within(SHORT, "Rescan", client.rescan(RescanRequest {})).await.map(drop)
    }

    /// Unbinds interfaces in the guest, so that they can be removed from the machine.
    ///
    /// # Errors
    /// When a driver does not release its device.
    pub async fn release(&self, slots: Vec<u32>) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        within(SHORT, "Release", client.release(ReleaseRequest { slots })).await.map(drop)
    }

    /// Configures the guest's interfaces like the host's.
    ///
    /// # Errors
    /// When the guest's kernel refuses something.
    pub async fn configure(&self, request: ConfigureRequest) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        within(SHORT, "Configure", client.configure(request)).await.map(drop)
    }

    /// Lets the agent receive queries to name servers; returns the stream of queries, and sends
    /// `answers` back.
    ///
    /// # Errors
    /// When the agent does so already, or fails.
    pub async fn names(
        &self,
        servers: Vec<u32>,
        answers: mpsc::Receiver<NamesRequest>,
    ) -> Result<Streaming<NameQuery>, AgentError> {
        let first = NamesRequest { servers, ..NamesRequest::default() };
        let requests = tokio_stream::once(first).chain(ReceiverStream::new(answers));
        let mut client = self.client.clone();
        within(SHORT, "Names", client.names(requests)).await
    }

    /// Connects a stream to a socket that a process of the guest has bound.
    ///
    /// # Errors
    /// When nobody listens, or the server does not accept in time.
    pub async fn connect_socket(&self, request: ConnectRequest) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        within(CREATE, "Connect", client.connect_socket(request)).await.map(drop)
    }

    /// Has the guest take over the host's time.
    ///
    /// # Errors
    /// When the guest fails.
    pub async fn set_clock(&self) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        within(SHORT, "Clock", client.clock(ClockRequest { time_ns: now_ns() })).await.map(drop)
    }

    /// Lets the agent ask for memory whenever the containers need more than the machine has; the
    /// answer to each is the next of `sizes`. The first is settled when this returns.
    ///
    /// # Errors
    /// When the agent does so already, or fails.
    pub async fn memory(
        &self,
        sizes: mpsc::Receiver<MemorySize>,
    ) -> Result<Streaming<MemoryWanted>, AgentError> {
        let mut client = self.client.clone();
        within(SHORT, "Memory", client.memory(ReceiverStream::new(sizes))).await
    }

    /// Brings processors online until `count` of them run.
    ///
    /// # Errors
    /// When one does not start.
    pub async fn start_processors(&self, count: u32) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = StartProcessorsRequest { count };
        within(PROCESSORS, "StartProcessors", client.start_processors(request)).await.map(drop)
    }

    /// Lets the guest swap to a disk that is attached.
    ///
    /// # Errors
    /// When the guest does not find the disk, or cannot use it.
    pub async fn add_swap(&self, serial: String) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = AddSwapRequest { serial };
        within(SHORT, "AddSwap", client.add_swap(request)).await.map(drop)
    }

    /// Lets memory for huge pages come, which is plugged from now on.
    ///
    /// # Errors
    /// When the guest cannot have any.
    pub async fn expect_huge_pages(&self) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = ExpectHugePagesRequest {};
        within(SHORT, "ExpectHugePages", client.expect_huge_pages(request)).await.map(drop)
    }

    /// Adds so many huge pages to the guest's pool, once all of `plugged_mib` is there. It has to
    /// follow [`Agent::expect_huge_pages`].
    ///
    /// # Errors
    /// When the memory does not come, or the guest's kernel makes too few pages of it.
    pub async fn add_huge_pages(&self, pages: u32, plugged_mib: u32) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = AddHugePagesRequest { pages, plugged_mib };
        let patience = HUGE_PAGES + pages * HUGE_PAGE;
        within(patience, "AddHugePages", client.add_huge_pages(request)).await.map(drop)
    }

    /// Writes everything back to the share.
    ///
    /// # Errors
    /// When the guest fails, or takes too long.
    pub async fn sync(&self) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        within(SYNC, "Sync", client.sync(SyncRequest {})).await.map(drop)
    }
}

impl<'a> Target<'a> {
    /// A container's init process.
    #[must_use]
    pub const fn init(container: &'a ContainerId) -> Self {
        Self { container, exec: "" }
    }

    fn names(self) -> (String, String) {
        (self.container.to_string(), self.exec.to_owned())
    }
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(0)
}

async fn within<T>(
    patience: Duration,
    call: &'static str,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, AgentError> {
    let answered = timeout(patience, answer).await;
    Ok(answered.map_err(|_| AgentError::Late { call, patience })??.into_inner())
}
