//! A FIFO of the host that a process of the guest has opened: it is opened in the same direction,
//! and bytes flow until its other end is closed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bulkhead_relay::{drain_fifo, feed_fifo};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::time::sleep;

use super::node::Node;
use super::user::User;

/// How often it is looked at whether somebody reads.
const LOOK: Duration = Duration::from_millis(50);

/// Opens a FIFO as a user, for writing if the process `writes`, and copies.
///
/// # Errors
/// It cannot be opened, or its reader has gone.
pub(super) async fn pass_on(
    node: &Node,
    user: User,
    writes: bool,
    stream: &UnixStream,
) -> io::Result<()> {
    if writes {
        let writer = open_for_writing(node, user, stream).await?;
        feed_fifo(stream, pipe::Sender::from_owned_fd(writer)?).await
    } else {
        let reader = open(node, user, OFlags::RDONLY).await?;
        drain_fifo(&pipe::Receiver::from_owned_fd(reader)?, stream).await.map(drop)
    }
}

async fn open(node: &Node, user: User, access: OFlags) -> io::Result<OwnedFd> {
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
    node.run(user, move |path| Ok(rustix::fs::open(path, flags, Mode::empty())?)).await
}

/// Opens it once somebody reads. That cannot be waited for: an open that waits could not be given
/// up.
async fn open_for_writing(node: &Node, user: User, stream: &UnixStream) -> io::Result<OwnedFd> {
    loop {
        match open(node, user.clone(), OFlags::WRONLY).await {
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {}
            opened => return opened,
        }
        if has_nothing(stream) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        sleep(LOOK).await;
    }
}

/// Whether the guest has closed a stream, and nothing of it waits.
fn has_nothing(stream: &UnixStream) -> bool {
    let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    matches!(recv(stream, &mut [0; 1][..], peek), Ok((0, _)))
}
