//! The process that stands for a container on the host: it owns the caller's standard streams,
//! relays them to the container's, passes signals on and ends with the container's exit status.
//!
//! Deliberately without a runtime: it lives as long as the container and should cost next to
//! nothing. Each stream is copied by a thread of its own.
//!
//! Copied through a buffer, although the kernel could splice: a splice that waits for the container
//! holds the lock of the caller's pipe meanwhile, and the caller's read of what has arrived already
//! waits for that lock, not even to be killed.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};

use bulkhead_vmm::seqpacket;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat, major, minor};

use crate::streams::attach::{FromStandIn, Said, ToStandIn, Wants, connect_to};
use crate::streams::own_text;
use crate::streams::preserved::Preserved;
use crate::streams::terminal::Terminal;

/// The most bytes that one step of a copy moves: what a pipe holds.
const CHUNK: usize = 64 << 10;
/// What the kernel raises in the process itself or for its own business: not passed on.
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
    /// Holds signals back from now on; they wait to be read.
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
    detached: bool,
}

/// What a stand-in has of its caller beside its standard streams.
#[derive(Debug, Default)]
pub struct Belongings {
    /// What the standard streams are, if they are one.
    pub terminal: Option<Terminal>,
    /// Further descriptors.
    pub preserved: Preserved,
}

impl Relay {
    /// Attaches this process's standard streams, and what else it has, at `socket`; `exec` and
    /// `detached` are as in [`FromStandIn::Attach`].
    ///
    /// # Errors
    /// When no supervisor listens there.
    pub fn attach(
        socket: &Path,
        exec: &str,
        detached: bool,
        belongings: Belongings,
    ) -> io::Result<Self> {
        let Belongings { terminal, preserved } = belongings;
        let wants = match &terminal {
            Some(terminal) => Wants { terminal: Some(terminal.size()), ..Wants::default() },
            None => Wants {
                terminal: None,
                stdin: !is_null(io::stdin().as_fd()),
                stdout: !is_null(io::stdout().as_fd()),
                stderr: !is_null(io::stderr().as_fd()),
            },
        };
        let supervisor = connect_to(socket)?;
        let (exec, descriptors) = (exec.to_owned(), preserved.list());
        let hello = FromStandIn::Attach { wants, exec, detached, descriptors };
        seqpacket::send(&supervisor, &serde_json::to_vec(&hello)?, &preserved.mounts())?;
        Ok(Self { supervisor, wants, terminal, preserved, detached })
    }

