//! How a direction of a relay ends, and how its end is passed on.

use std::future::pending;
use std::io;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

/// Passes on the end of the direction between two sockets. Returns whether there is nothing left to
/// copy in the other direction either: `closed` says that `from` is closed as a whole.
pub(crate) fn pass_on(
    copied: io::Result<()>,
    from: &UnixStream,
    to: &UnixStream,
    closed: bool,
) -> bool {
    if closed {
        return true;
    }
    // Both fail only if the other side is closed, which the other direction finds out.
    match copied {
        Ok(()) => drop(shutdown(to, Shutdown::Write)),
        // Nobody reads any more, so writers fail too. What comes the other way still arrives.
        Err(_) => drop(shutdown(from, Shutdown::Read).map(|()| empty(from))),
    }
    false
}

/// Drops what waits in a socket that is not read any more: a writer that waits for room there is
/// not woken before.
fn empty(socket: &UnixStream) {
    let mut rest = [0; 4096];
    while recv(socket, &mut rest[..], RecvFlags::DONTWAIT).is_ok_and(|(count, _)| count > 0) {}
}

/// Whether the other side of a Unix socket is closed as a whole.
#[must_use]
pub fn is_hung_up(socket: &impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut watched = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut watched, Some(&now)).is_ok() && watched[0].revents().contains(PollFlags::HUP)
}

/// The same for a stream, which may be of vsock: that shows no hang-up, but takes no bytes any more,
/// not even none.
pub(crate) fn is_closed(stream: &UnixStream) -> bool {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    is_hung_up(stream) || send(stream, &[], flags) == Err(Errno::PIPE)
}

/// Waits until the other side is closed as a whole; for ever where that is not shown.
pub(crate) async fn hang_up(socket: &UnixStream) {
    // A descriptor of its own, watched as if it were the write end of a pipe: of all read events,
    // only the hang-up is reported to it.
    let own = socket.as_fd().try_clone_to_owned();
    match own.and_then(pipe::Sender::from_owned_fd_unchecked) {
        Ok(watched) => {
            // Fails only without a runtime.
            let _ = watched.ready(Interest::READABLE).await;
        }
        // No descriptors are left. The other direction shows the end as well, but later.
        Err(_) => pending().await,
    }
}
