//! Notifications of what changes in a network namespace: the multicast groups of rtnetlink(7).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Interfaces, neighbours, addresses, routes and rules: `enum rtnetlink_groups` of Linux.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];
/// Messages are cut to this size: only that one came counts.
const CUT_BYTES: usize = 16;

/// Reports changes in the network namespace that the thread was in when it opened this.
pub struct Changes(Socket);

impl Changes {
    /// Reports changes from now on.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Reads all notifications so far; returns whether there were any.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn take(&self) -> io::Result<bool> {
        let mut told = false;
        loop {
            let mut cut = [0; CUT_BYTES];
            match self.0.recv(&mut &mut cut[..], 0) {
                Ok(_) => told = true,
                // There were so many that the kernel dropped some.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => told = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(told),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Readable when there are notifications.
impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Changes(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Connection;

    #[test]
    fn a_change_is_told_once() {
        let loopback = 1;
        let changes = Changes::open().unwrap();
        // Changes that others make here meanwhile are reported as well.
        let mut connection = Connection::open().unwrap();
        connection.set_link(loopback, Some(true), Vec::new()).unwrap();
        changes.take().unwrap();
        let alias = || netlink_packet_route::link::LinkAttribute::IfAlias(String::new());
        connection.set_link(loopback, None, vec![alias()]).unwrap();
        assert!(changes.take().unwrap());
    }
}
