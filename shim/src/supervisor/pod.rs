//! A pod: a machine with its file server and the agent inside. Containers come and go in it.
//!
//! The guest boots while the file server is started. If the guest does not come up in time, the
//! error quotes its console. Dropping a pod kills its processes at once; [`Pod::end`] first lets
//! the guest write everything back.

mod boot;
mod disks;
mod formats;
mod memory;
mod network;
mod swap;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent;
use bulkhead_protocol::{STREAM_PORT, StreamHeader};
use bulkhead_vmm::config::JailConfig;
use bulkhead_vmm::seqpacket;
use rustix::fs::OFlags;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use thiserror::Error;
use tokio::sync::{Semaphore, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, timeout};

use self::boot::boot;
use self::disks::Disks;
use self::network::NameService;
use crate::bundle::{DISKS_MAX, Disk, FileKind, MachineSize, PodPlan};
use crate::machine;
use crate::machine::agent::{Agent, AgentError, Target};
use crate::machine::assets::{AssetError, Assets};
use crate::machine::file_server::{FileServer, FileServerError};
use crate::machine::growth::{Growth, GrowthError};
use crate::machine::host_clock::HostClock;
use crate::machine::kvm::{self, KvmError};
use crate::machine::monitor::{Machine, MachineError, Parts};
use crate::machine::share::{Files, ShareDir, ShareError};
use crate::machine::spawn::Launch;
use crate::network::interfaces::{Interfaces, NetworkError};
use crate::sockets;
use crate::state::Home;
use crate::state::id::ContainerId;
use crate::state::process::Process;
use crate::trace::Phase;

/// How long the agent may take to accept a stream of a process.
const STREAM_PATIENCE: Duration = Duration::from_secs(30);
/// How long the removal of a container from the guest may take. A process that does not die stays
/// until the pod ends, as it would on a host.
const DISMISSAL: Duration = Duration::from_secs(10);
/// How long the guest of a condemned machine may take to write back.
const LAST_SYNC: Duration = Duration::from_secs(2);
/// How long to wait before the removal of a container is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// The first of the ids that jailed processes run under. Users have lower ids: SSSD maps directory
/// services to ids up to 2,000,200,000. FreeIPA hands out subordinate ids for containers from
/// 2,147,483,648. The supervisor's pid, which is below 4,194,304, makes the ids unique while it
/// lives.
const JAIL_IDS: u32 = 2_100_000_000;
/// The buffer size of the relay socket between monitor and file server in each direction, in bytes.
const RELAY_BUFFER: usize = 2 << 20;
/// The log of the guest's console, in the container's directory.
const CONSOLE: &str = "console.log";

