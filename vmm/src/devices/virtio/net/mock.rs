//! A guest with one network interface, whose taps are pairs of sockets: one packet is one frame.

#![expect(clippy::unwrap_used, reason = "a guest that cannot be set up is a failed test")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::super::mock::Driver;
use super::super::queue::GuestMemory;
use super::super::{Ready, Serve, ServeError};
use super::*;
use crate::config::{Fd, RateLimit};

pub(super) const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const ALL: u64 = FEATURES | F_USO | F_MQ;
/// Token of the timer.
pub(super) const TIMER: Ready = Ready::Source(u32::MAX);

/// One end of a pair of sockets.
pub(super) struct SocketTap {
    pub(super) socket: OwnedFd,
    pub(super) offloads: Arc<AtomicU32>,
}

impl Tap for SocketTap {
    fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        self.offloads.store(flags, Ordering::Relaxed);
        Ok(())
    }

    fn set_used(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for SocketTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for SocketTap {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

pub(super) fn config(pairs: usize, limit: RateLimit) -> NetConfig {
    NetConfig {
        taps: vec![Fd(0); pairs],
        vhost: Vec::new(),
        mac: OWN,
        mtu: 1500,
        receive: limit,
        transmit: limit,
    }
}

/// A device that no driver has started, and the other ends of its taps.
pub(super) fn unstarted(
    pairs: usize,
    limit: RateLimit,
) -> (Net<SocketTap>, ConfigSpace, Vec<OwnedFd>) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (mut taps, mut wires) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let (socket, wire) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        taps.push(SocketTap { socket, offloads: Arc::default() });
        wires.push(wire);
    }
    let config = config(pairs, limit);
    let (net, space) = logic(&config, taps, None).unwrap();
    (net, space, wires)
}

/// A guest with one interface.
pub(super) struct Guest<'m> {
    pub(super) driver: Driver<'m>,
    pub(super) net: Net<SocketTap>,
    pub(super) space: ConfigSpace,
    pub(super) wires: Vec<OwnedFd>,
}

impl<'m> Guest<'m> {
    pub(super) fn with(
        memory: &'m GuestMemory,
        features: u64,
        pairs: usize,
        limit: RateLimit,
    ) -> Self {
        let driver = Driver::new(memory, &QUEUE_SIZES[..=2 * pairs]);
        let (mut net, space, wires) = unstarted(pairs, limit);
        net.start(features, &driver.sources).unwrap();
        Self { driver, net, space, wires }
    }

    pub(super) fn call(&mut self, ready: Ready) -> Result<(), ServeError> {
        self.driver.call(&mut self.net, ready)
    }
}