    /// Relays until the container has ended and everything that it wrote has been passed on.
    ///
    /// # Errors
    /// When the supervisor goes away before.
    pub fn serve(mut self, signals: &Signals) -> io::Result<Ended> {
        let mut outputs = Vec::new();
        loop {
            let mut ready =
                [PollFd::new(&self.supervisor, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
            match poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            if !ready[1].revents().is_empty() {
                while let Some(signal) = signals.next()? {
                    self.say(&FromStandIn::Said(match &self.terminal {
                        Some(terminal) if signal == WINDOW_CHANGED => Said::Resize(terminal.size()),
                        _ => Said::Signal(signal),
                    }))?;
                }
            }
            if ready[0].revents().is_empty() {
                continue;
            }
            let message = seqpacket::receive(&self.supervisor)?;
            let message = message.ok_or_else(|| {
                io::Error::other("the supervisor is gone, and the container with it")
            })?;
            match serde_json::from_slice(&message.bytes)? {
                ToStandIn::Streams => {
                    outputs = self.relay(message.descriptors)?;
                    if self.detached {
                        // From here on it mostly waits, for as long as the container lives.
                        own_text::give_back();
                    }
                }
                ToStandIn::Exited { status, reason } => {
                    for output in outputs {
                        // A thread that failed has nothing more to pass on.
                        let _ = output.join();
                    }
                    return Ok(Ended { status, reason });
                }
            }
        }
    }

    fn say(&self, words: &FromStandIn) -> io::Result<()> {
        seqpacket::send(&self.supervisor, &serde_json::to_vec(words)?, &[])
    }

    /// Starts copying; gives the threads that copy what the container writes.
    fn relay(&mut self, descriptors: Vec<OwnedFd>) -> io::Result<Vec<JoinHandle<()>>> {
        let mut streams = descriptors.into_iter().map(UnixStream::from);
        if let Some(terminal) = &mut self.terminal {
            let stream = streams.next().ok_or(ErrorKind::InvalidData)?;
            terminal.make_raw()?;
            start_feeding(terminal.keyboard()?, stream.try_clone()?)?;
            let mut outputs = vec![start_draining(stream, terminal.screen()?)?];
            outputs.extend(self.preserved.relay(streams)?);
            return Ok(outputs);
        }
        let mut next = |wanted: bool| if wanted { streams.next() } else { None };
        let (stdin, stdout, stderr) =
            (next(self.wants.stdin), next(self.wants.stdout), next(self.wants.stderr));
        if let Some(stream) = stdin {
            start_feeding(io::stdin().as_fd().try_clone_to_owned()?, stream)?;
        }
        let mut outputs = Vec::new();
        for (stream, own) in [(stdout, io::stdout().as_fd()), (stderr, io::stderr().as_fd())] {
            let Some(stream) = stream else { continue };
            outputs.push(start_draining(stream, own.try_clone_to_owned()?)?);
        }
        outputs.extend(self.preserved.relay(streams)?);
        Ok(outputs)
    }
}

fn start_feeding(source: OwnedFd, stream: UnixStream) -> io::Result<()> {
    let feed = move || feed(File::from(source), &stream);
    thread::Builder::new().name("stdin".into()).spawn(feed).map(drop)
}

fn start_draining(stream: UnixStream, sink: OwnedFd) -> io::Result<JoinHandle<()>> {
    let drain = move || drain(&stream, File::from(sink));
    thread::Builder::new().name("output".into()).spawn(drain)
}

/// Copies standard input to the container, and its end.
fn feed(mut source: File, stream: &UnixStream) {
    // Both ends of this copy may fail at any time: the caller's input, or a container that reads no
    // further. Either way there is nothing more to pass on.
    let _ = pass_on(&mut source, &mut &*stream);
    let _ = stream.shutdown(Shutdown::Write);
}

/// Copies what the container writes. When nobody reads it any more the container learns it as from
/// a closed pipe.
fn drain(stream: &UnixStream, mut sink: File) {
    if let Err(error) = pass_on(&mut &*stream, &mut sink)
        && error.kind() != ErrorKind::ConnectionReset
    {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Copies until the end of `from`.
fn pass_on(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(buffer.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
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
    use std::sync::mpsc;
    use std::time::Duration;

    /// A container whose output is passed on, and where it arrives.
    fn draining() -> (UnixStream, io::PipeReader, JoinHandle<()>) {
        let (container, stream) = UnixStream::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let thread = thread::spawn(move || drain(&stream, File::from(OwnedFd::from(writer))));
        (container, reader, thread)
    }

    #[test]
    fn input_reaches_the_container_to_its_end() {
        let (container, stream) = UnixStream::pair().unwrap();
        let mut source = tempfile::tempfile().unwrap();
        source.write_all(&[7; 300_000]).unwrap();
        io::Seek::rewind(&mut source).unwrap();
        let feeding = thread::spawn(move || feed(source, &stream));
        let mut received = Vec::new();
        (&container).read_to_end(&mut received).unwrap();
        assert_eq!(received, vec![7; 300_000]);
        feeding.join().unwrap();
    }

    #[test]
    fn a_container_whose_output_nobody_reads_learns_it() {
        let (mut container, reader, draining) = draining();
        drop(reader);
        // The first byte shows that nobody reads, unless the pipe has shown it before.
        let _ = container.write_all(b"x");
        draining.join().unwrap();
        let error = container.write_all(b"y").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn output_is_passed_on_to_its_end() {
        let (mut container, mut reader, draining) = draining();
        container.write_all(b"all of it").unwrap();
        drop(container);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all of it");
        draining.join().unwrap();
    }

    #[test]
    fn a_reader_is_not_held_up_while_the_container_is_silent() {
        let (mut container, mut reader, draining) = draining();
        container.write_all(b"x").unwrap();
        reader.read_exact(&mut [0]).unwrap();
        // Time for the copy to wait for more.
        thread::sleep(Duration::from_millis(100));
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let (sender, receiver) = mpsc::channel();
        let reading = thread::spawn(move || sender.send(reader.read(&mut [0])));
        let read = receiver.recv_timeout(Duration::from_secs(5));
        // The end frees a reader that was held up.
        drop(container);
        draining.join().unwrap();
        reading.join().unwrap().unwrap();
        assert_eq!(read.unwrap().unwrap_err().kind(), ErrorKind::WouldBlock);
    }

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
        assert!(Relay::attach(&path, "", false, Belongings::default()).is_err());
        // A socket of another kind is none either.
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(Relay::attach(&path, "", false, Belongings::default()).is_err());
    }
}
