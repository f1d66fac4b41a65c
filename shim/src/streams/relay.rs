//! The process that stands for a container on the host: it owns the caller's standard streams,
//! relays them to the container's, passes signals on and ends with the container's exit status.
//!
//! It deliberately has no async runtime: it lives as long as the container and should cost next to
//! nothing. Each stream is copied by a thread of its own (`super::copy`).
//!
//! A stand-in that stays behind ends when the process has ended and its output was passed on. It
//! does not wait for other processes that have the same streams, nor for long for a reader that has
//! stopped: `super::linger` goes on for both. A stand-in in the foreground waits until its
//! streams end, as runc does.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_vmm::{jail, seqpacket};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat, major, minor};
use rustix::termios::isatty;

use super::attach::{FromStandIn, Said, ToStandIn, Wants, Written, connect_to};
use super::copy::{Copies, CopyId, Ends, Way};
use super::preserved::Preserved;
use super::terminal::Terminal;
use super::{linger, own_text};
use crate::state::Home;

/// How long after its streams are connected a stand-in gives its code back. By then its threads
/// have started and mostly the first output has come, which maps code again.
const SETTLED: Duration = Duration::from_secs(1);
/// How long a reader may pause before the end of the process is reported without waiting for it.
const QUIET: Duration = Duration::from_secs(1);
/// How long reading the process's output may take in total before its end is reported.
const LONGEST: Duration = Duration::from_secs(10);
/// No limit: a century.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// How long the end of a stream may take to arrive when no other process holds the stream.
const END: Duration = Duration::from_millis(100);
/// How long to wait for further bytes to come out of a machine.
const REST: Duration = Duration::from_millis(500);
/// The most bytes that are taken out of a machine for a reader that has stopped: more than a pipe
/// and the stream behind it hold.
const REST_MAX: usize = 4 << 20;
/// Signals that are not passed on: the kernel raises them because of this process itself, or the
/// program uses them itself.
const NOT_FORWARDED: [Signal; 12] = [
    Signal::SIGCHLD,
    Signal::SIGURG,
    Signal::SIGPIPE,
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGTRAP,
    Signal::SIGSYS,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGABRT,
];

/// The signal that tells of a terminal's new size.
const WINDOW_CHANGED: u32 = Signal::SIGWINCH as u32;

/// How a container ended, as its stand-in learns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The exit status to end with.
    pub status: u8,
    /// Why, if the container did not end by itself.
    pub reason: Option<String>,
}

