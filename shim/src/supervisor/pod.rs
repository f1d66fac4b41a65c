//! A pod's processes together: monitor, file server and the agent inside.
//!
//! The guest boots while the file server is started; what does not come up within a bounded time is
//! an error that quotes the guest's console. Dropping a pod kills its processes at once;
//! [`Pod::end`] first lets the guest write everything back.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent;
use bulkhead_protocol::{AGENT_PORT, STREAM_PORT, StreamHeader};
use bulkhead_vmm::config::JailConfig;
use bulkhead_vmm::seqpacket;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use thiserror::Error;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::bundle::{DISKS_MAX, Disk, FileKind, MachineSize, Plan, Shared};
use crate::machine::agent::{Agent, AgentError, Target};
use crate::machine::assets::{AssetError, Assets};
use crate::machine::file_server::{FileServer, FileServerError};
use crate::machine::growth::{Growth, GrowthError};
use crate::machine::kvm::{self, KvmError};
use crate::machine::monitor::{self, Machine, MachineError, Parts};
use crate::machine::share::{Files, ShareDir, ShareError};
use crate::machine::spawn::Launch;
use crate::network::interfaces::{Bell, Interfaces, NetworkError};
use crate::network::names;
use crate::state::Home;
use crate::state::id::ContainerId;
use crate::state::process::Process;
use crate::trace::Phase;

/// How long a guest may take to boot, unless [`BOOT_SECONDS`] says otherwise.
const BOOT_PATIENCE: Duration = Duration::from_secs(30);
/// The environment variable with another patience, in seconds, for hosts that are emulated.
const BOOT_SECONDS: &str = "BULKHEAD_BOOT_TIMEOUT";
/// How long the agent may take to accept a stream of a process.
const STREAM_PATIENCE: Duration = Duration::from_secs(30);
/// How long a container that leaves a pod may take to be gone from it.
const DISMISSAL: Duration = Duration::from_secs(60);
/// How long to wait before it is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// The first of the ids that jailed processes run under: no user of a host has one of these, and the
/// supervisor's pid makes it unique while it lives.
const JAIL_IDS: u32 = 0x7000_0000;
/// What the relay socket between monitor and file server holds in each direction, in bytes.
const RELAY_BUFFER: usize = 2 << 20;
/// The console of the guest, in the container's directory.
const CONSOLE: &str = "console.log";

