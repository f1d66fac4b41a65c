//! Decides when each queue and each tap is served.
//!
//! A tap is watched only while its frames may be taken, and a queue asks for kicks only while its
//! frames may be sent, so frames that have to wait cause no wake-ups. The timer is for limits only.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::epoll::EventSet;

use super::super::queue::{Chain, GuestMemory};
use super::super::worker::Sources;
use super::super::{Activation, ConfigSpace, Context, Ready, Serve, ServeError};
use super::control::{COMMAND_MAX, Command, DONE, REFUSED};
use super::filter::{Filter, Mac};
use super::header;
use super::kernel::Kernel;
use super::limit::Limit;
use super::receive::{self, Receive, Round};
use super::tap::{HostTap, Tap};
use super::transmit::{self, Transmit};
use super::{F_CTRL_VQ, F_MQ, MAC};
use crate::config::NetConfig;

/// Tokens of the timer and of the errors of vhost-net; the token of a tap is its index.
const TIMER: u32 = u32::MAX;
const BROKEN: u32 = u32::MAX - 1;

/// The logic of the device.
pub(crate) struct Net<T = HostTap> {
    config: ConfigSpace,
    /// The address that a reset restores.
    mac: Mac,
    mtu: u16,
    features: u64,
    pub(super) filter: Filter,
    pub(super) pairs: Vec<Pair<T>>,
    /// How many pairs the driver uses.
    used: usize,
    /// Limits of what the driver receives and of what it sends.
    limits: (Limit, Limit),
    timer: OwnedFd,
    /// Moves the frames in place of this device, if there is one.
    kernel: Option<Kernel>,
}

/// A pair of queues, and the tap that belongs to it.
pub(super) struct Pair<T> {
    pub(super) tap: T,
    pub(super) receive: Receive,
    transmit: Transmit,
    /// Why the last round of receiving ended: what the frames of the tap wait for.
    receiving: receive::Ended,
    /// Why the last round of sending ended: what the frames of the queue wait for.
    sending: transmit::Ended,
    pub(super) watched: EventSet,
    /// The interface gives frames to the tap (`TUNSETQUEUE`).
    attached: bool,
}

impl<T: Tap> Net<T> {
    /// A device that no driver uses yet.
    pub(super) fn new(
        (space, config): (ConfigSpace, &NetConfig),
        limits: (Limit, Limit),
        taps: Vec<T>,
        kernel: Option<Kernel>,
    ) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let pairs = taps.into_iter().map(Pair::new).collect();
        let (mac, mtu) = (Mac(config.mac), config.mtu);
        let (config, features, filter) = (space, 0, Filter::new(mac));
        Ok(Self { config, mac, mtu, features, filter, pairs, used: 1, limits, timer, kernel })
    }
}

impl<T> Pair<T> {
    fn new(tap: T) -> Self {
        Self {
            tap,
            receive: Receive::default(),
            transmit: Transmit::default(),
            receiving: receive::Ended::Served,
            sending: transmit::Ended::Served,
            watched: EventSet::empty(),
            attached: true,
        }
    }
}

impl<T: Tap> Serve for Net<T> {
    const NAME: &'static str = "net";
    const SYSCALLS: &'static [i64] = &[
        libc::SYS_readv,           // frames from a tap
        libc::SYS_writev,          // frames to a tap
        libc::SYS_timerfd_settime, // limits
        libc::SYS_clock_gettime,   // limits, where the vDSO has no clock
        libc::SYS_ioctl,           // with vhost-net: which taps are used, and the end
    ];

    // `start` and `delegate` run on the thread of the processor that activates the device.
    fn start(&mut self, features: u64, sources: &Sources) -> io::Result<()> {
        self.features = features;
        if let Some(first) = self.pairs.first() {
            first.tap.set_offloads(header::offloads(features))?;
        }
        for pair in &mut self.pairs {
            pair.receive.start(features, self.mtu);
            pair.transmit.start(features);
            pair.receiving = receive::Ended::Served;
            pair.sending = transmit::Ended::Served;
            pair.watched = EventSet::empty();
        }
        sources.add(&self.timer, TIMER, EventSet::IN)?;
        self.watch(sources)
    }

    fn delegate(&mut self, activation: &Activation, sources: &Sources) -> io::Result<()> {
        self.share_out()?;
        let Some(kernel) = &self.kernel else { return Ok(()) };
        kernel.start(activation, self.pairs.iter().map(|pair| &pair.tap), (sources, BROKEN))
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        match ready {
            Ready::Queue(index) if self.control_queue() == Some(index) => {
                self.control(index, context)?;
            }
            Ready::Queue(index) if index.is_multiple_of(2) => self.make_room(context)?,
            Ready::Queue(index) => self.transmit(index / 2, context)?,
            Ready::Source(TIMER) => self.retry(context)?,
            Ready::Source(BROKEN) => self.kernel.as_ref().map_or(Ok(()), Kernel::complaint)?,
            Ready::Source(place) => self.tap_ready(place as usize, context)?,
        }
        Ok(self.watch(context.sources)?)
    }

    fn stop(&mut self, sources: &Sources) {
        if let Some(kernel) = &self.kernel {
            kernel.stop(sources);
        }
        for pair in &mut self.pairs {
            pair.receive.stop();
            if !pair.watched.is_empty() {
                // This and the next call do not fail: both were registered.
                let _ = sources.remove(&pair.tap);
            }
        }
        let _ = sources.remove(&self.timer);
        self.used = 1;
        self.filter = Filter::new(self.mac);
        self.config.set(MAC, self.mac.0);
    }
}

