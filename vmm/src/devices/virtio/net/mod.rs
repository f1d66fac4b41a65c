//! The network device, VIRTIO 1.3 §5.1: Ethernet frames between the guest and a tap of the host.
//!
//! Frames go directly between guest memory and the tap, whose header is the same as that of the
//! device. So checksums and segmentation are left to the last one on the path, on either side. One
//! thread serves all pairs of queues. Frames beyond the limit wait in the tap or in the guest's
//! queue: the device holds no frame. If the monitor is given vhost-net, the host's kernel does all
//! this in place of the thread ([`kernel`]).
//!
//! VLAN filtering, receive steering by a key, announcements and changing the offloads of a running
//! driver are not offered.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::{ConfigSpace, Device, Identity};
use crate::config::{NetConfig, PAIRS_MAX};
use crate::memory::Memory;

mod control;
mod filter;
#[cfg(any(test, fuzzing))]
pub(crate) mod guided;
mod header;
mod kernel;
mod limit;
#[cfg(any(test, fuzzing))]
mod mock;
mod receive;
mod serve;
mod tap;
mod transmit;
mod vhost;

use kernel::Kernel;
use limit::Limit;
pub(crate) use serve::Net;
use tap::Tap;

/// The device type, §5.1.1.
pub(crate) const DEVICE_ID: u32 = 1;
/// The size of every queue; which one is the control queue depends on the negotiated features.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE; 2 * PAIRS_MAX + 1];

/// Features, §5.1.3.
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_MQ: u64 = 1 << 22;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;
const F_GUEST_USO4: u64 = 1 << 54;
const F_GUEST_USO6: u64 = 1 << 55;
const F_HOST_USO: u64 = 1 << 56;
const F_USO: u64 = F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO;
/// Features with which frames can be longer than the MTU.
const F_GUEST_LARGE: u64 = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6;
/// Features that every tap supports.
const FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_MTU
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_MRG_RXBUF
    | F_STATUS
    | F_CTRL_VQ
    | F_CTRL_RX
    | F_CTRL_MAC_ADDR;

/// Offsets in the configuration space, §5.1.4.
const MAC: usize = 0;
const STATUS: usize = 6;
const PAIRS: usize = 8;
const MTU: usize = 10;
const CONFIG_BYTES: usize = 12;
/// The one bit of the status: the link is up.
const LINK_UP: u16 = 1;

/// Makes an interface whose frames go to and come from `taps`. With `vhost` (see
/// [`NetConfig::vhost`]), the host's kernel is shown the memory and moves the frames.
///
/// # Errors
/// When they are not taps of one interface, or not set up as [`NetConfig::taps`] says.
pub(crate) fn device(
    config: &NetConfig,
    (taps, vhost): (Vec<OwnedFd>, Vec<OwnedFd>),
    memory: &Memory,
) -> io::Result<Device<Net>> {
    let taps = tap::check(taps)?;
    let mut features = FEATURES;
    if taps.len() > 1 {
        features |= F_MQ;
    }
    // Taps have USO since Linux 6.2.
    if taps.iter().all(|tap| tap.set_offloads(header::offloads(features | F_USO)).is_ok()) {
        features |= F_USO;
    }
    let queue_sizes = QUEUE_SIZES.get(..=2 * taps.len()).unwrap_or(QUEUE_SIZES);
    let kernel = if vhost.is_empty() { None } else { Some(Kernel::new(vhost, memory)?) };
    let (logic, space) = logic(config, taps, kernel)?;
    let identity = Identity { device_id: DEVICE_ID, features, queue_sizes };
    Ok(Device::new(identity, space, logic))
}

/// Sets the link state of an interface; the caller must notify the driver.
pub(crate) fn set_link(config: &ConfigSpace, up: bool) {
    config.set(STATUS, if up { LINK_UP } else { 0 }.to_le_bytes());
}

fn logic<T: Tap>(
    config: &NetConfig,
    taps: Vec<T>,
    kernel: Option<Kernel>,
) -> io::Result<(Net<T>, ConfigSpace)> {
    let space = ConfigSpace::read_only(vec![0; CONFIG_BYTES]);
    space.set(MAC, config.mac);
    set_link(&space, true);
    // At most PAIRS_MAX.
    let pairs = u16::try_from(taps.len()).unwrap_or(u16::MAX);
    space.set(PAIRS, pairs.to_le_bytes());
    space.set(MTU, config.mtu.to_le_bytes());
    let now = Instant::now();
    let limits = (Limit::new(config.receive, now), Limit::new(config.transmit, now));
    let net = Net::new((space.clone(), config), limits, taps, kernel)?;
    Ok((net, space))
}

#[cfg(test)]
mod tests;
