//! A process's terminal: its master is here, its slave in the container, and one raw vsock stream
//! carries both directions.
//!
//! Libcontainer opens the terminal inside the container and sends its master over a socket, as
//! runtimes do for their callers ([`Awaited`]). The input has no end of its own: closing a terminal
//! hangs it up, and the host sends the signal for that.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bulkhead_protocol::StreamHeader;
use bulkhead_protocol::agent;
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{OptionalActions, OutputModes, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::time::timeout;
use tokio_vsock::VsockStream;

use crate::io::{self as streams, Meeting, StreamError, StreamKind};
use crate::socket_path::SocketPath;

/// The socket that libcontainer sends the master to, in a directory of the process's own.
pub(crate) const SOCKET: &str = "console.sock";
/// A file beside it, which exists if lines end with a line feed alone.
const PLAIN: &str = "plain";

/// A process's terminal, for the host to resize. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Terminal(Arc<OwnedFd>);

impl Terminal {
    /// Tells the terminal its size, in characters; its process learns it by a signal.
    ///
    /// # Errors
    /// It is no terminal.
    pub(crate) fn resize(&self, rows: u32, columns: u32) -> io::Result<()> {
        // Larger numbers are cut: nobody has such a terminal.
        let small = |number| u16::try_from(number).unwrap_or(u16::MAX);
        let (ws_row, ws_col) = (small(rows), small(columns));
        Ok(tcsetwinsize(&*self.0, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })?)
    }
}

/// A terminal whose process is being made.
#[derive(Debug)]
pub(crate) struct Awaited {
    listener: UnixListener,
    header: StreamHeader,
    rows: u32,
    columns: u32,
    plain: bool,
}

impl Awaited {
    /// Listens in `directory` for the master of the terminal that is asked for.
    ///
    /// # Errors
    /// The header has the wrong length, or the socket cannot be made.
    pub(crate) fn listen(directory: &Path, asked: &agent::Terminal) -> Result<Self, StreamError> {
        let stream = StreamKind::Terminal;
        let length = asked.stream.len();
        let header = StreamHeader::from_bytes(&asked.stream)
            .ok_or(StreamError::Header { stream, length })?;
        let failed = |source| StreamError::Pipe { stream, source };
        let path = SocketPath::within(directory, SOCKET).map_err(failed)?;
        let listener = UnixListener::bind(path.as_path()).map_err(failed)?;
        if asked.plain {
            File::create(directory.join(PLAIN)).map_err(failed)?;
        }
        let agent::Terminal { rows, columns, plain, .. } = *asked;
        Ok(Self { listener, header, rows, columns, plain })
    }

    /// Takes the master that libcontainer has sent, waits for the stream's connection and starts to
    /// copy.
    ///
    /// # Errors
    /// No master was sent, or no connection comes in time.
    pub(crate) async fn connect(
        self,
        meeting: &Meeting<VsockStream>,
    ) -> Result<Terminal, StreamError> {
        let stream = StreamKind::Terminal;
        let failed = |source| StreamError::Pipe { stream, source };
        let master = timeout(streams::PATIENCE, receive(&self.listener)).await;
        let master = master.map_err(|_| StreamError::Missing { stream })?.map_err(failed)?;
        let terminal = Terminal(Arc::new(master.try_clone().map_err(failed)?));
        if self.rows > 0 && self.columns > 0 {
            terminal.resize(self.rows, self.columns).map_err(failed)?;
        }
        if self.plain {
            // Input that comes before the program has begun is echoed.
            end_lines_plainly(&master).map_err(failed)?;
        }
        let connection = meeting.claim(self.header, stream).await?;
        start(master, connection).map_err(failed)?;
        Ok(terminal)
    }
}

/// Whether the terminal of the process that is made in `directory` ends lines with a line feed alone.
pub(crate) fn is_plain(directory: &Path) -> bool {
    directory.join(PLAIN).exists()
}

/// Keeps a terminal from adding a carriage return to what a program writes. The process that
/// becomes the program does that, so that it is done when the program writes; and the agent, on the
/// master, before it passes input on.
///
/// # Errors
/// It is no terminal.
pub(crate) fn end_lines_plainly(terminal: impl AsFd) -> io::Result<()> {
    let mut modes = tcgetattr(&terminal)?;
    modes.output_modes.remove(OutputModes::ONLCR);
    Ok(tcsetattr(terminal, OptionalActions::Now, &modes)?)
}

/// Connects to the socket of a directory, to send a master there.
///
/// # Errors
/// Nobody listens.
pub(crate) fn connect(directory: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(SocketPath::within(directory, SOCKET)?.as_path())
}

/// The master that the first connection brings.
async fn receive(listener: &UnixListener) -> io::Result<OwnedFd> {
    let (connection, _) = listener.accept().await?;
    loop {
        connection.readable().await?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 64];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match recvmsg(&connection, &mut [IoSliceMut::new(&mut name)], &mut ancillary, flags) {
            Err(Errno::AGAIN | Errno::INTR) => continue,
            other => other?,
        };
        let descriptors = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let master = descriptors.flatten().next();
        return master.ok_or_else(|| io::Error::other("no terminal was sent"));
    }
}

/// Copies both ways until the last process has closed the terminal, or the host the connection.
fn start(master: OwnedFd, connection: VsockStream) -> io::Result<()> {
    ioctl_fionbio(&master, true)?;
    let mut keys = pipe::Sender::from_owned_fd_unchecked(master.try_clone()?)?;
    let mut screen = Master(pipe::Receiver::from_owned_fd_unchecked(master)?);
    tokio::spawn(async move {
        let (mut input, mut output) = tokio::io::split(connection);
        let feed = async {
            let fed = streams::copy(&mut input, &mut keys).await;
            streams::log_end(StreamKind::Terminal, fed);
            // The process lives on without input.
            std::future::pending::<()>().await;
        };
        let drain = async {
            let drained = streams::copy(&mut screen, &mut output).await;
            streams::log_end(StreamKind::Terminal, drained);
        };
        tokio::select! {
            () = feed => {}
            () = drain => {}
        }
        let connection = input.unsplit(output);
        streams::finish(connection).await;
    });
    Ok(())
}

/// The read side of a master, which reports an error where other files have an end.
struct Master(pipe::Receiver);

impl AsyncRead for Master {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.0).poll_read(context, buffer) {
            Poll::Ready(Err(error)) if error.raw_os_error() == Some(libc::EIO) => {
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::tcgetwinsize;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_master_ends_when_nobody_has_the_slave() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let terminal = Terminal(Arc::new(master.try_clone().unwrap()));
        terminal.resize(33, 70_000).unwrap();
        let size = tcgetwinsize(&slave).unwrap();
        assert_eq!((size.ws_row, size.ws_col), (33, u16::MAX));
        rustix::io::write(&slave, b"last words").unwrap();
        drop(slave);
        ioctl_fionbio(&master, true).unwrap();
        let mut master = Master(pipe::Receiver::from_owned_fd_unchecked(master).unwrap());
        let mut text = String::new();
        master.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "last words");
    }
}
