//! The pod's machine: starts the monitor, sends it requests, and waits for its end.
//!
//! The supervisor opens every file that the monitor uses and sends it the descriptors; see
//! [`bulkhead_vmm::config`] and [`bulkhead_vmm::control`].

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_protocol::SHARE_TAG;
use bulkhead_vmm::config::{
    DeviceConfig, Fd, JailConfig, NetConfig, RateLimit, SLOT_COUNT, SlotDevice, VERSION, VmConfig,
};
use bulkhead_vmm::control::{
    Answer, Call, Client, ClientError, Ending, FromMonitor, Refusal, Reply, Request, Statistics,
};
use thiserror::Error;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::bundle::MachineSize;
use crate::machine::channel::Control;
use crate::machine::spawn::{self, Jailed, Launch};
use crate::machine::words::printable;
use crate::state::process::Process;

/// The guest's vsock CID. Each machine has a vsock device of its own, so all can use the same CID.
const GUEST_CID: u32 = 3;
/// How long the monitor may take to answer a call that does not wait for the guest.
const PATIENCE: Duration = Duration::from_secs(20);
/// The text before the reason of a panic in Linux's log.
const PANIC_MARK: &str = "Kernel panic - not syncing:";
/// Texts in the first line of a fault report before a panic: of the kernel, or of an agent that
/// faulted. Registers, code and stack follow that line.
const FAULT_MARKS: [&str; 3] = ["BUG: ", "Oops: ", "bulkhead-agent: rip "];
/// How many lines of the console an error quotes.
const QUOTED_LINES: usize = 12;

/// Why a machine did not start or a request to its monitor failed.
#[derive(Clone, Debug, Error)]
pub enum MachineError {
    /// The program cannot be started.
    #[error("cannot start the monitor: {0}")]
    Spawn(String),
    /// The monitor refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The monitor did not answer in time.
    #[error("the monitor did not answer within {0:?}")]
    Late(Duration),
    /// The machine has ended.
    #[error("{0}")]
    Ended(String),
    /// The monitor's answer does not fit the request.
    #[error("the monitor sent an unexpected answer: {0}")]
    Confused(String),
}

impl From<ClientError> for MachineError {
    fn from(error: ClientError) -> Self {
        Self::Ended(format!("{:#}", anyhow::Error::from(error)))
    }
}

/// What a machine is started from.
#[derive(Debug)]
pub struct Parts<'a> {
    /// `/dev/kvm`.
    pub kvm: &'a File,
    /// The guest's kernel.
    pub kernel: &'a File,
    /// The guest's initramfs.
    pub initramfs: &'a File,
    /// The relay socket to the file server.
    pub file_server: BorrowedFd<'a>,
    /// The log of the guest's console.
    pub console: File,
    /// The uid and gid of the jailed monitor.
    pub jail: JailConfig,
    /// vCPUs and memory at the start.
    pub size: MachineSize,
    /// The number of vCPUs that are declared to the guest.
    pub vcpus_max: u8,
}

type Answered = Result<(Reply, Vec<OwnedFd>), MachineError>;
type Waiting = Arc<Mutex<Calls>>;

/// Calls that wait for their answers.
#[derive(Debug, Default)]
struct Calls {
    last: u64,
    waiting: HashMap<u64, oneshot::Sender<Answered>>,
}

/// A running machine; dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    jailed: Jailed,
    control: Arc<Control>,
    calls: Waiting,
    ended: watch::Receiver<Option<String>>,
}

impl Machine {
    /// Starts the monitor; the guest boots when this returns.
    ///
    /// # Errors
    /// When the monitor cannot be started or refuses its configuration.
    pub async fn start(launch: Launch<'_>, parts: Parts<'_>) -> Result<Self, MachineError> {
        let spawn_error = |error: io::Error| MachineError::Spawn(error.to_string());
        let random = File::open("/dev/urandom").map_err(spawn_error)?;
        let (config, descriptors) = configuration(&parts, &random);
        let (jailed, socket) = spawn::jailed(launch).map_err(spawn_error)?;
        let client = Client::new(socket);
        client.configure(&config, &descriptors)?;
        let control = Arc::new(Control::new(client).map_err(spawn_error)?);
        let calls = Waiting::default();
        let (tell, ended) = watch::channel(None);
        let started = expect_answer(&calls, 0);
        tokio::spawn(listen(control.clone(), calls.clone(), tell));
        let machine = Self { jailed, control, calls, ended };
        timeout(PATIENCE, started)
            .await
            .map_err(|_| MachineError::Late(PATIENCE))?
            .unwrap_or_else(|_| Err(machine.how_it_ended()))?;
        Ok(machine)
    }

