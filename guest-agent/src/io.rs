//! Streams of processes: one raw vsock connection each, matched by its [`StreamHeader`] to the process
//! that it belongs to, and copied from or to that process's pipe with half-close in both directions.
//!
//! A connection and the call that names it may come in either order; each waits [`PATIENCE`] for
//! the other. Connections that no call has claimed are few ([`UNCLAIMED`]) and are closed after
//! that time, whether they have sent a header or not. The bytes themselves are not interpreted.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bulkhead_protocol::{DESCRIPTORS_MAX, StreamHeader};
use rustix::io::ioctl_fionread;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use tokio_vsock::{VsockListener, VsockStream};

/// How long a connection waits for its call, and a call for its connection.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The most connections that no call has claimed: those of a few processes with all the streams
/// that one can have.
pub(crate) const UNCLAIMED: usize = 4 * (DESCRIPTORS_MAX + 3);
/// The most bytes that one step of a copy moves: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// A named stream did not become a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("{stream} has a header of {length} bytes, not {}", StreamHeader::LEN)]
    Header { stream: StreamKind, length: usize },
    #[error("{stream} has the header of another stream")]
    Taken { stream: StreamKind },
    #[error("{stream} was not connected in {} seconds", PATIENCE.as_secs())]
    Missing { stream: StreamKind },
    #[error("cannot make or open {stream}")]
    Pipe { stream: StreamKind, source: io::Error },
    #[error("{stream} has an unknown kind")]
    NoKind { stream: StreamKind },
    #[error("{0} descriptors; a process gets {DESCRIPTORS_MAX} at most")]
    TooMany(usize),
}

/// Which of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamKind {
    Stdin,
    Stdout,
    Stderr,
    /// All three, see [`crate::terminal`].
    Terminal,
    /// A descriptor beyond them, see [`crate::descriptors`].
    Descriptor(u32),
    /// Not a process's, see [`crate::notify`].
    Notify,
    /// As well, see [`crate::host_sockets`].
    HostSocket,
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Terminal => "terminal",
            Self::Notify => "stream of sd_notify",
            Self::HostSocket => "connection to a socket of the host",
            Self::Descriptor(number) => return write!(f, "descriptor {number}"),
        })
    }
}

/// The connections and calls that wait for each other. Clones share one table.
#[derive(Debug)]
pub(crate) struct Meeting<S>(Arc<Mutex<HashMap<StreamHeader, Waiting<S>>>>);

/// One side that waits for the other.
#[derive(Debug)]
enum Waiting<S> {
    Call(oneshot::Sender<S>),
    // The permit bounds how many there are.
    Connection(S, #[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit),
}

/// Takes a call out of the table again, however its wait ends.
struct OpenCall<'a, S> {
    meeting: &'a Meeting<S>,
    header: StreamHeader,
}

impl<S> Drop for OpenCall<'_, S> {
    fn drop(&mut self) {
        let mut table = self.meeting.table();
        if let Some(connection @ Waiting::Connection(..)) = table.remove(&self.header) {
            table.insert(self.header, connection);
        }
    }
}

impl<S> Clone for Meeting<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Default for Meeting<S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<S> Meeting<S> {
    /// Waits for the connection that `header` names.
    ///
    /// # Errors
    /// Another call waits for it already, or it does not come in [`PATIENCE`].
    pub(crate) async fn claim(
        &self,
        header: StreamHeader,
        stream: StreamKind,
    ) -> Result<S, StreamError> {
        let receiver = {
            let mut table = self.table();
            match table.remove(&header) {
                Some(Waiting::Connection(connection, _)) => return Ok(connection),
                Some(call @ Waiting::Call(_)) => {
                    table.insert(header, call);
                    return Err(StreamError::Taken { stream });
                }
                None => {}
            }
            let (sender, receiver) = oneshot::channel();
            table.insert(header, Waiting::Call(sender));
            receiver
        };
        let _call = OpenCall { meeting: self, header };
        match timeout(PATIENCE, receiver).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(_)) | Err(_) => Err(StreamError::Missing { stream }),
        }
    }

    /// Hands a connection to the call that waits for it, or keeps it for [`PATIENCE`].
    async fn offer(&self, header: StreamHeader, connection: S, permit: OwnedSemaphorePermit) {
        {
            let mut table = self.table();
            match table.remove(&header) {
                Some(Waiting::Call(call)) => {
                    // A call that has just given up drops it, which closes it.
                    let _ = call.send(connection);
                    return;
                }
                Some(first @ Waiting::Connection(..)) => {
                    tracing::warn!("a second connection for one stream was closed");
                    table.insert(header, first);
                    return;
                }
                None => table.insert(header, Waiting::Connection(connection, permit)),
            };
        }
        sleep(PATIENCE).await;
        let mut table = self.table();
        if let Some(call @ Waiting::Call(_)) = table.remove(&header) {
            table.insert(header, call);
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<StreamHeader, Waiting<S>>> {
        // Nothing panics while it holds the lock, so the table is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts the streams that come from the vsock address `host`, for ever.
///
/// # Errors
/// The listener fails.
pub(crate) async fn serve(
    listener: VsockListener,
    meeting: Meeting<VsockStream>,
    host: u32,
) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(UNCLAIMED));
    loop {
        let (mut connection, peer) = listener.accept().await?;
        if peer.cid() != host {
            tracing::warn!(cid = u64::from(peer.cid()), "a stream not from the host was closed");
            continue;
        }
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            tracing::warn!(limit = UNCLAIMED as u64, "too many unclaimed streams, one was closed");
            continue;
        };
        let meeting = meeting.clone();
        tokio::spawn(async move {
            let mut header = [0; StreamHeader::LEN];
            match timeout(PATIENCE, connection.read_exact(&mut header)).await {
                Ok(Ok(_)) => meeting.offer(StreamHeader(header), connection, permit).await,
                Ok(Err(_)) | Err(_) => tracing::warn!("a stream without a header was closed"),
            }
        });
    }
}

