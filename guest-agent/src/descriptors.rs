//! A process's descriptors beyond its standard streams, which correspond to descriptors of the
//! host. For an end of a pipe or a socket, one is made in the guest, and a raw vsock stream carries
//! its bytes. A file of the share or a device is opened here, as it is open on the host.
//!
//! A socket is relayed both ways, and each direction ends by itself. When its last holder in the
//! container closes it the connection ends as a whole, so that the host can tell that from the end
//! of one direction.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Component, Path};

use bulkhead_protocol::agent::descriptor::Kind as Asked;
use bulkhead_protocol::agent::{Descriptor, SharedFile};
use bulkhead_protocol::{DESCRIPTORS_MAX, SHARE_DIR, StreamHeader};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio_vsock::VsockStream;

use crate::io::{self as streams, Meeting, StreamError, StreamKind};

/// The flags that a file may be opened with: those about its use, not those that change it.
const KEPT: OFlags = OFlags::RWMODE
    .union(OFlags::APPEND)
    .union(OFlags::NONBLOCK)
    .union(OFlags::SYNC)
    .union(OFlags::DIRECTORY);

/// The agent's ends of a process's descriptors, those that are streams.
#[derive(Debug)]
pub(crate) struct Relays(Vec<Relay>);

#[derive(Debug)]
struct Relay {
    name: StreamKind,
    header: StreamHeader,
    end: End,
}

/// The agent's end of a descriptor.
#[derive(Debug)]
enum End {
    /// The process reads.
    Reading(pipe::Sender),
    /// The process writes.
    Writing(pipe::Receiver),
    /// It does both.
    Socket(UnixStream),
}

/// Makes, or opens, what is asked for; returns the process's descriptors in their order.
///
/// # Errors
/// There are too many, one is not there, or the guest has no descriptors left.
pub(crate) fn prepare(asked: &[Descriptor]) -> Result<(Relays, Vec<OwnedFd>), StreamError> {
    if asked.len() > DESCRIPTORS_MAX {
        return Err(StreamError::TooMany(asked.len()));
    }
    let (mut relays, mut theirs) = (Vec::new(), Vec::with_capacity(asked.len()));
    for (descriptor, number) in asked.iter().zip(3..) {
        let name = StreamKind::Descriptor(number);
        let failed = |source| StreamError::Pipe { stream: name, source };
        let flags = OFlags::from_bits_retain(descriptor.flags);
        let kind = descriptor.kind.as_ref().ok_or(StreamError::NoKind { stream: name })?;
        let (header, made) = match kind {
            Asked::Reading(header) => (header, new_pipe().and_then(reading)),
            Asked::Writing(header) => (header, new_pipe().and_then(writing)),
            Asked::Socket(header) => (header, new_socket()),
            Asked::File(file) => {
                theirs.push(open_shared(file, flags & KEPT).map_err(failed)?);
                continue;
            }
            Asked::Device(path) => {
                let opened = open(path, (flags & KEPT) | OFlags::CLOEXEC, Mode::empty());
                theirs.push(opened.map_err(|error| failed(error.into()))?);
                continue;
            }
        };
        let length = header.len();
        let header =
            StreamHeader::from_bytes(header).ok_or(StreamError::Header { stream: name, length })?;
        let (end, their_end) = made.map_err(failed)?;
        if flags.contains(OFlags::NONBLOCK) {
            let set = fcntl_getfl(&their_end)
                .and_then(|own| fcntl_setfl(&their_end, own | OFlags::NONBLOCK));
            set.map_err(|error| failed(error.into()))?;
        }
        relays.push(Relay { name, header, end });
        theirs.push(their_end);
    }
    Ok((Relays(relays), theirs))
}

/// Whether any of them comes from the share.
pub(crate) fn has_files(asked: &[Descriptor]) -> bool {
    asked.iter().any(|descriptor| matches!(descriptor.kind, Some(Asked::File(_))))
}

impl Relays {
    /// Waits for the streams' connections and starts to copy. The copies end by themselves, as those
    /// of standard streams.
    ///
    /// # Errors
    /// A connection does not come in time.
    pub(crate) async fn connect(self, meeting: &Meeting<VsockStream>) -> Result<(), StreamError> {
        let mut connected = Vec::with_capacity(self.0.len());
        for Relay { name, header, end } in self.0 {
            connected.push((name, meeting.claim(header, name).await?, end));
        }
        for (name, connection, end) in connected {
            match end {
                End::Reading(pipe) => drop(tokio::spawn(streams::feed(name, connection, pipe))),
                End::Writing(pipe) => drop(tokio::spawn(drain(name, pipe, connection))),
                End::Socket(socket) => drop(tokio::spawn(exchange(name, socket, connection))),
            }
        }
        Ok(())
    }
}