    /// The monitor's process.
    #[must_use]
    pub const fn process(&self) -> Process {
        self.jailed.process
    }

    /// Connects to a vsock port of the guest, as soon as something listens there.
    ///
    /// # Errors
    /// When nothing listens within `patience`, or the machine ends before.
    pub async fn open_stream(
        &self,
        port: u32,
        patience: Duration,
    ) -> Result<UnixStream, MachineError> {
        let timeout_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
        let request = Request::OpenStream { port, timeout_ms };
        match self.call(request, &[], patience + PATIENCE).await? {
            (Reply::Stream, mut descriptors) if descriptors.len() == 1 => {
                Ok(UnixStream::from(descriptors.remove(0)))
            }
            (reply, _) => Err(MachineError::Confused(format!("{reply:?}"))),
        }
    }

    /// Attaches a disk to the machine; the guest still has to bind a driver to it.
    ///
    /// # Errors
    /// When the monitor cannot use it.
    pub async fn attach_disk(
        &self,
        index: u8,
        disk: &File,
        read_only: bool,
        serial: String,
    ) -> Result<(), MachineError> {
        let device = DeviceConfig::Blk { disk: Fd(0), read_only, serial };
        let request = Request::Attach { slot: FIRST_FREE_SLOT + index, device };
        self.done(request, &[disk.as_fd()]).await
    }

    /// Attaches a network interface that is connected to a tap, with one pair of queues for each
    /// descriptor in `taps`; the guest still has to bind a driver to it. With a `vhost` descriptor
    /// for each pair, the host's kernel serves the queues, [`crate::network::vhost`].
    ///
    /// # Errors
    /// When the monitor cannot use it; the slot is empty then.
    pub async fn attach_network(
        &self,
        slot: u8,
        (taps, vhost): (&[OwnedFd], &[OwnedFd]),
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<(), MachineError> {
        let unlimited = RateLimit::default();
        let (receive, transmit) = (unlimited, unlimited);
        let descriptors: Vec<_> = taps.iter().chain(vhost).map(AsFd::as_fd).collect();
        let mut numbers = (0..).map(Fd);
        let taps = numbers.by_ref().take(taps.len()).collect();
        let vhost = numbers.take(vhost.len()).collect();
        let network = NetConfig { taps, vhost, mac, mtu, receive, transmit };
        let request = Request::Attach { slot, device: DeviceConfig::Net(network) };
        self.done(request, &descriptors).await
    }

    /// Removes the device of a slot, which the guest has unbound.
    ///
    /// # Errors
    /// When the slot is empty.
    pub async fn detach(&self, slot: u8) -> Result<(), MachineError> {
        self.done(Request::Detach { slot }, &[]).await
    }

    /// Sets the link status of an interface.
    ///
    /// # Errors
    /// When there is no interface in the slot.
    pub async fn set_link(&self, slot: u8, up: bool) -> Result<(), MachineError> {
        self.done(Request::Link { slot, up }, &[]).await
    }

    /// Attaches the virtio-mem device, through which up to `region_mib` can be plugged; the guest
    /// still has to bind a driver to it.
    ///
    /// # Errors
    /// When the machine has one already.
    pub async fn attach_memory(&self, region_mib: u32) -> Result<(), MachineError> {
        let device = DeviceConfig::Mem { region_mib };
        self.done(Request::Attach { slot: MEMORY_SLOT, device }, &[]).await
    }

    /// Requests that the guest plugs a total of `target_mib`.
    ///
    /// # Errors
    /// When there is no virtio-mem device, or the host has too little address space.
    pub async fn plug(&self, target_mib: u32) -> Result<(), MachineError> {
        self.done(Request::Plug { target_mib }, &[]).await
    }

    /// Attaches the virtio-mem device for memory of huge pages, behind the room for other memory; the
    /// guest still has to bind a driver to it.
    ///
    /// # Errors
    /// When the machine has one already.
    pub async fn attach_huge_memory(
        &self,
        region_mib: u32,
        behind_mib: u32,
    ) -> Result<(), MachineError> {
        let device = DeviceConfig::HugeMem { region_mib, behind_mib };
        self.done(Request::Attach { slot: HUGE_MEMORY_SLOT, device }, &[]).await
    }

    /// Requests that the guest plugs memory of so many huge pages, in total; returns how much memory
    /// that is, in MiB.
    ///
    /// # Errors
    /// When the host's pool has too few.
    pub async fn plug_huge(&self, pages: u32) -> Result<u32, MachineError> {
        match self.call(Request::PlugHuge { pages }, &[], PATIENCE).await? {
            (Reply::Plugging { mib }, _) => Ok(mib),
            (reply, _) => Err(MachineError::Confused(format!("{reply:?}"))),
        }
    }

    /// Returns how much memory the guest has plugged.
    ///
    /// # Errors
    /// When there is no virtio-mem device.
    pub async fn plugged_mib(&self) -> Result<u32, MachineError> {
        match self.call(Request::Statistics, &[], PATIENCE).await? {
            (Reply::Statistics(Statistics { plugged_mib: Some(mib), .. }), _) => Ok(mib),
            (reply, _) => Err(MachineError::Confused(format!("{reply:?}"))),
        }
    }

    /// Creates vCPUs up to a total of `count`; the guest still has to start them.
    ///
    /// # Errors
    /// When fewer were declared to the guest.
    pub async fn add_processors(&self, count: u8) -> Result<(), MachineError> {
        self.done(Request::Processors { count }, &[]).await
    }

    /// Ends the machine at once. What the guest has not written back is lost.
    pub async fn stop(self) {
        // Dropping the machine kills the monitor, whatever the answer is.
        let _ = self.call(Request::Stop, &[], Duration::from_secs(1)).await;
    }

    /// Waits until the machine has ended by itself; returns the reason.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(words) => words.clone().unwrap_or_default(),
            Err(_) => "the monitor is gone".to_owned(),
        }
    }

    fn how_it_ended(&self) -> MachineError {
        let words = self.ended.borrow().clone();
        MachineError::Ended(words.unwrap_or_else(|| "the monitor is gone".to_owned()))
    }

    async fn done(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), MachineError> {
        match self.call(request, descriptors, PATIENCE).await? {
            (Reply::Done, _) => Ok(()),
            (reply, _) => Err(MachineError::Confused(format!("{reply:?}"))),
        }
    }

    async fn call(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Answered {
        let number = {
            let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
            calls.last += 1;
            calls.last
        };
        let answer = expect_answer(&self.calls, number);
        self.control.call(&Call { number, request }, descriptors)?;
        timeout(patience, answer)
            .await
            .map_err(|_| MachineError::Late(patience))?
            .unwrap_or_else(|_| Err(self.how_it_ended()))
    }
}

