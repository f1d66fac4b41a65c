//! Interfaces of the host whose other end is a network device of the monitor.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The size of the header that a network device of the monitor expects before each frame.
const HEADER_BYTES: libc::c_int = 12;

/// A tap of the host; it disappears when its descriptors are closed.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
}

impl Tap {
    /// Makes a tap with this number of queue pairs, with the settings that the monitor needs.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new(name: &str, queues: usize) -> Result<Self> {
        let queues = (0..queues).map(|_| open(name, queues > 1)).collect::<Result<_>>()?;
        Ok(Self { name: name.into(), queues })
    }

    /// Gives the host's end an address such as `10.0.0.1/24`, and brings it up.
    ///
    /// # Errors
    /// With the failure of `ip`.
    pub fn up(&self, address: &str, mtu: u16) -> Result<()> {
        let name = self.name.as_str();
        ip(&["address", "add", address, "dev", name])?;
        ip(&["link", "set", name, "mtu", &mtu.to_string(), "up"])
    }

    /// The interface's index, which link-local addresses need.
    ///
    /// # Errors
    /// When the interface does not exist any more.
    pub fn index(&self) -> Result<u32> {
        let text = fs::read_to_string(format!("/sys/class/net/{}/ifindex", self.name))?;
        Ok(text.trim().parse()?)
    }

    /// Deletes the host's neighbour entries, so that it resolves addresses again.
    ///
    /// # Errors
    /// With the failure of `ip`.
    pub fn forget_neighbours(&self) -> Result<()> {
        ip(&["neighbour", "flush", "dev", &self.name])
    }

    /// The descriptors for the monitor, in order.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.queues.iter().map(AsFd::as_fd).collect()
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("run ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words:?}: {said}");
    Ok(())
}

// UNSAFETY: a tap is made by ioctl.
#[expect(unsafe_code, reason = "TUNSETIFF and TUNSETVNETHDRSZ of a descriptor")]
fn open(name: &str, several: bool) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let queue = options.open("/dev/net/tun").context("/dev/net/tun")?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: all zeroes is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *place = byte.try_into().context("a name is ASCII")?;
    }
    request.ifr_ifru.ifru_flags = flags.try_into().context("flags are 16 bits")?;
    // SAFETY: the kernel reads and writes one request.
    let made = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(made == 0, "TUNSETIFF {name}: {}", io::Error::last_os_error());
    let bytes = HEADER_BYTES;
    // SAFETY: the kernel reads one integer.
    let set = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
    ensure!(set == 0, "TUNSETVNETHDRSZ: {}", io::Error::last_os_error());
    Ok(queue)
}
