//! The guest's containers: each is made by a creator (`creator`), awaited by the reaper, frozen,
//! killed and removed through its cgroup. [`exec`] adds further processes to one.
//!
//! ```text
//! Create ─► creating ─► created ──Start──► running ──its init ends──► ended ──Delete──► gone
//!              │ fails      └───────────────Delete────────────────────────────────────────▲
//!              └──────────────────────────────────────────────────────────────────────────┘
//! ```
//! The supervisor on the host owns the lifecycle that users see; here only what would harm the
//! guest or mislead the host is refused.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent::{CreateRequest, Descriptor, HostSocket, ProcessInfo, Streams};
use bulkhead_protocol::{CONNECTIONS_MAX, StreamHeader};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use rustix::fs::{Uid, fchown};
use rustix::process::Pid;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio_vsock::VsockStream;

use crate::cgroup::Cgroup;
use crate::copy_up;
use crate::creator::{self, ContainerFiles};
use crate::descriptors;
use crate::disks::{self, DiskError};
use crate::hooks::Hooks;
use crate::host_sockets::{self, HostSockets};
use crate::inherit;
use crate::io::{self as streams, Meeting, Outputs, Pipes, StreamError, StreamKind, Written};
use crate::notify;
use crate::process::{Exit, Reaper, Waiter, send_signal};
use crate::report::{self, Line};
use crate::share::{self, Share};
use crate::shared_sockets::SharedSockets;
use crate::socket_path::SocketPath;
use crate::spec::{self, Prepared, SpecError};
use crate::staged::Staged;
use crate::sysctl::{Setting, SettingError};
use crate::table;
use crate::terminal::{Awaited, Terminal};
use exec::Execs;

pub(crate) mod exec;

/// A call on a container failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("container {0} exists")]
    Exists(String),
    #[error("container {0} does not exist")]
    Unknown(String),
    #[error("process {0} exists")]
    ExecExists(String),
    #[error("process {0} does not exist")]
    ExecUnknown(String),
    #[error("{what} {state}")]
    State { what: String, state: &'static str },
    #[error("cannot freeze the container: a process did not freeze in time")]
    Freeze,
    #[error("signal {0} does not exist")]
    Signal(u32),
    #[error("{0}")]
    ProgramNotFound(String),
    #[error("{0}")]
    ProgramNotExecutable(String),
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error("cannot set limits: {0}")]
    Limits(String),
    #[error("cannot create the container: {0}")]
    Create(String),
    #[error("{step}")]
    Step { step: &'static str, source: io::Error },
}

/// How a container ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) exit: Exit,
    pub(crate) oom_killed: bool,
    /// How much its streams carried when it ended; others may write more afterwards.
    pub(crate) written: Written,
}

/// All containers of the guest. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Containers {
    table: Arc<Mutex<HashMap<String, Entry>>>,
    reaper: Reaper,
    meeting: Meeting<VsockStream>,
    share: Share,
    /// Bounds the connections to sockets of the host.
    connections: Arc<Semaphore>,
    shared_sockets: SharedSockets,
}

#[derive(Clone, Debug)]
enum Entry {
    Creating,
    Created(Arc<Container>),
}

#[derive(Debug)]
struct Container {
    id: String,
    pid: Pid,
    started: AtomicBool,
    init: Waiter,
    end: watch::Receiver<Option<End>>,
    terminal: Option<Terminal>,
    execs: Execs,
    sockets: Option<HostSockets>,
}

/// A process's connections to the host.
#[derive(Clone, Debug)]
struct Connected {
    outputs: Outputs,
    terminal: Option<Terminal>,
}

/// A process that a creator, or a tenant, has made.
#[derive(Clone, Debug)]
struct Made {
    pid: Pid,
    end: Waiter,
}

impl Containers {
    /// No containers.
    pub(crate) fn new(
        reaper: Reaper,
        (meeting, shared_sockets): (Meeting<VsockStream>, SharedSockets),
        share: Share,
    ) -> Self {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        Self { table: Arc::default(), reaper, meeting, share, connections, shared_sockets }
    }