impl<T: Tap> Net<T> {
    /// The control queue comes after the last pair that the driver can use, §5.1.2.
    fn control_queue(&self) -> Option<usize> {
        let pairs = if self.features & F_MQ != 0 { self.pairs.len() } else { 1 };
        (self.features & F_CTRL_VQ != 0).then_some(2 * pairs)
    }

    /// With vhost-net, lets the interface give frames only to the taps of pairs that are used.
    fn share_out(&mut self) -> io::Result<()> {
        if self.kernel.is_none() {
            return Ok(());
        }
        for (place, pair) in self.pairs.iter_mut().enumerate() {
            let used = place < self.used;
            if pair.attached != used {
                pair.tap.set_used(used)?;
                pair.attached = used;
            }
        }
        Ok(())
    }

    fn tap_ready(&mut self, place: usize, context: &mut Context<'_>) -> Result<(), ServeError> {
        let Some(pair) = self.pairs.get(place) else { return Ok(()) };
        let blocked = pair.sending == transmit::Ended::Blocked;
        if pair.receiving == receive::Ended::Served {
            self.receive(place, context)?;
        }
        if blocked { self.transmit(place, context) } else { Ok(()) }
    }

    /// Continues after the driver has made buffers available, or uses other queues than before.
    fn make_room(&mut self, context: &mut Context<'_>) -> Result<(), ServeError> {
        for place in 0..self.pairs.len() {
            if self.pairs[place].receiving == receive::Ended::NoRoom {
                self.receive(place, context)?;
            }
        }
        Ok(())
    }

