//! The monitor: takes its configuration, locks itself up, builds the machine and serves the
//! control socket until the machine ends or the supervisor goes away.

use std::error::Error as StdError;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::config::VmConfig;
use crate::control::{Answer, Call, Ending, Event, Refusal, Reply, Request, VERSION};
use crate::devices::virtio::vsock::OpenRequest;
use crate::jail::{self, descriptors};
use crate::logging;
use crate::seqpacket::{self, Message};
use crate::vm::{Descriptors, Machine};

/// Why the monitor ended before its machine did.
#[derive(Debug, Error)]
enum MonitorError {
    /// The supervisor closed the socket without a configuration.
    #[error("received no configuration")]
    Unconfigured,
    /// The socket failed.
    #[error("control socket")]
    Socket(#[from] io::Error),
    /// The machine was not built; the supervisor has been told.
    #[error("cannot start the machine: {0}")]
    NotStarted(Refusal),
}

/// The whole life of the process `bulkhead-vmm`.
#[must_use]
pub fn main() -> ExitCode {
    logging::start();
    let Some(control) = descriptors::inherited_control() else { return ExitCode::FAILURE };
    match run(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::report(&error);
            ExitCode::FAILURE
        }
    }
}

/// Serves one machine from the first message to the end.
fn run(control: OwnedFd) -> Result<(), MonitorError> {
    let message = seqpacket::receive(&control)?.ok_or(MonitorError::Unconfigured)?;
    let machine = match start(message) {
        Ok(machine) => machine,
        Err(error) => {
            let refusal = refusal(error.as_ref());
            answer(control.as_fd(), 0, Err(refusal.clone()), None)?;
            return Err(MonitorError::NotStarted(refusal));
        }
    };
    answer(control.as_fd(), 0, Ok(Reply::Done), None)?;
    Monitor { control: Arc::new(control), machine }.serve()
}

fn start(message: Message) -> Result<Machine, Box<dyn StdError>> {
    let fds = Descriptors::new(message.descriptors);
    let config = VmConfig::from_json(&message.bytes, fds.len())?;
    jail::enter(config.jail)?;
    let machine = Machine::build(&config, fds)?;
    machine.resume();
    Ok(machine)
}

struct Monitor {
    control: Arc<OwnedFd>,
    machine: Machine,
}

/// What the loop should do after a call.
#[derive(PartialEq, Eq)]
enum Next {
    Serve,
    Exit,
}

impl Monitor {
    const CONTROL: u64 = 0;
    const ENDED: u64 = 1;