/// Why a pod did not come up.
#[derive(Debug, Error)]
pub enum PodError {
    /// The host has no KVM that can be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A file of the installation cannot be used.
    #[error(transparent)]
    Asset(#[from] AssetError),
    /// The container's files cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The file server.
    #[error(transparent)]
    FileServer(#[from] FileServerError),
    /// The monitor.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest did not boot in time.
    #[error("the guest did not come up within {} s (guest.boot_timeout){console}", .patience.as_secs())]
    Boot {
        /// The time limit.
        patience: Duration,
        /// The last lines of its console.
        console: String,
    },
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine cannot grow.
    #[error(transparent)]
    Growth(#[from] GrowthError),
    /// A block device or an image of the host cannot be used.
    #[error("cannot use disk {}", .0.display())]
    Disk(PathBuf, #[source] io::Error),
    /// The containers of the pod have had too many disks together.
    #[error("a machine has room for {DISKS_MAX} disks; use another pod")]
    Disks,
    /// The container's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A log, a socket or another file cannot be used.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
}

/// A pod whose agent answers.
#[derive(Debug)]
pub struct Pod {
    machine: Machine,
    file_server: FileServer,
    growth: Growth,
    /// The agent.
    pub agent: Agent,
    disks: Disks,
    /// How much the machine can swap, in MiB.
    swap_mib: tokio::sync::Mutex<u64>,
    interfaces: Interfaces,
    follower: OnceLock<AbortOnDrop>,
    provider: OnceLock<AbortOnDrop>,
    _timekeeper: AbortOnDrop,
    names: tokio::sync::Mutex<NameService>,
    /// Bounds the connections of its containers to sockets of the host.
    pub(crate) connections: Arc<Semaphore>,
    /// As which users its guest may connect to sockets in shared directories.
    pub(crate) population: sockets::Population,
    shared_sockets: OnceLock<JoinHandle<()>>,
    condemned: watch::Sender<bool>,
}

impl Pod {
    /// Starts a pod without containers, from `assets` and `/dev/kvm`; its logs go to `home`.
    ///
    /// # Errors
    /// When a part does not start; nothing is left running then.
    pub async fn start(
        home: &Home,
        plan: &PodPlan,
        (assets, kvm): (Assets, File),
    ) -> Result<Self, PodError> {
        let (relay, other) = relay().map_err(|error| PodError::Io("relay socket", error))?;
        let [monitor, server] = identities();
        let directory = home.dir();
        let pod = directory.as_path();
        let launch = Launch { program: &assets.monitor, pod, log: log(home, "monitor.log")? };
        let parts = Parts {
            kvm: &kvm,
            kernel: &assets.kernel,
            initramfs: &assets.initramfs,
            file_server: relay.as_fd(),
            console: log(home, CONSOLE)?,
            jail: monitor,
            size: plan.size,
            vcpus_max: plan.most.vcpus,
        };
        let machine = async {
            kvm::check_speed(&kvm)?;
            let phase = Phase::begin("monitor and jail");
            let machine = Machine::start(launch, parts).await?;
            phase.end();
            let agent = boot(home, &machine, plan).await?;
            Ok::<_, PodError>((machine, agent))
        };
        let files = async {
            let phase = Phase::begin("file server and share");
            let log = log(home, "fileserver.log")?;
            let launch = Launch { program: &assets.file_server, pod, log };
            let jail = (server, plan.sockets);
            let server = FileServer::start(launch, other.as_fd(), assets.modules, jail).await?;
            phase.end();
            Ok::<_, PodError>(server)
        };
        let clock = HostClock::watch().map_err(|error| PodError::Io("clock", error))?;
        let formats = async { Ok(machine::formats::of_host().await) };
        let ((machine, agent), file_server, formats) = tokio::try_join!(machine, files, formats)?;
        if let Some(formats) = formats {
            formats::register(formats, &file_server, &agent).await;
        }
        let timekeeper = AbortOnDrop::spawn(keep_clock(clock, agent.clone()));
        let growth = Growth::new(plan.size, plan.most);
        Ok(Self {
            machine,
            file_server,
            growth,
            agent,
            disks: Disks::default(),
            swap_mib: tokio::sync::Mutex::default(),
            interfaces: Interfaces::new(plan.queue_pairs, plan.frames),
            follower: OnceLock::new(),
            provider: OnceLock::new(),
            _timekeeper: timekeeper,
            names: tokio::sync::Mutex::default(),
            connections: sockets::room(),
            population: sockets::Population::default(),
            shared_sockets: OnceLock::new(),
            condemned: watch::channel(false).0,
        })
    }

    /// Takes a free directory of the share for a container.
    ///
    /// # Errors
    /// When all are taken.
    pub fn take_share_dir(&self) -> Result<ShareDir, PodError> {
        Ok(self.file_server.take_share_dir()?)
    }

    /// Detaches the files at a directory of the share and gives the directory back.
    ///
    /// # Errors
    /// When no files are attached there.
    pub fn leave_share_dir(&self, dir: ShareDir) -> Result<(), PodError> {
        Ok(self.file_server.leave_share_dir(dir)?)
    }

    /// Attaches the files of a container to its directory of the share.
    ///
    /// # Errors
    /// Names the path that failed.
    pub async fn show(&self, files: Files, dir: ShareDir) -> Result<(), PodError> {
        Ok(self.file_server.show(files, dir).await?)
    }

    /// Shares detached mounts ([`crate::machine::share::alone`]) for as long as the returned value
    /// lives. Each is named by its index.
    ///
    /// # Errors
    /// Names the path that failed.
    pub async fn lend(&self, mounts: Vec<(FileKind, OwnedFd)>) -> Result<Lent<'_>, PodError> {
        let lent = Lent { pod: self, dir: self.take_share_dir()? };
        self.file_server.show(Files::given(mounts)?, lent.dir).await?;
        Ok(lent)
    }

    /// Gives sockets in shared directories their other ends, from now on until the pod ends.
    pub fn serve_sockets(self: &Arc<Self>) {
        if let Some(reports) = self.file_server.take_reports() {
            let serving = sockets::serve_shared(Arc::downgrade(self), reports);
            // This is the only call: the reports can be taken once.
            let _ = self.shared_sockets.set(tokio::spawn(serving));
        }
    }

    /// Removes a container from a pod that continues without it.
    pub async fn dismiss(&self, id: &ContainerId, dir: ShareDir) {
        self.population.leave(id);
        let removed = async {
            let deadline = Instant::now() + DISMISSAL;
            // Deleting fails while the container is being created or has running processes, so kill
            // them and try again.
            while let Err(error) = self.agent.delete(id).await {
                if error.is_not_found() || Instant::now() > deadline {
                    tracing::debug!(error = %error, "cannot remove it from the guest");
                    return;
                }
                let _ = self.agent.kill(Target::init(id), 9, true).await;
                sleep(RETRY).await;
            }
        };
        tokio::select! {
            () = removed => {}
            words = self.broken() => tracing::debug!(words, "pod is over"),
        }
        if let Err(error) = self.leave_share_dir(dir) {
            tracing::debug!(error = %error, "cannot take its files out of the share");
        }
    }

    /// The processes of the pod: the monitor and the file server.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        vec![self.machine.process(), self.file_server.process()]
    }

    /// Opens a stream for a process; the agent identifies the stream by its header.
    ///
    /// # Errors
    /// When the agent does not accept it in time.
    pub async fn open_stream(&self) -> Result<(StreamHeader, UnixStream), PodError> {
        let mut header = [0; StreamHeader::LEN];
        random(&mut header).map_err(|error| PodError::Io("stream of a process", error))?;
        let header = StreamHeader(header);
        Ok((header, self.open_stream_named(header).await?))
    }

    /// Opens a stream with a header that the agent has drawn.
    ///
    /// # Errors
    /// When the agent does not accept it in time.
    pub async fn open_stream_named(&self, header: StreamHeader) -> Result<UnixStream, PodError> {
        let mut stream = self.machine.open_stream(STREAM_PORT, STREAM_PATIENCE).await?;
        io::Write::write_all(&mut stream, &header.0)
            .map_err(|error| PodError::Io("stream of a process", error))?;
        Ok(stream)
    }

    /// Attaches disks to the machine, and returns them as the agent needs them. A disk stays
    /// attached until the machine ends.
    ///
    /// # Errors
    /// When the host or the monitor cannot use one.
    pub async fn attach_disks(&self, disks: &[Disk]) -> Result<Vec<agent::Disk>, PodError> {
        let mut attached = Vec::new();
        for disk in disks {
            attached.push(self.disks.attach(&self.machine, disk).await?);
        }
        Ok(attached)
    }

    /// Returns whether [`Pod::grow`] would have something to do.
    pub async fn lacks(&self, to: MachineSize) -> bool {
        self.growth.lacks(to).await
    }

    /// Grows the machine to a total size of `to`, or to its maximum. A larger machine stays as it
    /// is.
    ///
    /// # Errors
    /// When the monitor or the guest cannot grow.
    pub async fn grow(&self, to: MachineSize) -> Result<(), PodError> {
        Ok(self.growth.grow(&self.machine, &self.agent, to).await?)
    }

    /// The huge pages of the host's pool that the machine has.
    pub async fn huge_pages(&self) -> u32 {
        self.growth.huge_pages().await
    }

    /// Waits until the machine or the file server has ended by itself or the pod is condemned;
    /// returns the reason.
    pub async fn broken(&self) -> String {
        let mut condemned = self.condemned.subscribe();
        tokio::select! {
            words = self.gone() => words,
            // The pod owns the sender, so waiting does not fail.
            _ = condemned.wait_for(|condemned| *condemned) => {
                "the guest did not end a container that was killed".to_owned()
            }
        }
    }

    /// Waits until the machine or the file server has ended by itself; returns the reason.
    async fn gone(&self) -> String {
        tokio::select! {
            words = self.machine.ended() => words,
            () = self.file_server.ended() => "the file server is gone".to_owned(),
        }
    }

    /// Condemns the machine: its guest does not end a container that was killed.
    pub fn condemn(&self) {
        self.condemned.send_replace(true);
    }

    /// Lets the guest write everything back, then ends the pod.
    pub async fn end(self) {
        let phase = Phase::begin("sync");
        // A guest that does not end a killed container may not write back either.
        let patience = if *self.condemned.borrow() { LAST_SYNC } else { Duration::MAX };
        tokio::select! {
            synced = timeout(patience, self.agent.sync()) => match synced {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = %error, "the guest could not write its files back");
                }
                Err(_) => tracing::warn!("the guest did not write its files back in time"),
            },
            words = self.gone() => tracing::debug!(words, "pod is over"),
        }
        phase.end();
        let phase = Phase::begin("teardown");
        self.machine.stop().await;
        drop(self.file_server);
        phase.end();
        if let Some(serving) = self.shared_sockets.into_inner() {
            sockets::settle(serving).await;
        }
    }
}

