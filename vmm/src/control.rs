//! The control socket: what the supervisor can ask of the monitor, and the client that asks.
//!
//! Messages are JSON packets ([`crate::seqpacket`]). The first one is the [`VmConfig`] for the
//! monitor, which sends an [`Answer`] with number 0 once the guest runs. [`Call`]s follow, each
//! answered under its own number. The answers can come in another order: a stream opens when the
//! guest accepts it. An [`Event`] has no number and is sent at most once, when the machine has
//! ended.
//!
//! When the supervisor closes the socket the monitor exits; when the monitor dies the supervisor
//! reads end of file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{DeviceConfig, VmConfig};
use crate::seqpacket;

/// The version of these calls.
pub const VERSION: u32 = 1;

/// A numbered request; the descriptors that it names are sent with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the caller, above 0; the answer carries it.
    pub number: u64,
    /// What to do.
    #[serde(flatten)]
    pub request: Request,
}

/// What the monitor can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "snake_case")]
pub enum Request {
    /// Answered by [`Reply::Version`].
    Version,
    /// Stops all vCPUs; devices keep serving. Idempotent.
    Pause,
    /// Lets the vCPUs run again. Idempotent.
    Resume,
    /// Ends the machine at once; answered before the monitor exits.
    Stop,
    /// Connects to a vsock port of the guest. While nothing listens there it tries again, until the
    /// time is up. The connected socket comes with [`Reply::Stream`].
    OpenStream {
        /// The guest's port.
        port: u32,
        /// How long to try.
        timeout_ms: u32,
    },
    /// Attaches a device to a placeholder slot.
    Attach {
        /// Below [`crate::config::SLOT_COUNT`], and empty.
        slot: u8,
        /// Its descriptors are indexes into those of this message.
        device: DeviceConfig,
    },
    /// Removes the device from a slot; the guest must have unbound it.
    Detach {
        /// A slot that holds a device.
        slot: u8,
    },
    /// Sets the link state of a network device, which is up at first, and tells the guest.
    Link {
        /// A slot that holds a network device.
        slot: u8,
        /// Whether the link is up.
        up: bool,
    },
    /// Asks the guest to give up this much of its memory, in total. It gives what it can;
    /// [`Statistics::balloon_mib`] says how much that is.
    Balloon {
        /// 0 gives everything back to the guest.
        target_mib: u32,
    },
    /// Lets the guest plug this much memory, in total, in addition to what it has booted with;
    /// rounded up to the steps in which a guest can. [`Statistics::plugged_mib`] says how much it
    /// has plugged.
    Plug {
        /// Less than before asks for memory back.
        target_mib: u32,
    },
    /// Lets the guest plug memory that this many huge pages of 2 MiB hold, in total, and some spare
    /// memory. The pages are reserved in the host's pool until the monitor exits; when it has too
    /// few, nothing changes. Answered by [`Reply::Plugging`].
    PlugHuge {
        /// Fewer than before change nothing.
        pages: u32,
    },
    /// Creates vCPUs until there are this many in total; the guest may then bring them online.
    /// Existing ones are not removed.
    Processors {
        /// At most [`VmConfig::vcpus_max`].
        count: u8,
    },
    /// Answered by [`Reply::Statistics`].
    Statistics,
}

/// A message of the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FromMonitor {
    /// The answer to one call.
    Answer(Answer),
    /// The machine ended.
    Event(Event),
}

/// The answer to the call of the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The number of the call; 0 answers the configuration.
    pub number: u64,
    /// The result of the call.
    pub result: Result<Reply, Refusal>,
}

/// What a successful call returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done, without data.
    Done,
    /// Which monitor this is.
    Version {
        /// [`VERSION`].
        control: u32,
        /// The version of the monitor.
        monitor: String,
    },
    /// The stream is the only descriptor of the message.
    Stream,
    /// The guest is asked to plug memory of huge pages.
    Plugging {
        /// How much of it there is now, spare memory included.
        mib: u32,
    },
    /// Counters since the start.
    Statistics(Statistics),
}

/// Counters since the machine started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Times that a vCPU left the guest for the monitor.
    pub vcpu_exits: u64,
    /// Bytes that the guest wrote to its console.
    pub console_bytes: u64,
    /// Memory in the guest's balloon, if it has one.
    pub balloon_mib: Option<u32>,
    /// Memory that the guest has plugged, if it has a device for that.
    pub plugged_mib: Option<u32>,
    /// Per slot that holds a device.
    pub devices: Vec<DeviceStatistics>,
}

/// One device's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatistics {
    /// The slot.
    pub slot: u8,
    /// The virtio device type, VIRTIO 1.2 §5.
    pub device_id: u32,
    /// Times the driver kicked a queue.
    pub notifications: u64,
    /// The driver broke the protocol and the device stopped until reset.
    pub failed: bool,
    /// Packets of a network that were malformed, too long or refused by the host's interface.
    pub dropped: u64,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("{message}")]
pub struct Refusal {
    /// The error with its causes and the values from the call.
    pub message: String,
}

/// The machine ended by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Why.
    pub ended: Ending,
    /// The last lines of the guest's console.
    pub console_tail: Vec<String>,
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The guest reset the machine, which is how it shuts down.
    Reset,
    /// The guest kernel panicked: the console says so.
    Panic,
    /// KVM cannot run the guest any more.
    Fault {
        /// The exit reason and its details.
        reason: String,
    },
}

/// Why the client has no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("control socket of the monitor")]
    Socket(#[from] io::Error),
    /// The monitor closed the socket.
    #[error("the monitor is gone")]
    Gone,
    /// The monitor sent a message that this file does not define.
    #[error("cannot read the monitor's message")]
    Garbled(#[source] serde_json::Error),
}

/// The supervisor's end of the control socket. Its methods are plain system calls: the caller
/// decides where and when to block.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// Takes over a connected SEQPACKET socket.
    #[must_use]
    pub const fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends the first message.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub fn configure(
        &self,
        config: &VmConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let json = serde_json::to_vec(config).map_err(ClientError::Garbled)?;
        Ok(seqpacket::send(&self.socket, &json, descriptors)?)
    }

    /// Sends one call.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub fn call(&self, call: &Call, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let json = serde_json::to_vec(call).map_err(ClientError::Garbled)?;
        Ok(seqpacket::send(&self.socket, &json, descriptors)?)
    }

    /// Waits for the next answer or event, and returns it with its descriptors.
    ///
    /// # Errors
    /// [`ClientError::Gone`] at end of file.
    pub fn receive(&self) -> Result<(FromMonitor, Vec<OwnedFd>), ClientError> {
        let message = seqpacket::receive(&self.socket)?.ok_or(ClientError::Gone)?;
        let said = serde_json::from_slice(&message.bytes).map_err(ClientError::Garbled)?;
        Ok((said, message.descriptors))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