    fn serve(&mut self) -> Result<(), MonitorError> {
        let epoll = Epoll::new()?;
        let watch = |fd, token| {
            let event = EpollEvent::new(EventSet::IN, token);
            epoll.ctl(ControlOperation::Add, fd, event)
        };
        watch(self.control.as_raw_fd(), Self::CONTROL)?;
        watch(self.machine.gate().ended().as_raw_fd(), Self::ENDED)?;
        loop {
            let mut events = [EpollEvent::default()];
            match epoll.wait(self.expire_opens(), &mut events) {
                Ok(0) => continue,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            let [event] = events;
            if event.data() == Self::ENDED {
                return self.report_ending();
            }
            let Some(message) = seqpacket::receive(&*self.control)? else { return Ok(()) };
            if self.call(message)? == Next::Exit {
                return Ok(());
            }
        }
    }

    /// Fails requests for streams that are past their deadline while no driver serves them. Returns
    /// the milliseconds until the next deadline, -1 for none.
    fn expire_opens(&self) -> i32 {
        let now = Instant::now();
        let next = self.machine.opener().and_then(|opener| opener.expire(now));
        next.map_or(-1, |deadline| {
            let wait = deadline.saturating_duration_since(now) + Duration::from_millis(1);
            i32::try_from(wait.as_millis()).unwrap_or(i32::MAX)
        })
    }

    fn call(&mut self, message: Message) -> Result<Next, MonitorError> {
        let mut fds = Descriptors::new(message.descriptors);
        let call: Call = match serde_json::from_slice(&message.bytes) {
            Ok(call) => call,
            Err(error) => {
                // Without a number there is nobody to answer.
                log::error!("cannot read a call: {error}");
                return Ok(Next::Serve);
            }
        };
        let result = match call.request {
            Request::OpenStream { port, timeout_ms } => {
                self.open_stream(call.number, port, Duration::from_millis(timeout_ms.into()));
                return Ok(Next::Serve);
            }
            Request::Stop => {
                answer(self.control.as_fd(), call.number, Ok(Reply::Done), None)?;
                return Ok(Next::Exit);
            }
            request => self.answer(request, &mut fds),
        };
        answer(self.control.as_fd(), call.number, result, None)?;
        Ok(Next::Serve)
    }

    fn answer(&mut self, request: Request, fds: &mut Descriptors) -> Result<Reply, Refusal> {
        match request {
            Request::Version => {
                let monitor = env!("CARGO_PKG_VERSION").to_owned();
                return Ok(Reply::Version { control: VERSION, monitor });
            }
            Request::Statistics => return Ok(Reply::Statistics(self.machine.statistics())),
            Request::Pause => self.machine.pause(),
            Request::Resume => self.machine.resume(),
            Request::Attach { slot, device } => {
                device.validate("device", fds.len()).map_err(|error| refusal(&error))?;
                self.machine.attach(slot, &device, fds).map_err(|error| refusal(&error))?;
            }
            Request::Detach { slot } => {
                self.machine.detach(slot).map_err(|error| refusal(&error))?;
            }
            Request::Link { slot, up } => {
                self.machine.set_link(slot, up).map_err(|error| refusal(&error))?;
            }
            Request::Balloon { target_mib } => {
                let balloon = self.machine.balloon();
                let balloon = balloon.ok_or_else(|| said("the machine has no balloon"))?;
                balloon.set_target_mib(target_mib).map_err(|error| refusal(&error))?;
            }
            Request::Plug { target_mib } => {
                self.machine.plug(target_mib).map_err(|error| refusal(&error))?;
            }
            Request::PlugHuge { pages } => {
                let mib = self.machine.plug_huge(pages).map_err(|error| refusal(&error))?;
                return Ok(Reply::Plugging { mib });
            }
            Request::Processors { count } => {
                self.machine.add_processors(count).map_err(|error| refusal(&error))?;
            }
            // Answered by the caller of this function.
            Request::OpenStream { .. } | Request::Stop => {}
        }
        Ok(Reply::Done)
    }

    /// The answer comes from the device's thread, when the guest has accepted.
    fn open_stream(&self, number: u64, port: u32, timeout: Duration) {
        let control = Arc::clone(&self.control);
        let reply = move |result: Result<OwnedFd, String>| {
            let sent = match result {
                Ok(stream) => {
                    answer(control.as_fd(), number, Ok(Reply::Stream), Some(stream.as_fd()))
                }
                Err(message) => answer(control.as_fd(), number, Err(Refusal { message }), None),
            };
            if let Err(error) = sent {
                log::error!("cannot send an answer: {error}");
            }
        };
        let Some(opener) = self.machine.opener() else {
            return reply(Err("the machine has no vsock device".into()));
        };
        opener.open(OpenRequest {
            port,
            deadline: Instant::now() + timeout,
            answer: Box::new(move |result| {
                reply(result.map_err(|error| format!("guest port {port}: {error}")));
            }),
        });
    }

    fn report_ending(&self) -> Result<(), MonitorError> {
        let mut console = self.machine.bus().console();
        let console_tail = console.finish();
        let ended = match self.machine.gate().ending() {
            Some(Ending::Reset) if console.panicked() => Ending::Panic,
            Some(ending) => ending,
            None => Ending::Fault { reason: "no ending was recorded".into() },
        };
        let json = serde_json::to_vec(&Event { ended, console_tail }).map_err(io::Error::other)?;
        Ok(seqpacket::send(&*self.control, &json, &[])?)
    }
}

fn answer(
    control: BorrowedFd<'_>,
    number: u64,
    result: Result<Reply, Refusal>,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let json = serde_json::to_vec(&Answer { number, result }).map_err(io::Error::other)?;
    seqpacket::send(control, &json, descriptor.as_slice())
}

fn said(message: &str) -> Refusal {
    Refusal { message: message.into() }
}

fn refusal(error: &dyn StdError) -> Refusal {
    said(&logging::chain(error))
}