/// The agent's and the process's ends of a process's standard streams.
#[derive(Debug)]
pub(crate) struct Pipes {
    stdin: Option<(StreamHeader, pipe::Sender)>,
    stdout: Option<(StreamHeader, pipe::Receiver)>,
    stderr: Option<(StreamHeader, pipe::Receiver)>,
}

/// What the process gets as descriptors 0, 1 and 2; `None` is the null device.
#[derive(Debug, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

impl Pipes {
    /// Makes a pipe for each stream that has a header.
    ///
    /// # Errors
    /// A header has the wrong length, or the guest has no pipes left.
    pub(crate) fn new(headers: [&[u8]; 3]) -> Result<(Self, Stdio), StreamError> {
        let [stdin, stdout, stderr] = headers;
        let mut stdio = Stdio::default();
        let mut pipes = Self { stdin: None, stdout: None, stderr: None };
        let failed = |stream| move |source| StreamError::Pipe { stream, source };
        if let Some(header) = parse(stdin, StreamKind::Stdin)? {
            let (theirs, ours) = new_pipe().map_err(failed(StreamKind::Stdin))?;
            let ours = pipe::Sender::from_owned_fd(ours).map_err(failed(StreamKind::Stdin))?;
            stdio.stdin = Some(theirs);
            pipes.stdin = Some((header, ours));
        }
        for (header, stream) in [(stdout, StreamKind::Stdout), (stderr, StreamKind::Stderr)] {
            let Some(header) = parse(header, stream)? else { continue };
            let (ours, theirs) = new_pipe().map_err(failed(stream))?;
            let ours = pipe::Receiver::from_owned_fd(ours).map_err(failed(stream))?;
            let (their_end, our_end) = match stream {
                StreamKind::Stdout => (&mut stdio.stdout, &mut pipes.stdout),
                _ => (&mut stdio.stderr, &mut pipes.stderr),
            };
            *their_end = Some(theirs);
            *our_end = Some((header, ours));
        }
        Ok((pipes, stdio))
    }

    /// Waits for the streams' connections and starts to copy. The copies end by themselves: when
    /// the last holder of a pipe closes it, or the host closes the connection.
    ///
    /// # Errors
    /// A connection does not come in [`PATIENCE`].
    pub(crate) async fn connect(
        self,
        meeting: &Meeting<VsockStream>,
    ) -> Result<Outputs, StreamError> {
        let stdin = claim(meeting, self.stdin, StreamKind::Stdin);
        let stdout = claim(meeting, self.stdout, StreamKind::Stdout);
        let stderr = claim(meeting, self.stderr, StreamKind::Stderr);
        let (stdin, stdout, stderr) = tokio::try_join!(stdin, stdout, stderr)?;
        if let Some((connection, pipe)) = stdin {
            tokio::spawn(feed(StreamKind::Stdin, connection, pipe));
        }
        let drained = |stream, output: Option<(VsockStream, pipe::Receiver)>| {
            let Some((connection, pipe)) = output else { return Output::default() };
            let pipe = Arc::new(pipe);
            let output = Output { taken: Arc::default(), pipe: Arc::downgrade(&pipe) };
            tokio::spawn(drain(stream, (pipe, Arc::clone(&output.taken)), connection));
            output
        };
        let (stdout, stderr) =
            (drained(StreamKind::Stdout, stdout), drained(StreamKind::Stderr, stderr));
        Ok(Outputs { stdout, stderr })
    }
}

