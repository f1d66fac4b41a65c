//! The thread that serves one device.
//!
//! On activation a device's logic moves into its thread; on reset it comes back. Only the thread
//! has it meanwhile, so there is no lock around a device. An activation that fails leaves the logic
//! where it was, and the driver may reset the device and try again. The thread waits in epoll for
//! kicks, for the host-side descriptors that the logic registered, and for the order to stop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::queue::DeviceQueue;
use super::{Activation, Context, Ready, Serve};
use crate::devices::rate_limit::guest_warn;
use crate::memory::Memory;

/// Token space of a worker's epoll: queues from 0, sources from here, the stop order last.
const SOURCE_BASE: u64 = 1 << 32;
const STOP: u64 = u64::MAX;
/// How many events one wait returns.
const EVENTS_MAX: usize = 16;
/// Virtual size of a worker's stack; only touched pages cost memory.
const STACK_BYTES: usize = 256 << 10;

/// The system calls of the loop itself, whatever the device.
#[expect(dead_code, reason = "for the seccomp filter, which is to come")]
pub(crate) const SYSCALLS: &[i64] = &[
    libc::SYS_epoll_wait,     // waiting
    libc::SYS_epoll_ctl,      // sources come and go
    libc::SYS_read,           // clearing kicks
    libc::SYS_write,          // raising interrupts
    libc::SYS_futex,          // locks of the configuration space
    libc::SYS_mmap,           // the allocator
    libc::SYS_munmap,         // the allocator
    libc::SYS_madvise,        // the allocator, and the stack of the thread
    libc::SYS_brk,            // the allocator
    libc::SYS_exit,           // the end of the thread
    libc::SYS_rt_sigprocmask, // the end of the thread
    libc::SYS_close,          // sources that ended
];

/// What a worker waits for beside its queues.
#[derive(Debug)]
pub(crate) struct Sources {
    epoll: Epoll,
}

impl Sources {
    /// An empty set.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()? })
    }

    /// Watches a descriptor; `token` comes back in [`Ready::Source`].
    pub(crate) fn add(&self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, EpollEvent::new(events, source(token)))
    }

    /// Changes what is watched for; an empty set still reports hang-ups.
    pub(crate) fn modify(&self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, EpollEvent::new(events, source(token)))
    }

    /// Stops watching a descriptor; closing the last copy of it does the same.
    pub(crate) fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, EpollEvent::default())
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        event: EpollEvent,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd.as_raw_fd(), event)
    }

    /// Watches what belongs to the worker itself.
    fn add_own(&self, fd: &EventFd, data: u64) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data))
    }
}

fn source(token: u32) -> u64 {
    SOURCE_BASE + u64::from(token)
}

/// Where a device's logic is.
pub(crate) enum Slot<S: Serve> {
    /// Waiting for the driver.
    Idle(S),
    /// On its thread.
    Running(Worker<S>),
    /// The thread did not come back: the device is dead.
    Lost,
}

impl<S: Serve> Slot<S> {
    /// Moves the logic to a thread of its own.
    pub(super) fn start(&mut self, activation: Activation) -> io::Result<()> {
        match std::mem::replace(self, Self::Lost) {
            Self::Idle(logic) => match Worker::spawn(logic, activation) {
                Ok(worker) => {
                    *self = Self::Running(worker);
                    Ok(())
                }
                Err((logic, error)) => {
                    *self = Self::Idle(logic);
                    Err(error)
                }
            },
            other => {
                *self = other;
                Err(io::Error::other("device is already running or lost"))
            }
        }
    }

    /// Brings the logic back.
    pub(super) fn stop(&mut self) {
        *self = match std::mem::replace(self, Self::Lost) {
            Self::Running(worker) => worker.stop().map_or(Self::Lost, Self::Idle),
            other => other,
        };
    }
}

/// A running thread.
pub(crate) struct Worker<S> {
    stop: Arc<EventFd>,
    thread: JoinHandle<Option<S>>,
}

