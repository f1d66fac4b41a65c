//! A virtual processor: the loop around KVM_RUN, and stopping it from outside.
//!
//! A signal interrupts a processor that runs the guest or sleeps in the kernel. The signal can
//! arrive between the check of the gate and KVM_RUN, so a pause repeats it until every processor
//! waits at the gate.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, Effect};
use crate::control::Ending;

/// How long a pause waits before it signals again.
const KICK_INTERVAL: Duration = Duration::from_millis(1);
/// Virtual size of the stack; only touched pages cost memory.
const STACK_BYTES: usize = 256 << 10;

/// What to do after an exit from the guest.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    Continue,
    End(Ending),
}

/// Decides what one exit means.
fn dispatch(exit: VcpuExit<'_>, bus: &Bus) -> Action {
    match exit {
        VcpuExit::MmioRead(address, data) => bus.memory_read(address, data),
        VcpuExit::MmioWrite(address, data) => bus.memory_write(address, data),
        VcpuExit::IoIn(port, data) => bus.port_read(port, data),
        VcpuExit::IoOut(port, data) => {
            if bus.port_write(port, data) == Effect::Reset {
                return Action::End(Ending::Reset);
            }
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        // A triple fault, which is also how a kernel without a keyboard controller reboots.
        VcpuExit::Shutdown => return Action::End(Ending::Reset),
        VcpuExit::FailEntry(reason, cpu) => {
            let reason = format!("processor {cpu} refuses to enter the guest: {reason:#x}");
            return Action::End(Ending::Fault { reason });
        }
        other => return Action::End(Ending::Fault { reason: format!("KVM exit {other:?}") }),
    }
    Action::Continue
}

/// The gate, where processors wait while the machine is paused, and record why it ended.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    ended: EventFd,
}

#[derive(Debug, Default)]
struct GateState {
    paused: bool,
    standing: usize,
    ending: Option<Ending>,
}

impl Gate {
    /// A gate that starts closed.
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let state = GateState { paused: true, ..GateState::default() };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Ok(Arc::new(Self { state, changed, ended: EventFd::new(0)? }))
    }

    /// Readable once the machine has ended.
    pub(crate) fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// Why the machine ended.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.lock().ending.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the machine may run; `false` when it has ended.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.paused && state.ending.is_none() {
            state.standing += 1;
            self.changed.notify_all();
            while state.paused && state.ending.is_none() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.standing -= 1;
        }
        state.ending.is_none()
    }

    /// Records why the machine ended; the first reason counts.
    fn end(&self, ending: Ending) {
        let mut state = self.lock();
        if state.ending.is_none() {
            state.ending = Some(ending);
            self.changed.notify_all();
            if let Err(error) = self.ended.write(1) {
                log::error!("cannot report the end of the machine: {error}");
            }
        }
    }
}

/// All processors of a machine.
#[derive(Debug)]
pub(crate) struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// No processors yet.
    pub(crate) fn new(gate: &Arc<Gate>) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick)?;
        Ok(Self { gate: Arc::clone(gate), threads: Vec::new() })
    }

    /// How many there are; the next one has this number.
    pub(crate) fn count(&self) -> u8 {
        u8::try_from(self.threads.len()).unwrap_or(u8::MAX)
    }

    /// Starts the thread of the next processor. It waits at the gate while the machine is paused;
    /// otherwise it waits in KVM until the guest starts it.
    pub(crate) fn add(&mut self, mut vcpu: VcpuFd, bus: &Arc<Bus>) -> io::Result<()> {
        let (bus, gate) = (Arc::clone(bus), Arc::clone(&self.gate));
        let thread = thread::Builder::new()
            .name(format!("vcpu{}", self.threads.len()))
            .stack_size(STACK_BYTES)
            .spawn(move || run(&mut vcpu, &bus, &gate))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Stops every processor; returns when all wait at the gate.
    pub(crate) fn pause(&self) {
        let mut state = self.gate.lock();
        state.paused = true;
        while state.standing < self.threads.len() && state.ending.is_none() {
            for thread in &self.threads {
                if let Err(error) = thread.kill(SIGRTMIN()) {
                    log::warn!("cannot signal a processor: {error}");
                }
            }
            let waited = self.gate.changed.wait_timeout(state, KICK_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets every processor run.
    pub(crate) fn resume(&self) {
        self.gate.lock().paused = false;
        self.gate.changed.notify_all();
    }
}

/// Exists to interrupt KVM_RUN, which an ignored signal would not do.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn run(vcpu: &mut VcpuFd, bus: &Bus, gate: &Gate) {
    while gate.pass() {
        bus.count_exit();
        let action = match vcpu.run() {
            Ok(exit) => dispatch(exit, bus),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Action::Continue,
            Err(error) => Action::End(Ending::Fault { reason: format!("KVM_RUN: {error}") }),
        };
        if let Action::End(ending) = action {
            gate.end(ending);
        }
    }
}
