//! The socket device, VIRTIO 1.2 §5.10: streams from the host into the guest.
//!
//! ```text
//! Opener ──requests──► Muxer ──► Stream (socket) ──► Connection (state, credit)
//!                        ▲ ▼
//!          tx queue ─────┘ └────► rx queue
//! ```
//! Only the host opens streams, so a guest cannot reach anything that has not opened a stream to
//! it. A host socket is read only when the guest has a buffer, and directly into that buffer: in
//! this direction no data waits in the monitor. In the other direction at most
//! [`connection::BUFFER_BYTES`] wait for each stream, which is the guest's credit.
//! Datagrams and sequenced packets are not offered; transport events are never sent.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::epoll::EventSet;

use super::worker::Sources;
use super::{ConfigSpace, Context, Device, Identity, Ready, Serve, ServeError};

mod connection;
mod muxer;
mod opener;
mod packet;
mod stream;

use muxer::Muxer;
pub(crate) use opener::{OpenError, OpenRequest, Opener};
use packet::{HEADER_BYTES, Header};

/// The device type, §5.10.1.
pub(crate) const DEVICE_ID: u32 = 19;
/// `VIRTIO_VSOCK_F_STREAM`, §5.10.3.
const F_STREAM: u64 = 1 << 0;
/// The queues, §5.10.2. The third is for events, of which there are none.
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: &[u16] = &[256, 256, 16];
/// The lowest context id that a guest may have: those below are reserved, §5.10.4.
const FIRST_GUEST_CID: u32 = 3;
/// Chains served before others get their turn.
const BATCH: usize = 256;
/// Tokens of the sources that are not streams.
const WAKE: u32 = 0;
const TIMER: u32 = 1;

/// Makes the device of the guest `guest_cid` and the handle that opens streams into it.
///
/// # Errors
/// When the context id is reserved, or the host has no descriptors left.
pub(crate) fn device(guest_cid: u32) -> io::Result<(Device<Vsock>, Opener)> {
    if guest_cid < FIRST_GUEST_CID || guest_cid == u32::MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "reserved context id"));
    }
    let opener = Opener::new()?;
    let logic = Vsock {
        muxer: Muxer::new(guest_cid),
        opener: opener.clone(),
        timer: timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?,
        timer_set: None,
        tx_held: false,
    };
    let identity = Identity { device_id: DEVICE_ID, features: F_STREAM, queue_sizes: QUEUE_SIZES };
    let config = ConfigSpace::read_only(u64::from(guest_cid).to_le_bytes().to_vec());
    Ok((Device::new(identity, config, logic), opener))
}

/// The logic of the device.
#[derive(Debug)]
pub(crate) struct Vsock {
    muxer: Muxer,
    opener: Opener,
    timer: OwnedFd,
    /// What the timer is set to.
    timer_set: Option<Instant>,
    /// The guest's packets wait until it takes some of the host's.
    tx_held: bool,
}

impl Serve for Vsock {
    const NAME: &'static str = "vsock";
    const SYSCALLS: &'static [i64] = &[
        libc::SYS_socketpair,      // a stream opens
        libc::SYS_recvmsg,         // host to guest
        libc::SYS_sendmsg,         // guest to host
        libc::SYS_sendto,          // guest to host, from the backlog
        libc::SYS_poll,            // whether a host end closed
        libc::SYS_shutdown,        // half-close
        libc::SYS_timerfd_settime, // repeats and deadlines of requests
        libc::SYS_clock_gettime,   // the same, where the vDSO cannot
    ];

    fn start(&mut self, _features: u64, sources: &Sources) -> io::Result<()> {
        self.timer_set = None;
        self.tx_held = false;
        sources.add(&self.timer, TIMER, EventSet::IN)?;
        // This is readable already if streams were requested before the driver came.
        sources.add(self.opener.event(), WAKE, EventSet::IN)
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        let served = self.serve_all(ready, context);
        if served.is_err() {
            // The device is dead until a reset that may never come: no caller must wait for it.
            for request in self.muxer.reset().chain(self.opener.take()) {
                (request.answer)(Err(OpenError::Gone));
            }
        }
        served
    }

    fn stop(&mut self, sources: &Sources) {
        // Neither fails: both are registered, or the epoll instance is about to be closed.
        let _ = sources.remove(&self.timer);
        let _ = sources.remove(self.opener.event());
        self.opener.put_back(self.muxer.reset());
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        for request in self.muxer.reset().chain(self.opener.take()) {
            (request.answer)(Err(OpenError::Gone));
        }
    }
}