/// The signals of this process, to be passed on.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks signals from now on; they wait to be read.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn hold() -> io::Result<Self> {
        let mut held = SigSet::all();
        for signal in NOT_FORWARDED {
            held.remove(signal);
        }
        held.thread_block()?;
        Ok(Self(SignalFd::with_flags(&held, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// The next signal, if one has come.
    ///
    /// # Errors
    /// Never in practice.
    pub fn next(&self) -> io::Result<Option<u32>> {
        Ok(self.0.read_signal()?.map(|info| info.ssi_signo))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A stand-in that has said which streams it has.
#[derive(Debug)]
pub struct Relay {
    supervisor: OwnedFd,
    wants: Wants,
    terminal: Option<Terminal>,
    preserved: Preserved,
    home: Option<Home>,
    detached: bool,
    /// The null device.
    null: OwnedFd,
}

/// What a stand-in has from its caller beside its standard streams.
#[derive(Debug, Default)]
pub struct Belongings {
    /// The terminal that the standard streams are, if they are one.
    pub terminal: Option<Terminal>,
    /// Further descriptors.
    pub preserved: Preserved,
    /// The directory of its container, which a stand-in and what it leaves behind keep open: by it
    /// they are found when the container's state is lost.
    pub home: Option<Home>,
}

/// The copies of a stand-in.
struct Streams {
    /// Of standard input, or of a terminal's input. Nobody waits for their end.
    input: Copies,
    /// Of everything else.
    copies: Copies,
    outputs: Outputs,
}

/// Which of the copies carry what the process writes.
#[derive(Default)]
struct Outputs {
    stdout: Option<CopyId>,
    stderr: Option<CopyId>,
    terminal: Option<CopyId>,
}

impl Relay {
    /// Connects this process's standard streams, and what else it has, to the supervisor at `socket`;
    /// `detached` is as in [`FromStandIn::Attach`].
    ///
    /// # Errors
    /// When no supervisor listens there.
    pub fn connect(socket: &Path, detached: bool, belongings: Belongings) -> io::Result<Self> {
        let Belongings { terminal, preserved, home } = belongings;
        let wants = match &terminal {
            Some(terminal) => Wants {
                terminal: Some(terminal.size()),
                plain: !isatty(io::stdout()),
                ..Wants::default()
            },
            None => Wants {
                terminal: None,
                plain: false,
                stdin: !is_null(io::stdin().as_fd()),
                stdout: !is_null(io::stdout().as_fd()),
                stderr: !is_null(io::stderr().as_fd()),
            },
        };
        let null = File::options().read(true).write(true).open("/dev/null")?.into();
        let supervisor = connect_to(socket)?;
        Ok(Self { supervisor, wants, terminal, preserved, home, detached, null })
    }

    /// Gives up access to the host's files: the caller takes the pid of this process for the
    /// container's, and whoever enters its namespaces then finds nothing. To be called in the main
    /// thread, whose namespaces these are.
    ///
    /// # Errors
    /// When the kernel does not let it.
    pub fn hide(&self) -> io::Result<()> {
        jail::hide().map_err(io::Error::other)
    }

    /// Says for which process it stands; `exec` is as in [`FromStandIn::Attach`].
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn attach(&self, exec: &str) -> io::Result<()> {
        let Self { wants, detached, preserved, .. } = self;
        let hello = FromStandIn::Attach {
            wants: *wants,
            exec: exec.to_owned(),
            detached: *detached,
            descriptors: preserved.list(),
        };
        seqpacket::send(&self.supervisor, &serde_json::to_vec(&hello)?, &preserved.mounts())
    }

    /// Relays until the process has ended and what it wrote has been passed on.
    ///
    /// # Errors
    /// When the supervisor goes away before.
    pub fn serve(mut self, signals: &Signals) -> io::Result<Ended> {
        let (mut streams, mut settled) = (None, None::<Instant>);
        loop {
            let mut ready =
                [PollFd::new(&self.supervisor, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
            let left = settled.map(|settled| settled.saturating_duration_since(Instant::now()));
            let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
            match poll(&mut ready, left.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) => {
                    // From here on it mostly waits, for as long as the container lives.
                    own_text::give_back();
                    settled = None;
                    continue;
                }
                other => other?,
            };
            if !ready[1].revents().is_empty() {
                self.pass_signals_on(signals)?;
                continue;
            }
            let message = seqpacket::receive(&self.supervisor)?;
            let message = message.ok_or_else(|| {
                io::Error::other("the supervisor is gone, and the container with it")
            })?;
            match serde_json::from_slice(&message.bytes)? {
                ToStandIn::Streams => {
                    streams = Some(self.relay(message.descriptors)?);
                    settled = self.detached.then(|| Instant::now() + SETTLED);
                }
                ToStandIn::Exited { status, reason, written } => {
                    if let Some(streams) = streams {
                        let written = if self.detached { written } else { None };
                        let (quiet, longest) = match self.detached {
                            true => (QUIET, LONGEST),
                            false => (FOREVER, FOREVER),
                        };
                        let home = self.home.as_ref().map(AsFd::as_fd);
                        streams.finish(written, (quiet, longest), (home, &self.null))?;
                    }
                    return Ok(Ended { status, reason });
                }
            }
        }
    }

    fn pass_signals_on(&self, signals: &Signals) -> io::Result<()> {
        while let Some(signal) = signals.next()? {
            self.say(&FromStandIn::Said(match &self.terminal {
                Some(terminal) if signal == WINDOW_CHANGED => Said::Resize(terminal.size()),
                _ => Said::Signal(signal),
            }))?;
        }
        Ok(())
    }

    fn say(&self, words: &FromStandIn) -> io::Result<()> {
        seqpacket::send(&self.supervisor, &serde_json::to_vec(words)?, &[])
    }

    /// Starts to copy.
    fn relay(&mut self, descriptors: Vec<OwnedFd>) -> io::Result<Streams> {
        let mut streams = descriptors.into_iter().map(UnixStream::from);
        let (mut input, mut copies) = (Copies::new(), Copies::new());
        let mut outputs = Outputs::default();
        let ends = |caller: OwnedFd, stream| Arc::new(Ends { caller, stream, socket: false });
        if let Some(terminal) = &mut self.terminal {
            let stream = streams.next().ok_or(ErrorKind::InvalidData)?;
            terminal.make_raw()?;
            input.start(ends(terminal.keyboard()?, stream.try_clone()?), Way::In)?;
            outputs.terminal = Some(copies.start(ends(terminal.screen()?, stream), Way::Out)?);
        } else {
            let mut next = |wanted: bool| if wanted { streams.next() } else { None };
            let (stdin, stdout, stderr) =
                (next(self.wants.stdin), next(self.wants.stdout), next(self.wants.stderr));
            if let Some(stream) = stdin {
                input.start(ends(io::stdin().as_fd().try_clone_to_owned()?, stream), Way::In)?;
            }
            let mut start = |own: BorrowedFd<'_>, stream: Option<UnixStream>| {
                let started =
                    |stream| copies.start(ends(own.try_clone_to_owned()?, stream), Way::Out);
                stream.map(started).transpose()
            };
            outputs.stdout = start(io::stdout().as_fd(), stdout)?;
            outputs.stderr = start(io::stderr().as_fd(), stderr)?;
        }
        self.preserved.relay(streams, &mut copies)?;
        if self.detached {
            // The copies have descriptors of their own; these would keep a stream open that the
            // container closes.
            rustix::stdio::dup2_stdin(&self.null)?;
            rustix::stdio::dup2_stdout(&self.null)?;
            rustix::stdio::dup2_stderr(&self.null)?;
        }
        Ok(Streams { input, copies, outputs })
    }
}

impl Streams {
    /// Waits until what the process wrote has been passed on, and leaves the rest to another process.
    fn finish(
        self,
        written: Option<Written>,
        (quiet, longest): (Duration, Duration),
        (home, null): (Option<BorrowedFd<'_>>, &OwnedFd),
    ) -> io::Result<()> {
        let Self { input, copies, outputs } = self;
        let Outputs { stdout, stderr, terminal } = outputs;
        // Without a number, wait for the end of the stream.
        let bytes = |of: fn(Written) -> u64| written.map_or(u64::MAX, of);
        let wanted = [(stdout, bytes(|it| it.stdout)), (stderr, bytes(|it| it.stderr))];
        let wanted = wanted.into_iter().chain([(terminal, u64::MAX)]);
        let wanted: Vec<_> = wanted.filter_map(|(copy, bytes)| Some((copy?, bytes))).collect();
        copies.wait(&wanted, quiet, longest);
        copies.wait(&copies.outputs(), END, END);
        // Input that a process did not read before it ended is lost.
        drop(input.halt()?);
        let mut left = copies.halt()?;
        for copy in &mut left {
            copy.take_rest(REST_MAX, REST);
        }
        linger::leave_behind(left, home, null)
    }
}

fn is_null(fd: BorrowedFd<'_>) -> bool {
    fstat(fd).map_or(true, |stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_null_device_is_no_stream() {
        let null = File::open("/dev/null").unwrap();
        assert!(is_null(null.as_fd()));
        assert!(!is_null(File::open("/dev/zero").unwrap().as_fd()));
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(!is_null(one.as_fd()));
    }

    #[test]
    fn a_supervisor_that_is_gone_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attach.sock");
        assert!(Relay::connect(&path, false, Belongings::default()).is_err());
        // A socket of another kind is none either.
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(Relay::connect(&path, false, Belongings::default()).is_err());
    }
}