fn expect_answer(calls: &Waiting, number: u64) -> oneshot::Receiver<Answered> {
    let (tell, answer) = oneshot::channel();
    calls.lock().unwrap_or_else(PoisonError::into_inner).waiting.insert(number, tell);
    answer
}

/// Passes answers to their callers until the machine ends or the monitor closes the socket.
async fn listen(control: Arc<Control>, calls: Waiting, tell: watch::Sender<Option<String>>) {
    let words = loop {
        match control.receive().await {
            Ok((FromMonitor::Answer(Answer { number, result }), descriptors)) => {
                let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(asked) = calls.waiting.remove(&number) {
                    // The caller may have given up.
                    let _ = asked.send(result.map(|r| (r, descriptors)).map_err(Into::into));
                }
            }
            Ok((FromMonitor::Event(event), _)) => {
                break reason(&event.ended, &event.console_tail);
            }
            Err(ClientError::Gone) => break "the monitor is gone".to_owned(),
            Err(error) => break format!("{:#}", anyhow::Error::from(error)),
        }
    };
    tell.send_replace(Some(words));
    // Dropping the senders wakes all callers that wait.
    calls.lock().unwrap_or_else(PoisonError::into_inner).waiting.clear();
}

fn reason(ending: &Ending, console: &[String]) -> String {
    let words = match ending {
        Ending::Reset => "the guest shut down".to_owned(),
        Ending::Panic => {
            let panic = console.iter().find_map(|line| Some(line.split_once(PANIC_MARK)?.1.trim()));
            let panic = panic.map(printable);
            let panic = panic.as_deref().unwrap_or("it did not say why");
            format!("the guest's kernel panicked: {panic}")
        }
        Ending::Fault { reason } => format!("KVM cannot go on: {reason}"),
    };
    let is_fault = |line: &String| FAULT_MARKS.iter().any(|mark| line.contains(mark));
    let fault = console.iter().position(is_fault);
    let shown = match (ending, fault) {
        (Ending::Panic, Some(first)) => &console[..console.len().min(first + QUOTED_LINES)],
        _ => console,
    };
    words + &quote(shown)
}