    /// Creates a container and returns its init's pid. Runs to its end even if nobody waits for it.
    ///
    /// # Errors
    /// See [`ContainerError`]; nothing is left of the container then.
    pub(crate) async fn create(&self, order: CreateRequest) -> Result<u32, ContainerError> {
        let containers = self.clone();
        let created = tokio::spawn(async move {
            let id = order.container_id.clone();
            containers.reserve(&id)?;
            let made = containers.make(order).await;
            let mut table = containers.table();
            match made {
                Ok(container) => {
                    let pid = container.pid.as_raw_nonzero().get().unsigned_abs();
                    table.insert(id, Entry::Created(Arc::new(container)));
                    Ok(pid)
                }
                Err(error) => {
                    table.remove(&id);
                    Err(error)
                }
            }
        });
        created.await.map_err(|error| failed("wait for the creation")(io::Error::other(error)))?
    }

    /// Lets a created container's init run the user's program.
    ///
    /// # Errors
    /// It was started before, or has ended.
    pub(crate) async fn start(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.created(id)?;
        if container.init.ended().is_some() {
            return Err(state(id, "has ended"));
        }
        if container.started.swap(true, Ordering::AcqRel) {
            return Err(state(id, "was started before"));
        }
        release(&ContainerFiles::of(id).state).await.map_err(failed("start the init process"))
    }

    /// Sends a signal to a container's init, or to all of its processes.
    ///
    /// # Errors
    /// There is no such signal, or no process that could get it.
    pub(crate) fn kill(&self, id: &str, signal: u32, all: bool) -> Result<(), ContainerError> {
        let container = self.created(id)?;
        let number = signal_number(signal)?;
        if all {
            return container.signal_all(number);
        }
        // The kernel does not reuse the pid until the reaper has collected it, which shows here.
        if container.init.ended().is_some() {
            return Err(state(id, "has ended"));
        }
        send_signal(container.pid, number).map_err(failed("signal the init process"))
    }