impl<S: Serve> Worker<S> {
    /// Starts the thread; if that fails, stops the logic and returns it.
    fn spawn(mut logic: S, activation: Activation) -> Result<Self, (S, io::Error)> {
        let (stop, sources) = match watch(&activation.queues) {
            Ok(watched) => watched,
            Err(error) => return Err((logic, error)),
        };
        // If a thread cannot be started, what it was given is lost, so it gets the logic later.
        let (hand_over, handed_over) = mpsc::sync_channel(1);
        let begun = logic
            .start(activation.features, &sources)
            .and_then(|()| logic.delegate(&activation, &sources))
            .and_then(|()| start_thread(handed_over));
        let thread = match begun {
            Ok(thread) => thread,
            Err(error) => {
                logic.stop(&sources);
                return Err((logic, error));
            }
        };
        let Activation { memory, queues, .. } = activation;
        let serving = Loop { logic, memory, queues, sources, stop: Arc::clone(&stop) };
        match hand_over.send(serving) {
            Ok(()) => Ok(Self { stop, thread }),
            Err(mpsc::SendError(serving)) => {
                Err((serving.logic, io::Error::other("the device's thread has ended")))
            }
        }
    }

    fn stop(self) -> Option<S> {
        // The counter cannot overflow: it is written once.
        self.stop.write(1).ok()?;
        self.thread.join().ok().flatten()
    }
}

/// The eventfd of the stop order, and the epoll instance that waits for it and for kicks.
fn watch(queues: &[DeviceQueue]) -> io::Result<(Arc<EventFd>, Sources)> {
    // Blocking: a failed device waits by reading it.
    let stop = Arc::new(EventFd::new(0)?);
    let sources = Sources::new()?;
    sources.add_own(&stop, STOP)?;
    for (index, queue) in queues.iter().enumerate() {
        sources.add_own(queue.kick(), index as u64)?;
    }
    Ok((stop, sources))
}

/// Starts a thread that serves with the loop it is handed, and gives the logic back at the end.
fn start_thread<S: Serve>(
    handed_over: mpsc::Receiver<Loop<S>>,
) -> io::Result<JoinHandle<Option<S>>> {
    thread::Builder::new().name(S::NAME.into()).stack_size(STACK_BYTES).spawn(move || {
        let mut serving = handed_over.recv().ok()?;
        serving.run();
        serving.logic.stop(&serving.sources);
        Some(serving.logic)
    })
}

struct Loop<S> {
    logic: S,
    memory: Arc<Memory>,
    queues: Vec<DeviceQueue>,
    sources: Sources,
    stop: Arc<EventFd>,
}

impl<S: Serve> Loop<S> {
    fn run(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        loop {
            let ready = match self.sources.epoll.wait(-1, &mut events) {
                Ok(count) => events.get(..count).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("{}: waiting failed: {error}", S::NAME);
                    return self.wait_for_stop();
                }
            };
            for event in ready {
                let ready = match event.data() {
                    STOP => return,
                    token @ SOURCE_BASE.. => {
                        Ready::Source(u32::try_from(token - SOURCE_BASE).unwrap_or(u32::MAX))
                    }
                    token => Ready::Queue(usize::try_from(token).unwrap_or(usize::MAX)),
                };
                if !self.serve(ready) {
                    return self.wait_for_stop();
                }
            }
        }
    }

    /// Serves one event; `false` when the device has failed.
    fn serve(&mut self, ready: Ready) -> bool {
        if let Ready::Queue(index) = ready
            && let Some(queue) = self.queues.get(index)
        {
            // Nonblocking: a spurious wake-up finds nothing to clear.
            let _ = queue.kick().read();
            queue.line().count_notification();
        }
        let memory = self.memory.snapshot();
        let mut context =
            Context { memory: &memory, queues: &mut self.queues, sources: &self.sources };
        let Err(error) = self.logic.serve(ready, &mut context) else { return true };
        let source = std::error::Error::source(&error);
        guest_warn!("{}: device failed: {error}: {source:?}", S::NAME);
        if let Some(queue) = self.queues.first() {
            queue.line().fail();
        }
        false
    }

    /// A failed device does nothing until the driver resets it.
    fn wait_for_stop(&self) {
        while let Err(error) = self.stop.read() {
            if error.kind() != io::ErrorKind::Interrupted {
                log::error!("{}: waiting for the stop failed: {error}", S::NAME);
                return;
            }
        }
    }
}