fn new_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

fn reading((reader, writer): (OwnedFd, OwnedFd)) -> io::Result<(End, OwnedFd)> {
    Ok((End::Reading(pipe::Sender::from_owned_fd(writer)?), reader))
}

fn writing((reader, writer): (OwnedFd, OwnedFd)) -> io::Result<(End, OwnedFd)> {
    Ok((End::Writing(pipe::Receiver::from_owned_fd(reader)?), writer))
}

fn new_socket() -> io::Result<(End, OwnedFd)> {
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((End::Socket(UnixStream::from_std(ours)?), theirs.into()))
}

/// Opens a file of the share through a mount of its own. Nothing of the share is above it, so that
/// no path that begins at it leads to other containers' files.
fn open_shared(file: &SharedFile, flags: OFlags) -> io::Result<OwnedFd> {
    let path = Path::new(&file.path);
    if !path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let alone = open_tree(CWD, Path::new(SHARE_DIR).join(path), clone)?;
    let path = format!("/proc/self/fd/{}", alone.as_raw_fd());
    let opened = File::from(open(path, flags | OFlags::CLOEXEC, Mode::empty())?);
    if !flags.contains(OFlags::DIRECTORY) {
        (&opened).seek(SeekFrom::Start(file.offset))?;
    }
    Ok(opened.into())
}

/// Copies what a process writes to the host, and closes the pipe when the host does not read any
/// more.
async fn drain(name: StreamKind, mut pipe: pipe::Receiver, connection: VsockStream) {
    let (mut input, mut output) = tokio::io::split(connection);
    let mut nothing = [0; 1];
    let drained = tokio::select! {
        drained = streams::copy(&mut pipe, &mut output) => drained,
        // The host never sends anything, so it has closed the connection.
        _ = input.read(&mut nothing) => Err(io::ErrorKind::BrokenPipe.into()),
    };
    let whole = drained.is_ok();
    streams::log_end(name, drained);
    drop(pipe);
    if whole {
        streams::finish(input.unsplit(output)).await;
    }
}

/// Copies both ways until both have ended, or the process has closed its end, or the host its own.
async fn exchange(name: StreamKind, mut socket: UnixStream, connection: VsockStream) {
    let hang_up = match HangUp::of(&socket) {
        Ok(hang_up) => hang_up,
        Err(error) => return streams::log_end(name, Err(error)),
    };
    let (mut from_process, mut to_process) = socket.split();
    let (mut input, mut output) = tokio::io::split(connection);
    {
        let inward = async {
            let copied = streams::copy(&mut input, &mut to_process).await;
            // The process may have closed it.
            let _ = to_process.shutdown().await;
            copied
        };
        let outward = async {
            streams::copy(&mut from_process, &mut output).await?;
            if hang_up.is_there() { Ok(()) } else { output.shutdown().await }
        };
        tokio::pin!(inward, outward);
        let (mut all_in, mut all_out) = (false, false);
        while !(all_in && all_out) {
            tokio::select! {
                // An error is ignored: the host may send too late.
                _ = &mut inward, if !all_in => all_in = true,
                copied = &mut outward, if !all_out => {
                    all_out = true;
                    if copied.is_err() {
                        streams::log_end(name, copied);
                        break;
                    }
                }
                () = hang_up.comes(), if all_out => break,
            }
        }
    }
    // Both directions at once; what was sent before still arrives.
    let _ = input.unsplit(output).shutdown(Shutdown::Both);
}

/// Detects that a socket's other side is closed as a whole, not only shut down in one direction.
struct HangUp(pipe::Sender);

impl HangUp {
    fn of(socket: &UnixStream) -> io::Result<Self> {
        use std::os::fd::AsFd as _;
        // A descriptor of its own, watched as if it were the write end of a pipe: of all read
        // events, only the hang-up is reported to it.
        let own = socket.as_fd().try_clone_to_owned()?;
        Ok(Self(pipe::Sender::from_owned_fd_unchecked(own)?))
    }

    fn is_there(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut watched = [PollFd::new(&self.0, PollFlags::empty())];
        poll(&mut watched, Some(&now)).is_ok() && watched[0].revents().contains(PollFlags::HUP)
    }

    async fn comes(&self) {
        // Fails only without a runtime.
        let _ = self.0.ready(Interest::READABLE).await;
    }
}

#[cfg(test)]
mod tests;