impl Vsock {
    fn serve_all(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        match ready {
            Ready::Queue(TX) => self.drain_tx(context)?,
            Ready::Queue(_) => {}
            Ready::Source(WAKE) => {
                for request in self.opener.take() {
                    self.muxer.open(request);
                }
            }
            Ready::Source(TIMER) => {
                // Nonblocking: a spurious wake-up finds nothing to clear.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.timer_set = None;
            }
            Ready::Source(port) => self.muxer.on_edge(port),
        }
        if self.muxer.next_tick().is_some() {
            self.muxer.tick(Instant::now());
        }
        self.fill_rx(context)?;
        self.set_timer()
    }

    /// Handles the packets that the guest has sent.
    fn drain_tx(&mut self, context: &mut Context<'_>) -> Result<(), ServeError> {
        let Context { memory, sources, .. } = *context;
        let Some(queue) = context.queues.get_mut(TX) else { return Ok(()) };
        let mut taken = 0;
        loop {
            if self.muxer.is_clogged() {
                self.tx_held = true;
                break;
            }
            if taken == BATCH {
                queue.kick_again()?;
                break;
            }
            let Some(mut chain) = queue.pop_or_arm(memory)? else { break };
            let mut bytes = [0; HEADER_BYTES];
            chain.readable.read(memory, &mut bytes)?;
            let header = Header::parse(&bytes);
            if header.len as usize > chain.readable.left() {
                return Err(ServeError::Request("vsock packet is shorter than its length"));
            }
            self.muxer.receive(&header, &mut chain.readable, memory, sources)?;
            queue.complete(memory, chain.head, 0)?;
            taken += 1;
        }
        if taken > 0 {
            queue.signal(memory)?;
        }
        Ok(())
    }

    /// Sends the packets that wait, as far as the guest has buffers for them.
    fn fill_rx(&mut self, context: &mut Context<'_>) -> Result<(), ServeError> {
        let memory = context.memory;
        let Some(queue) = context.queues.get_mut(RX) else { return Ok(()) };
        let mut used = 0;
        let mut tries = 0;
        while self.muxer.has_output() {
            if tries == BATCH {
                queue.kick_again()?;
                break;
            }
            tries += 1;
            let Some(mut chain) = queue.pop_or_arm(memory)? else { break };
            if chain.readable.left() > 0 || chain.writable.left() <= HEADER_BYTES {
                return Err(ServeError::Request("vsock buffer has no room for a packet"));
            }
            match self.muxer.fill(memory, &mut chain.writable)? {
                Some(written) => {
                    queue.complete(memory, chain.head, written)?;
                    used += 1;
                }
                None => queue.unpop(),
            }
        }
        if used > 0 {
            queue.signal(memory)?;
        }
        if self.tx_held && !self.muxer.is_clogged() {
            self.tx_held = false;
            if let Some(queue) = context.queues.get(TX) {
                queue.kick_again()?;
            }
        }
        Ok(())
    }

    /// Sets the timer to the next deadline.
    fn set_timer(&mut self) -> Result<(), ServeError> {
        let next = self.muxer.next_tick();
        if next == self.timer_set {
            return Ok(());
        }
        // All zeroes disarm the timer; 1 ns makes a deadline that has passed expire at once.
        let wait = next.map(|at| at.saturating_duration_since(Instant::now()));
        let nanoseconds = |value: std::time::Duration| i64::from(value.subsec_nanos().max(1));
        let it_value = Timespec {
            tv_sec: wait.map_or(0, |wait| i64::try_from(wait.as_secs()).unwrap_or(i64::MAX)),
            tv_nsec: wait.map_or(0, nanoseconds),
        };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Itimerspec { it_interval, it_value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value)
            .map_err(io::Error::from)?;
        self.timer_set = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