/// Why a pod did not come up.
#[derive(Debug, Error)]
pub enum PodError {
    /// This host.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This installation.
    #[error(transparent)]
    Asset(#[from] AssetError),
    /// The files of the container.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The file server.
    #[error(transparent)]
    FileServer(#[from] FileServerError),
    /// The monitor.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest.
    #[error("the guest did not come up within {} s{console}", .patience.as_secs())]
    Boot {
        /// How long was waited; `BULKHEAD_BOOT_TIMEOUT` changes it.
        patience: Duration,
        /// What it said.
        console: String,
    },
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine does not get larger.
    #[error(transparent)]
    Growth(#[from] GrowthError),
    /// A block device of the host.
    #[error("device {} cannot be used", .0.display())]
    Disk(PathBuf, #[source] io::Error),
    /// Too many of them, counted over all containers of the pod.
    #[error("a machine has room for {DISKS_MAX} disks; use another pod")]
    Disks,
    /// The container's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A log, a socket.
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
    /// How many the machine has.
    disks: Mutex<u8>,
    interfaces: Interfaces,
    follower: OnceLock<AbortOnDrop>,
    names: tokio::sync::Mutex<NameService>,
}

impl Pod {
    /// Starts everything that `plan` needs; `kvm` is `/dev/kvm`.
    ///
    /// # Errors
    /// When anything does not come up; nothing is left then.
    pub async fn start(home: &Home, plan: &Plan, kvm: File) -> Result<Self, PodError> {
        let assets = Assets::find()?;
        let shared = Files::prepare(&plan.shared)?;
        let (relay, other) = relay().map_err(|error| PodError::Io("relay socket", error))?;
        let id = JAIL_IDS + std::process::id();
        let jail = JailConfig { uid: id, gid: id };
        let directory = home.dir();
        let pod = directory.as_path();
        let launch = Launch { program: &assets.monitor, pod, log: log(home, "monitor.log")? };
        let parts = Parts {
            kvm: &kvm,
            kernel: &assets.kernel,
            initramfs: &assets.initramfs,
            file_server: relay.as_fd(),
            console: log(home, CONSOLE)?,
            jail,
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
            let server = FileServer::start(launch, other.as_fd(), jail).await?;
            server.show(shared, server.take_share_dir()?)?;
            phase.end();
            Ok::<_, PodError>(server)
        };
        let ((machine, agent), file_server) = tokio::try_join!(machine, files)?;
        let growth = Growth::new(plan.size, plan.most);
        Ok(Self {
            machine,
            file_server,
            growth,
            agent,
            disks: Mutex::default(),
            interfaces: Interfaces::new(plan.size.vcpus),
            follower: OnceLock::new(),
            names: tokio::sync::Mutex::default(),
        })
    }

    /// A directory of the share for a further container.
    ///
    /// # Errors
    /// When all are taken.
    pub fn take_share_dir(&self) -> Result<ShareDir, PodError> {
        Ok(self.file_server.take_share_dir()?)
    }

    /// Shows what is at a directory no more and gives it back.
    ///
    /// # Errors
    /// When nothing is there.
    pub fn leave_share_dir(&self, dir: ShareDir) -> Result<(), PodError> {
        Ok(self.file_server.leave_share_dir(dir)?)
    }

    /// Shows the files of a further container at its directory.
    ///
    /// # Errors
    /// Names the path that failed.
    pub fn show(&self, shared: &[Shared], dir: ShareDir) -> Result<(), PodError> {
        Ok(self.file_server.show(Files::prepare(shared)?, dir)?)
    }

    /// Shows files that are mounts already ([`crate::machine::share::alone`]) for as long as the value lives that is
    /// given: the name of each there is its number.
    ///
    /// # Errors
    /// Names the path that failed.
    pub fn lend(&self, mounts: Vec<(FileKind, OwnedFd)>) -> Result<Lent<'_>, PodError> {
        let lent = Lent { pod: self, dir: self.take_share_dir()? };
        self.file_server.show(Files::given(mounts)?, lent.dir)?;
        Ok(lent)
    }

    /// Takes a container out of the pod, which goes on without it.
    pub async fn dismiss(&self, id: &ContainerId, dir: ShareDir) {
        let removed = async {
            let deadline = Instant::now() + DISMISSAL;
            // Its creation may still be under way in the guest, and what runs has to die.
            while let Err(error) = self.agent.delete(id).await {
                if error.is_not_found() || Instant::now() > deadline {
                    tracing::debug!(error = %error, "not removed from the guest");
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
            tracing::debug!(error = %error, "its files were not shown");
        }
    }

    /// The processes to remember.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        vec![self.machine.process(), self.file_server.process()]
    }

    /// Opens a stream of a process; the header names it to the agent.
    ///
    /// # Errors
    /// When the agent does not accept it in time.
    pub async fn open_stream(&self) -> Result<(StreamHeader, UnixStream), PodError> {
        let mut stream = self.machine.open_stream(STREAM_PORT, STREAM_PATIENCE).await?;
        let mut header = [0; StreamHeader::LEN];
        let sent = random(&mut header).and_then(|()| io::Write::write_all(&mut stream, &header));
        sent.map_err(|error| PodError::Io("stream of a process", error))?;
        Ok((StreamHeader(header), stream))
    }

    /// Gives the machine disks; their names for the agent. A disk stays as long as the machine.
    ///
    /// # Errors
    /// When the host or the monitor cannot use one.
    pub async fn attach_disks(&self, disks: &[Disk]) -> Result<Vec<agent::Disk>, PodError> {
        let mut named = Vec::new();
        for disk in disks {
            let index = self.next_disk().ok_or(PodError::Disks)?;
            let file = disk.open().map_err(|error| PodError::Disk(disk.source.clone(), error))?;
            let serial = format!("bulkhead-{index}");
            self.machine.attach_disk(index, &file, disk.read_only, serial.clone()).await?;
            named.push(agent::Disk { path: disk.path.display().to_string(), serial });
        }
        Ok(named)
    }

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
                tracing::warn!(error, "the guest does not follow the container's network");
            }
        }
    }

    /// Has the guest ask name servers of the container's network namespace, once there are any.
    async fn learn_names(&self) {
        let mut names = self.names.lock().await;
        let NameService::Unasked { file, namespace } = &*names else { return };
        let servers = names::on_loopback(file).unwrap_or_else(|error| {
            tracing::debug!(error = %error, "resolv.conf was not read");
            Vec::new()
        });
        if servers.is_empty() {
            return;
        }
        if let Err(error) = self.interfaces.share_answers().await {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(error, "name servers of the container's network cannot ask others");
        }
        match names::NameServers::open(&self.agent, namespace, &servers).await {
            Ok(opened) => {
                let serving = tokio::spawn(opened.serve());
                *names = NameService::Asked { _by: AbortOnDrop(serving.abort_handle()) };
            }
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                tracing::warn!(
                    error,
                    "names of the container's network are not known in the guest"
                );
            }
        }
    }

    /// The number of a disk that no container has had.
    fn next_disk(&self) -> Option<u8> {
        let mut count = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let index = *count;
        *count += u8::from(usize::from(index) < DISKS_MAX);
        (index < *count).then_some(index)
    }