    /// Continues where a limit was reached.
    fn retry(&mut self, context: &mut Context<'_>) -> Result<(), ServeError> {
        // Nonblocking: a spurious wake-up finds nothing to clear.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        for place in 0..self.pairs.len() {
            if self.pairs[place].receiving == receive::Ended::Limited {
                self.receive(place, context)?;
            }
            if self.pairs[place].sending == transmit::Ended::Limited {
                self.transmit(place, context)?;
            }
        }
        Ok(())
    }

    /// Gives the frames of a tap to the driver. The taps of unused pairs have frames too, which go
    /// to the queues that are used.
    fn receive(&mut self, place: usize, context: &mut Context<'_>) -> Result<(), ServeError> {
        let to = place % self.used;
        let Some(queue) = context.queues.get_mut(2 * to).filter(|queue| queue.ready()) else {
            self.pairs[place].receiving = receive::Ended::NoRoom;
            return Ok(());
        };
        let mut receive = std::mem::take(&mut self.pairs[to].receive);
        let round = Round {
            tap: &self.pairs[place].tap,
            memory: context.memory,
            filter: &self.filter,
            limit: &mut self.limits.0,
        };
        let ended = receive.round(queue, round);
        self.pairs[to].receive = receive;
        let ended = ended?;
        self.pairs[place].receiving = ended;
        match ended {
            receive::Ended::Limited => self.set_timer()?,
            receive::Ended::Gone => {
                super::set_link(&self.config, false);
                queue.line().raise_config()?;
            }
            receive::Ended::Served | receive::Ended::NoRoom => {}
        }
        Ok(())
    }

    /// Sends the driver's frames to a tap.
    fn transmit(&mut self, place: usize, context: &mut Context<'_>) -> Result<(), ServeError> {
        let queue = context.queues.get_mut(2 * place + 1).filter(|queue| queue.ready());
        let (Some(queue), Some(pair)) = (queue, self.pairs.get_mut(place)) else { return Ok(()) };
        let limit = &mut self.limits.1;
        pair.sending = pair.transmit.round(queue, context.memory, &pair.tap, limit)?;
        match pair.sending {
            transmit::Ended::Batch => queue.kick_again()?,
            transmit::Ended::Limited => self.set_timer()?,
            transmit::Ended::Served | transmit::Ended::Blocked => {}
        }
        Ok(())
    }

    /// Executes the commands of the control queue.
    fn control(&mut self, index: usize, context: &mut Context<'_>) -> Result<(), ServeError> {
        let usable = context.queues.chunks_exact(2).take_while(|pair| {
            let [receive, transmit] = pair else { return false };
            receive.ready() && transmit.ready()
        });
        let usable = usable.count().min(self.pairs.len());
        let used = self.used;
        let Some(queue) = context.queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(());
        };
        queue.drain(context.memory, |chain| self.answer(chain, context.memory, usable))?;
        if self.used != used {
            self.share_out()?;
        }
        self.make_room(context)
    }

    fn answer(
        &mut self,
        chain: &mut Chain,
        memory: &GuestMemory,
        usable: usize,
    ) -> Result<usize, ServeError> {
        if chain.writable.left() == 0 {
            return Err(ServeError::Request("control command has no room for its answer"));
        }
        let mut bytes = vec![0; chain.readable.left().min(COMMAND_MAX)];
        chain.readable.read(memory, &mut bytes)?;
        let done = Command::parse(&bytes).is_some_and(|command| self.execute(command, usable));
        chain.writable.write(memory, &[if done { DONE } else { REFUSED }])?;
        Ok(1)
    }

    /// Executes a command; `false` if the driver must not use it.
    fn execute(&mut self, command: Command, usable: usize) -> bool {
        if self.features & command.needs() == 0 {
            return false;
        }
        match command {
            Command::Promiscuous(on) => self.filter.promiscuous = on,
            Command::AllMulticast(on) => self.filter.all_multicast = on,
            Command::Listen { unicast, multicast } => {
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
            }
            Command::SetAddress(mac) => {
                self.filter.own = mac;
                self.config.set(MAC, mac.0);
            }
            Command::SetPairs(pairs) => {
                let pairs = usize::from(pairs);
                if !(1..=usable).contains(&pairs) {
                    return false;
                }
                self.used = pairs;
            }
        }
        true
    }

    /// Watches each tap for the events that are needed, and not at all if there are none: a tap
    /// whose interface is gone would be ready for ever.
    fn watch(&mut self, sources: &Sources) -> io::Result<()> {
        if self.kernel.is_some() {
            return Ok(());
        }
        for (token, pair) in (0_u32..).zip(&mut self.pairs) {
            let mut wanted = EventSet::empty();
            wanted.set(EventSet::IN, pair.receiving == receive::Ended::Served);
            wanted.set(EventSet::OUT, pair.sending == transmit::Ended::Blocked);
            if wanted == pair.watched {
                continue;
            }
            match (pair.watched.is_empty(), wanted.is_empty()) {
                (true, _) => sources.add(&pair.tap, token, wanted)?,
                (false, false) => sources.modify(&pair.tap, token, wanted)?,
                (false, true) => sources.remove(&pair.tap)?,
            }
            pair.watched = wanted;
        }
        Ok(())
    }

    /// Sets the timer to the moment when the first limited direction may continue.
    fn set_timer(&self) -> io::Result<()> {
        let now = Instant::now();
        let (receive, transmit) = &self.limits;
        let any = |limited: fn(&Pair<T>) -> bool| self.pairs.iter().any(limited);
        let receiving = any(|pair| pair.receiving == receive::Ended::Limited);
        let sending = any(|pair| pair.sending == transmit::Ended::Limited);
        let waits = [receiving.then(|| receive.wait(now)), sending.then(|| transmit.wait(now))];
        // A wait that has just ended still gets a short timer.
        let wait = waits.into_iter().flatten().map(Option::unwrap_or_default).min();
        let wait = wait.unwrap_or_default().max(Duration::from_millis(1));
        let it_value = Timespec::try_from(wait).map_err(io::Error::other)?;
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(
            &self.timer,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval, it_value },
        )?;
        Ok(())
    }
}

impl<T> fmt::Debug for Net<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).field("pairs", &self.pairs.len()).finish()
    }
}