/// What a process writes to its standard output and standard error. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outputs {
    stdout: Output,
    stderr: Output,
}

/// One of them; without a stream, its count stays 0.
#[derive(Clone, Debug, Default)]
struct Output {
    /// The bytes that were taken from the pipe.
    taken: Arc<AtomicU64>,
    /// The pipe, while it is read.
    pipe: Weak<pipe::Receiver>,
}

/// The bytes that were written so far to a process's standard output and standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
}

impl Outputs {
    /// What was written so far. Asked after a process has ended, it covers all that the process wrote.
    pub(crate) fn written(&self) -> Written {
        Written { stdout: self.stdout.written(), stderr: self.stderr.written() }
    }
}

impl Output {
    fn written(&self) -> u64 {
        // The task that takes bytes from the pipe counts them before another task runs: the agent
        // has one thread for all tasks.
        let waiting = self.pipe.upgrade().and_then(|pipe| ioctl_fionread(&*pipe).ok());
        self.taken.load(Ordering::Relaxed) + waiting.unwrap_or(0)
    }
}

/// Waits for the connection of one stream, if the stream is wanted.
async fn claim<S, P>(
    meeting: &Meeting<S>,
    wanted: Option<(StreamHeader, P)>,
    stream: StreamKind,
) -> Result<Option<(S, P)>, StreamError> {
    let Some((header, pipe)) = wanted else { return Ok(None) };
    Ok(Some((meeting.claim(header, stream).await?, pipe)))
}

fn parse(header: &[u8], stream: StreamKind) -> Result<Option<StreamHeader>, StreamError> {
    if header.is_empty() {
        return Ok(None);
    }
    let length = header.len();
    StreamHeader::from_bytes(header).map(Some).ok_or(StreamError::Header { stream, length })
}

/// A pipe's reading and writing end.
fn new_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

/// Copies the host's bytes into a pipe that a process reads, then closes it. Ends early when the
/// process has closed it.
pub(crate) async fn feed(stream: StreamKind, mut connection: VsockStream, mut pipe: pipe::Sender) {
    let copied = feed_all(&mut connection, &mut pipe).await;
    log_end(stream, copied);
}

async fn feed_all<R>(connection: &mut R, pipe: &mut pipe::Sender) -> io::Result<()>
where
    R: AsyncRead + Unpin,
{
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        buffer.clear();
        let length = tokio::select! {
            length = connection.read_buf(&mut buffer) => length?,
            // A pipe whose readers are gone is in error, whether or not there is something to write.
            _ = pipe.ready(Interest::ERROR) => 0,
        };
        if length == 0 {
            return Ok(());
        }
        pipe.write_all(&buffer).await?;
    }
}

/// Copies a process's output to the host, then ends that direction and waits until the host has
/// closed the other, so that nothing in flight is cut off.
async fn drain(
    stream: StreamKind,
    (pipe, taken): (Arc<pipe::Receiver>, Arc<AtomicU64>),
    mut connection: VsockStream,
) {
    let copied = drain_all(&pipe, &taken, &mut connection).await;
    let whole = copied.is_ok();
    log_end(stream, copied);
    drop(pipe);
    if whole {
        finish(connection).await;
    }
}

async fn drain_all(
    pipe: &pipe::Receiver,
    taken: &AtomicU64,
    connection: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        pipe.readable().await?;
        buffer.clear();
        match pipe.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => taken.fetch_add(length as u64, Ordering::Relaxed),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        connection.write_all(&buffer).await?;
    }
}

/// Ends the direction to the host, and waits until the host has closed the other.
pub(crate) async fn finish(mut connection: VsockStream) {
    if connection.shutdown(Shutdown::Write).is_ok() {
        let mut rest = [0; 64];
        while connection.read(&mut rest).await.is_ok_and(|length| length > 0) {}
    }
}

/// Copies until the end of `from`.
pub(crate) async fn copy<R, W>(from: &mut R, to: &mut W) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        buffer.clear();
        if from.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        to.write_all(&buffer).await?;
    }
}

/// Logs how a stream ended, unless the other side has closed it, which it may do at any time.
pub(crate) fn log_end(stream: StreamKind, copied: io::Result<()>) {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    match copied {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected) => {}
        Err(error) => tracing::warn!(%stream, %error, "a stream ended early"),
    }
}

#[cfg(test)]
mod tests;