    /// Waits for the end of a container's init.
    ///
    /// # Errors
    /// There is no such container.
    pub(crate) async fn wait(&self, id: &str) -> Result<End, ContainerError> {
        let mut end = self.created(id)?.end.clone();
        let ended = end.wait_for(Option::is_some).await.map(|end| *end).ok().flatten();
        ended.ok_or_else(|| state(id, "is gone"))
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// There is no such container, or its cgroup cannot be read.
    pub(crate) fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>, ContainerError> {
        let container = self.created(id)?;
        let pids = Cgroup::of(&container.id).processes().map_err(failed("list the processes"))?;
        Ok(pids.into_iter().filter_map(table::row).collect())
    }

    /// Tells the terminal of a container's init its size.
    ///
    /// # Errors
    /// It has none.
    pub(crate) fn resize(&self, id: &str, rows: u32, columns: u32) -> Result<(), ContainerError> {
        let container = self.created(id)?;
        let terminal = container.terminal.as_ref().ok_or_else(|| state(id, "has no terminal"))?;
        terminal.resize(rows, columns).map_err(failed("resize the terminal"))
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// It has ended, or one of its processes does not freeze in time.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.created(id)?;
        if container.init.ended().is_some() {
            return Err(state(id, "has ended"));
        }
        Cgroup::of(&container.id).freeze().await.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => ContainerError::Freeze,
            _ => failed("freeze the processes")(error),
        })
    }

    /// Lets a frozen container run again.
    ///
    /// # Errors
    /// There is no such container.
    pub(crate) fn resume(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.created(id)?;
        Cgroup::of(&container.id).thaw().map_err(failed("thaw the processes"))
    }

    /// Sets the limits of a container. Which devices it may use does not change: those rules have
    /// the host's numbers, and were translated when it was created.
    ///
    /// # Errors
    /// It has ended, or the kernel refuses one.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), ContainerError> {
        let container = self.created(id)?;
        if container.init.ended().is_some() {
            return Err(state(id, "has ended"));
        }
        let mut resources: LinuxResources =
            serde_json::from_slice(resources).map_err(SpecError::from)?;
        let spec = read_spec(&ContainerFiles::of(id))?;
        let created = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.set_devices(created.and_then(|created| created.devices().clone()));
        let cgroup = Cgroup::of(&container.id);
        // Setting a limit below what is used blocks until the rest has been given back.
        let limited = spawn_blocking(move || cgroup.limit(&resources)).await;
        let limited = limited.map_err(|error| failed("set limits")(error.into()))?;
        limited.map_err(|error| ContainerError::Limits(error.to_string()))
    }

    /// Removes a container that was not started or has ended.
    ///
    /// # Errors
    /// Its init runs, or something of it cannot be removed; it is still there then.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.created(id)?;
        let started = container.started.load(Ordering::Acquire);
        if started && container.init.ended().is_none() {
            return Err(state(id, "is running"));
        }
        remove(id).await.map_err(failed("remove the container"))?;
        container.settle().await;
        self.shared_sockets.settle().await;
        self.table().remove(id);
        // Other containers may live on, so this one's data and files are given back to the host
        // now.
        let forgotten = spawn_blocking(share::forget).await;
        forgotten.map_err(io::Error::other).flatten().map_err(failed("write back"))
    }

    /// Waits, for a bounded time, until what containers that have ended sent to sockets of the host
    /// is on its way.
    pub(crate) async fn settle(&self) {
        let ended: Vec<_> = {
            let table = self.table();
            let created = table.values().filter_map(|entry| match entry {
                Entry::Created(container) if container.init.ended().is_some() => Some(container),
                Entry::Created(_) | Entry::Creating => None,
            });
            created.cloned().collect()
        };
        for container in ended {
            container.settle().await;
        }
        self.shared_sockets.settle().await;
    }

    /// Reserves the id for a container that is about to be created.
    fn reserve(&self, id: &str) -> Result<(), ContainerError> {
        spec::check_id(id)?;
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(ContainerError::Exists(id.to_owned()));
        }
        table.insert(id.to_owned(), Entry::Creating);
        Ok(())
    }

    /// Makes a container whose id is reserved, or leaves nothing of it.
    async fn make(&self, order: CreateRequest) -> Result<Container, ContainerError> {
        let CreateRequest { container_id: id, spec_json, bundle, .. } = order;
        let streams = order.streams.unwrap_or_default();
        self.share.mount().await.map_err(failed("mount the share"))?;
        if !order.notify.is_empty() {
            self.listen_for_readiness(&id, &order.notify).await?;
        }
        let sockets = self.serve_host_sockets(&id, &order.sockets, &order.connections).await?;
        let preparing = id.clone();
        let terminal = streams.terminal.is_some();
        // Reading the container's user table may be slow, as it comes from the host.
        let prepared = spawn_blocking(move || {
            let disks = disks::bind(order.disks)?;
            Ok::<_, ContainerError>(spec::prepare(&preparing, &spec_json, terminal, disks)?)
        });
        let prepared = prepared.await;
        let prepared = prepared.map_err(|e| failed("read the specification")(e.into()))??;
        let mounts_disks = prepared.disks.iter().any(|disk| disk.mounted);
        match self.create_connected(&id, &bundle, prepared, (streams, order.descriptors)).await {
            Ok((made, connected)) => Ok(Container::new(id, made, connected, sockets, mounts_disks)),
            Err(error) => {
                if let Err(error) = remove(&id).await {
                    let left = "cannot remove what a failed container left";
                    tracing::error!(container = id, %error, "{left}");
                }
                Err(error)
            }
        }
    }

    /// Makes the socket for sd_notify(3) whose datagrams go over the stream with this header.
    async fn listen_for_readiness(&self, id: &str, header: &[u8]) -> Result<(), ContainerError> {
        let (stream, length) = (StreamKind::Notify, header.len());
        let header =
            StreamHeader::from_bytes(header).ok_or(StreamError::Header { stream, length })?;
        let socket = notify::listen(id).map_err(failed("make a socket for sd_notify"))?;
        let connection = self.meeting.claim(header, stream).await?;
        tokio::spawn(notify::relay(socket, connection));
        Ok(())
    }

    /// Makes what stands for sockets and FIFOs of the host, if the container mounts any, and asks
    /// for connections over the stream with this header.
    async fn serve_host_sockets(
        &self,
        id: &str,
        sockets: &[HostSocket],
        header: &[u8],
    ) -> Result<Option<HostSockets>, ContainerError> {
        if sockets.is_empty() {
            return Ok(None);
        }
        let (stream, length) = (StreamKind::HostSocket, header.len());
        let header =
            StreamHeader::from_bytes(header).ok_or(StreamError::Header { stream, length })?;
        let control = self.meeting.claim(header, stream).await?;
        let shared = (self.meeting.clone(), self.connections.clone());
        let served = HostSockets::serve(id, sockets, control, shared);
        served.map(Some).map_err(failed("make what stands for a socket of the host"))
    }

    /// Runs the creator while the streams connect, and returns the container's init.
    async fn create_connected(
        &self,
        id: &str,
        bundle: &str,
        prepared: Prepared,
        (mut streams, descriptors): (Streams, Vec<Descriptor>),
    ) -> Result<(Made, Connected), ContainerError> {
        let files = ContainerFiles::of(id);
        let Prepared { mut spec, restrictions, stream_owner, machine_settings, disks } = prepared;
        machine_settings.into_iter().try_for_each(Setting::make)?;
        if let Some(process) = spec.process() {
            size_terminal(&mut streams, process);
        }
        let directory = files.bundle.clone();
        let staging = spawn_blocking(move || {
            let mut staged = Staged::default();
            disks::mount_all(&mut spec, &disks, &directory, &mut staged)?;
            copy_up::prepare(&mut spec, &directory, &mut staged)
                .map_err(failed("fill a file system in memory"))?;
            Ok::<_, ContainerError>((staged, spec))
        });
        // Kept until the creator has exited.
        let (_staged, mut spec) =
            staging.await.map_err(|e| failed("mount file systems")(e.into()))??;
        fs::create_dir_all(&files.bundle).map_err(failed("make the bundle"))?;
        if let Some(hooks) = Hooks::take(&mut spec, id, bundle).map_err(failed("find hooks"))? {
            hooks.write(&files).map_err(failed("write the hooks"))?;
        }
        restrictions.write(&files.bundle).map_err(failed("write the restrictions"))?;
        let spec = serde_json::to_vec(&spec).map_err(SpecError::from)?;
        fs::write(files.config(), spec).map_err(failed("write the bundle"))?;
        let arguments = [creator::VERB, id];
        let ends = (streams, descriptors);
        let (made, connected) =
            self.make_process(&arguments, stream_owner, &files.bundle, ends).await?;
        Ok((made, connected?))
    }

    /// Runs a creator, or a tenant, that reads its input from `directory`, while the streams of the
    /// new process connect; returns the results of both.
    async fn make_process(
        &self,
        arguments: &[&str],
        stream_owner: u32,
        directory: &Path,
        (streams, descriptors): (Streams, Vec<Descriptor>),
    ) -> Result<(Made, Result<Connected, StreamError>), ContainerError> {
        let Streams { stdin, stdout, stderr, terminal } = streams;
        let awaited = terminal.map(|asked| Awaited::listen(directory, &asked)).transpose()?;
        let (pipes, stdio) = Pipes::new([&stdin, &stdout, &stderr])?;
        // Opening files may be slow, as they come from the host.
        let prepared = spawn_blocking(move || descriptors::prepare(&descriptors)).await;
        let (relays, theirs) = prepared.map_err(|e| failed("open descriptors")(e.into()))??;
        let command = command(arguments, stdio, &theirs, stream_owner)?;
        drop(theirs);
        let connecting =
            async { tokio::try_join!(pipes.connect(&self.meeting), relays.connect(&self.meeting)) };
        tokio::pin!(connecting);
        let report = directory.join(report::FILE);
        let creating = self.run_creator(command, &report);
        tokio::pin!(creating);
        let mut connected = None;
        // Always waits for the creator: what it made has to be known before it can be removed.
        let made = loop {
            tokio::select! {
                made = &mut creating => break made?,
                result = &mut connecting, if connected.is_none() => connected = Some(result),
            }
        };
        let connected = async {
            let (outputs, ()) = match connected {
                Some(connected) => connected?,
                None => connecting.await?,
            };
            let terminal = match awaited {
                Some(awaited) => Some(awaited.connect(&self.meeting).await?),
                None => None,
            };
            Ok(Connected { outputs, terminal })
        };
        Ok((made, connected.await))
    }

    /// Runs a creator, or a tenant, and returns the process that it made.
    async fn run_creator(
        &self,
        mut command: Command,
        report: &Path,
    ) -> Result<Made, ContainerError> {
        let adoption = self.reaper.adopt();
        let spawned = self.reaper.spawn(&mut command).map_err(failed("start the creator"));
        // This closes the agent's copies of the process's streams.
        drop(command);
        let exit = spawned?.wait().await;
        let lines = report::read(report).map_err(failed("read the creator's report"))?;
        let pid = outcome(&lines, exit.status)?;
        Ok(Made { pid, end: adoption.claim(pid) })
    }

    fn created(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        match self.table().get(id) {
            Some(Entry::Created(container)) => Ok(Arc::clone(container)),
            Some(Entry::Creating) => Err(state(id, "is being created")),
            None => Err(ContainerError::Unknown(id.to_owned())),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Nothing panics while it holds the lock, so the table is whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Container {
    /// A created container; notes its end, for which the file systems of its disks are written back.
    fn new(
        id: String,
        made: Made,
        connected: Connected,
        sockets: Option<HostSockets>,
        mounts_disks: bool,
    ) -> Self {
        let Made { pid, end: init } = made;
        let Connected { outputs, terminal } = connected;
        let (sender, end) = watch::channel(None);
        let mut ending = init.clone();
        let cgroup = Cgroup::of(&id);
        tokio::spawn(async move {
            let exit = ending.wait().await;
            if mounts_disks {
                // Once the end is known the machine may be ended, with what it has not written.
                let _ = spawn_blocking(rustix::fs::sync).await;
            }
            let written = outputs.written();
            sender.send_replace(Some(End { exit, oom_killed: cgroup.oom_killed(), written }));
            // Kept until the last receiver has gone, so that the end can be asked for again.
            sender.closed().await;
        });
        let (started, execs) = (AtomicBool::new(false), Execs::default());
        Self { id, pid, started, init, end, terminal, execs, sockets }
    }

    async fn settle(&self) {
        if let Some(sockets) = &self.sockets {
            sockets.settle().await;
        }
    }

    fn signal_all(&self, signal: i32) -> Result<(), ContainerError> {
        let cgroup = Cgroup::of(&self.id);
        let pids = cgroup.processes().map_err(failed("list the processes"))?;
        if pids.is_empty() {
            return Err(state(&self.id, "has no processes"));
        }
        if signal == libc::SIGKILL {
            return cgroup.kill().map_err(failed("kill the processes"));
        }
        for pid in pids {
            let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
            match send_signal(pid, signal) {
                // It has ended meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                sent => sent.map_err(failed("signal a process"))?,
            }
        }
        Ok(())
    }
}

/// The command that runs this program as another of its lives, with a process's descriptors.
fn command(
    arguments: &[&str],
    stdio: streams::Stdio,
    descriptors: &[OwnedFd],
    owner: u32,
) -> Result<Command, ContainerError> {
    let mut command = Command::new("/proc/self/exe");
    inherit::hand_down(&mut command, descriptors).map_err(failed("hand descriptors down"))?;
    command.args(arguments).env_clear().current_dir("/");
    let mut given = [Stdio::null(), Stdio::null(), Stdio::null()];
    for (slot, end) in given.iter_mut().zip([stdio.stdin, stdio.stdout, stdio.stderr]) {
        if let Some(end) = end {
            // So that the user's program can open /dev/stdout again.
            let owned = fchown(&end, Some(Uid::from_raw(owner)), None);
            owned.map_err(|error| failed("give the streams their owner")(error.into()))?;
            *slot = Stdio::from(end);
        }
    }
    let [stdin, stdout, stderr] = given;
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    Ok(command)
}

/// What a creator's report and exit status say.
fn outcome(lines: &[Line], status: u32) -> Result<Pid, ContainerError> {
    let mut details = Vec::new();
    for line in lines {
        match line {
            Line::Created(pid) => {
                let pid = Pid::from_raw(*pid);
                return pid.ok_or_else(|| ContainerError::Create("its pid is 0".to_owned()));
            }
            Line::NotFound(reason) => return Err(ContainerError::ProgramNotFound(reason.clone())),
            Line::NotExecutable(reason) => {
                return Err(ContainerError::ProgramNotExecutable(reason.clone()));
            }
            Line::Unprepared(reason) => return Err(ContainerError::Create(reason.clone())),
            Line::Detail(detail) => details.push(detail.as_str()),
            Line::Failed(reason) => {
                // The first detail is the innermost cause; what follows repeats it.
                let detail = details.first().map(|detail| format!(" ({detail})"));
                return Err(ContainerError::Create(reason.clone() + &detail.unwrap_or_default()));
            }
        }
    }
    Err(ContainerError::Create(match status.checked_sub(128) {
        Some(signal @ 1..) => format!("its creator was killed by signal {signal}"),
        _ => format!("its creator ended with status {status}"),
    }))
}

/// Tells a waiting init to go on, by the socket that libcontainer's init listens on.
async fn release(state: &Path) -> io::Result<()> {
    let path = SocketPath::within(state, "notify.sock")?;
    let mut socket = UnixStream::connect(path.as_path()).await?;
    socket.write_all(b"start container").await?;
    socket.shutdown().await
}

/// Removes all that exists of a container: processes, cgroup, files.
async fn remove(id: &str) -> io::Result<()> {
    Cgroup::of(id).remove().await?;
    notify::end(id);
    let files = ContainerFiles::of(id);
    let (notify, sockets) = (notify::directory(id), host_sockets::directory(id));
    for directory in [files.state, files.bundle, notify, sockets] {
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

fn state(id: &str, state: &'static str) -> ContainerError {
    ContainerError::State { what: format!("container {id}"), state }
}

/// A container's specification, as it was created.
fn read_spec(files: &ContainerFiles) -> Result<Spec, ContainerError> {
    let config = fs::read(files.config()).map_err(failed("read the container's specification"))?;
    Ok(serde_json::from_slice(&config).map_err(SpecError::from)?)
}

/// Gives a terminal the size in its process's specification, unless the host has sent one.
fn size_terminal(streams: &mut Streams, process: &Process) {
    if let Some(terminal) = streams.terminal.as_mut().filter(|terminal| terminal.rows == 0)
        && let Some(size) = process.console_size()
    {
        let number = |of: u64| u32::try_from(of).unwrap_or(u32::MAX);
        (terminal.rows, terminal.columns) = (number(size.height()), number(size.width()));
    }
}

/// Checks that there is such a signal; 0 only asks whether the process is there.
fn signal_number(signal: u32) -> Result<i32, ContainerError> {
    let number = i32::try_from(signal).ok().filter(|number| (0..=64).contains(number));
    number.ok_or(ContainerError::Signal(signal))
}

/// Names the step that failed: `map_err(failed("list the processes"))`.
fn failed(step: &'static str) -> impl FnOnce(io::Error) -> ContainerError {
    move |source| ContainerError::Step { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_success_has_the_pid() {
        let lines = [Line::Detail("a warning".to_owned()), Line::Created(12)];
        assert_eq!(outcome(&lines, 0).unwrap().as_raw_nonzero().get(), 12);
    }

    #[test]
    fn a_program_that_is_missing_is_told_from_other_failures() {
        let lines = [
            Line::Detail("x".to_owned()),
            Line::NotFound("exec: \"x\": gone".to_owned()),
            Line::Failed("failed to create container".to_owned()),
        ];
        let error = outcome(&lines, 1).unwrap_err();
        assert!(matches!(error, ContainerError::ProgramNotFound(_)));
        assert_eq!(error.to_string(), "exec: \"x\": gone");
    }

    #[test]
    fn a_failure_comes_with_its_innermost_cause() {
        let lines = [
            Line::Detail("mount failed, err=ENOENT".to_owned()),
            Line::Detail("failed to prepare rootfs".to_owned()),
            Line::Failed("failed to create container".to_owned()),
        ];
        let words = "cannot create the container: failed to create container \
                     (mount failed, err=ENOENT)";
        assert_eq!(outcome(&lines, 1).unwrap_err().to_string(), words);
    }

    #[test]
    fn a_creator_without_a_result_is_a_failure() {
        for (status, end) in [(3, "ended with status 3"), (134, "was killed by signal 6")] {
            let error = outcome(&[], status).unwrap_err();
            let words = format!("cannot create the container: its creator {end}");
            assert_eq!(error.to_string(), words);
        }
    }

    #[tokio::test]
    async fn calls_on_a_container_that_is_not_there_name_it() {
        let containers = Containers::new(Reaper::default(), Default::default(), Share::default());
        let error = containers.kill("nobody", 9, false).unwrap_err();
        assert_eq!(error.to_string(), "container nobody does not exist");
        assert!(containers.wait("nobody").await.is_err());
    }

    #[tokio::test]
    async fn an_id_is_taken_while_its_container_is_created() {
        let containers = Containers::new(Reaper::default(), Default::default(), Share::default());
        containers.reserve("one").unwrap();
        assert!(matches!(containers.reserve("one"), Err(ContainerError::Exists(_))));
        let error = containers.start("one").await.unwrap_err();
        assert_eq!(error.to_string(), "container one is being created");
        assert!(matches!(containers.reserve("a/b"), Err(ContainerError::Spec(_))));
    }
}