/// A task that ends with the pod.
#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl AbortOnDrop {
    fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task).abort_handle())
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Files that are in the share until this value is dropped. A file that the guest has opened stays
/// open.
#[derive(Debug)]
pub struct Lent<'a> {
    pod: &'a Pod,
    dir: ShareDir,
}

impl Lent<'_> {
    /// Their directory in the share.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.dir.directory()
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.pod.leave_share_dir(self.dir) {
            tracing::debug!(error = %error, "cannot take passed files out of the share");
        }
    }
}

/// Has the guest take over the host's time whenever that is set.
async fn keep_clock(clock: HostClock, agent: Agent) {
    while let Ok(()) = clock.was_set().await {
        if let Err(error) = agent.set_clock().await {
            tracing::warn!(error = %error, "the guest did not take over the host's time");
        }
    }
}

fn log(home: &Home, name: &'static str) -> Result<File, PodError> {
    let open = home.file(name, OFlags::CREATE | OFlags::WRONLY | OFlags::APPEND);
    open.map_err(|error| PodError::Io(name, error))
}

/// The ids of the monitor and of the file server. They differ, so that neither can signal or trace
/// the other.
fn identities() -> [JailConfig; 2] {
    let first = JAIL_IDS + 2 * std::process::id();
    [first, first + 1].map(|id| JailConfig { uid: id, gid: id })
}

/// The two ends of the relay socket.
fn relay() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = seqpacket::pair()?;
    for end in [&ours, &theirs] {
        set_socket_send_buffer_size_force(end, RELAY_BUFFER)?;
        set_socket_recv_buffer_size_force(end, RELAY_BUFFER)?;
    }
    Ok((ours, theirs))
}

/// Fills `bytes` from the host's random number generator.
pub(crate) fn random(bytes: &mut [u8]) -> io::Result<()> {
    io::Read::read_exact(&mut File::open("/dev/urandom")?, bytes)
}

#[cfg(test)]
mod tests;