/// The last lines of a console for a one-line message; empty if there are none.
#[must_use]
pub fn quote(lines: &[String]) -> String {
    let last = &lines[lines.len().saturating_sub(QUOTED_LINES)..];
    let last = last.iter().map(|line| printable(line.trim_end()));
    let last: Vec<_> = last.filter(|line| !line.trim().is_empty()).collect();
    match last.is_empty() {
        true => String::new(),
        false => format!("; console: {}", last.join(" | ")),
    }
}

/// The first slot after the devices that every machine has, [`configuration`].
const FIRST_FREE_SLOT: u8 = 4;
/// The first slot after the disks.
pub const FIRST_NETWORK_SLOT: u8 = 12;
/// The last slots, so that disks and interfaces have consecutive slots.
const HUGE_MEMORY_SLOT: u8 = SLOT_COUNT - 1;
const MEMORY_SLOT: u8 = SLOT_COUNT - 2;

fn configuration<'a>(parts: &'a Parts<'_>, random: &'a File) -> (VmConfig, Vec<BorrowedFd<'a>>) {
    let descriptors = vec![
        parts.kvm.as_fd(),
        parts.kernel.as_fd(),
        parts.initramfs.as_fd(),
        parts.console.as_fd(),
        parts.file_server.as_fd(),
        random.as_fd(),
    ];
    let devices = [
        DeviceConfig::Vsock { guest_cid: GUEST_CID },
        DeviceConfig::Fs { tag: SHARE_TAG.to_owned(), server: Fd(4) },
        DeviceConfig::Rng { source: Fd(5) },
        DeviceConfig::Balloon,
    ];
    let config = VmConfig {
        version: VERSION,
        jail: parts.jail,
        kvm: Fd(0),
        kernel: Fd(1),
        initramfs: Fd(2),
        console: Fd(3),
        cmdline: String::new(),
        vcpus: parts.size.vcpus,
        vcpus_max: parts.vcpus_max,
        memory_mib: parts.size.memory_mib,
        devices: (0..).zip(devices).map(|(slot, device)| SlotDevice { slot, device }).collect(),
    };
    (config, descriptors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_one_that_the_monitor_takes() {
        let file = File::open("/dev/null").unwrap();
        let parts = Parts {
            kvm: &file,
            kernel: &file,
            initramfs: &file,
            file_server: file.as_fd(),
            console: file.try_clone().unwrap(),
            jail: JailConfig { uid: 1, gid: 1 },
            size: MachineSize { vcpus: 1, memory_mib: 128, expected_mib: 128, huge_pages: 0 },
            vcpus_max: 2,
        };
        let (config, descriptors) = configuration(&parts, &file);
        assert_eq!(config.validate(descriptors.len()), Ok(()));
        assert_eq!(config.devices.len(), usize::from(FIRST_FREE_SLOT));
    }

    #[test]
    fn the_end_of_a_machine_reads_as_one_line() {
        let mut lines: Vec<String> = (0..20).map(|n| format!("line {n}\r")).collect();
        lines[2] = "[ 1.0] Kernel panic - not syncing: no init".to_owned();
        let words = reason(&Ending::Panic, &lines);
        let start = "the guest's kernel panicked: no init; console: line 8 ";
        assert!(words.starts_with(start), "{words}");
        assert!(words.contains("line 19") && !words.contains('\r') && !words.contains("line 7"));
        lines[3] = "[ 0.9] Oops: invalid opcode: 0000 [#1] SMP".to_owned();
        let words = reason(&Ending::Panic, &lines);
        let start = "the guest's kernel panicked: no init; console: [ 0.9] Oops: invalid opcode";
        assert!(words.starts_with(start) && words.ends_with("line 14"), "{words}");
        lines[0] = "bulkhead-agent: rip 0xbad0 rsp 0x7ffc".to_owned();
        let words = reason(&Ending::Panic, &lines);
        let start = "the guest's kernel panicked: no init; console: bulkhead-agent: rip 0xbad0";
        assert!(words.starts_with(start) && words.ends_with("line 11"), "{words}");
        assert_eq!(quote(&[]), "");
        assert_eq!(quote(&["\n".to_owned()]), "");
    }
}