    /// Whether the machine would grow to be as large as `to`.
    pub async fn lacks(&self, to: MachineSize) -> bool {
        self.growth.lacks(to).await
    }

    /// Makes the machine as large as `to`, in all, or as the host allows. One that is larger stays.
    ///
    /// # Errors
    /// When the guest does not take it.
    pub async fn grow(&self, to: MachineSize) -> Result<(), PodError> {
        Ok(self.growth.grow(&self.machine, &self.agent, to).await?)
    }

    /// Waits until the machine or the file server has ended by itself; says which.
    pub async fn broken(&self) -> String {
        tokio::select! {
            words = self.machine.ended() => words,
            () = self.file_server.ended() => "the file server is gone".to_owned(),
        }
    }

    /// Lets the guest write everything back, then ends it.
    pub async fn end(self) {
        let phase = Phase::begin("sync");
        tokio::select! {
            synced = self.agent.sync() => if let Err(error) = synced {
                tracing::warn!(error = %error, "guest did not write back");
            },
            words = self.broken() => tracing::debug!(words, "pod is over"),
        }
        phase.end();
        let phase = Phase::begin("teardown");
        self.machine.stop().await;
        drop(self.file_server);
        phase.end();
    }
}

/// Whether names are asked in the container's network namespace.
#[derive(Debug, Default)]
enum NameService {
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
struct AbortOnDrop(AbortHandle);

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

/// Files that are shown for a while. Who has opened one keeps it.
#[derive(Debug)]
pub struct Lent<'a> {
    pod: &'a Pod,
    dir: ShareDir,
}

impl Lent<'_> {
    /// Where they are in the share.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.dir.directory()
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.pod.leave_share_dir(self.dir) {
            tracing::debug!(error = %error, "lent files were not shown");
        }
    }
}

async fn boot(home: &Home, machine: &Machine, plan: &Plan) -> Result<Agent, PodError> {
    let patience = boot_patience();
    let phase = Phase::begin("kernel to agent");
    let came_up = async {
        let stream = machine.open_stream(AGENT_PORT, patience).await?;
        let agent = Agent::connect(stream).await?;
        let mut entropy = [0; 64];
        random(&mut entropy).map_err(|error| PodError::Io("/dev/urandom", error))?;
        let kernel = agent.hello(&plan.hostname, &entropy).await?;
        tracing::debug!(kernel, "guest is up");
        // A pod with fewer processors than it could have is still a pod.
        if plan.size.vcpus > 1
            && let Err(error) = agent.start_processors(plan.size.vcpus.into()).await
        {
            tracing::warn!(error = %error, "a processor does not start");
        }
        Ok(agent)
    };
    let result = tokio::select! {
        result = timeout(patience, came_up) => result,
        words = machine.ended() => Ok(Err(MachineError::Ended(words).into())),
    };
    phase.end();
    match result {
        Ok(Ok(agent)) => Ok(agent),
        // The monitor's own words come with the console; all others do not.
        Ok(Err(error @ PodError::Machine(MachineError::Ended(_)))) => Err(error),
        Ok(Err(error)) => {
            tracing::warn!(error = %error, "guest did not come up");
            Err(PodError::Boot { patience, console: last_words(home) })
        }
        Err(_) => Err(PodError::Boot { patience, console: last_words(home) }),
    }
}

fn boot_patience() -> Duration {
    let seconds = std::env::var(BOOT_SECONDS).ok().and_then(|seconds| seconds.parse().ok());
    seconds.map_or(BOOT_PATIENCE, Duration::from_secs)
}

/// The end of the console's log for an error; the monitor keeps the log short.
fn last_words(home: &Home) -> String {
    let bytes = fs::read(home.path(CONSOLE)).unwrap_or_default();
    let lines: Vec<_> = String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect();
    match monitor::quote(&lines) {
        quoted if quoted.is_empty() => "; it wrote nothing to its console".to_owned(),
        quoted => quoted,
    }
}

fn log(home: &Home, name: &'static str) -> Result<File, PodError> {
    let open = File::options().append(true).create(true).open(home.path(name));
    open.map_err(|error| PodError::Io(name, error))
}

fn relay() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = seqpacket::pair()?;
    for end in [&ours, &theirs] {
        set_socket_send_buffer_size_force(end, RELAY_BUFFER)?;
        set_socket_recv_buffer_size_force(end, RELAY_BUFFER)?;
    }
    Ok((ours, theirs))
}

/// Fills `bytes` from the host's generator.
pub(crate) fn random(bytes: &mut [u8]) -> io::Result<()> {
    io::Read::read_exact(&mut File::open("/dev/urandom")?, bytes)
}
