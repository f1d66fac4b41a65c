//! Who has connected to a socket.

// UNSAFETY: the groups of a peer are only known by getsockopt(2).
#![expect(unsafe_code, reason = "getsockopt(2) with SO_PEERGROUPS has no safe form")]

use std::io;
use std::os::fd::AsRawFd as _;

use rustix::net::sockopt::socket_peercred;
use tokio::net::UnixStream;

/// A process's user at the time at which it connected, as this kernel numbers users.
#[derive(Debug, Default)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// As many of its supplementary groups as the other side is told of.
    pub groups: Vec<u32>,
}

impl Peer {
    /// Who is at the other end, with at most so many groups.
    ///
    /// # Errors
    /// The socket is not connected.
    pub fn of(connection: &UnixStream, most: usize) -> io::Result<Self> {
        let credentials = socket_peercred(connection)?;
        let (uid, gid) = (credentials.uid.as_raw(), credentials.gid.as_raw());
        let mut groups = groups(connection)?;
        groups.truncate(most);
        Ok(Self { uid, gid, groups })
    }
}

fn groups(connection: &UnixStream) -> io::Result<Vec<u32>> {
    /// What Linux allows, include/uapi/linux/limits.h.
    const NGROUPS_MAX: usize = 65536;
    /// What most processes have less than.
    const FEW: usize = 256;
    let mut groups = vec![0_u32; FEW];
    loop {
        let mut bytes =
            libc::socklen_t::try_from(size_of_val(&*groups)).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `bytes` bytes, which is the size of the list, and the
        // length; both outlive the call.
        let result = unsafe {
            libc::getsockopt(
                connection.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let error = io::Error::last_os_error();
        if result == 0 {
            groups.truncate(usize::try_from(bytes).unwrap_or(0) / size_of::<u32>());
            return Ok(groups);
        }
        if error.raw_os_error() != Some(libc::ERANGE) || groups.len() >= NGROUPS_MAX {
            return Err(error);
        }
        groups.resize(NGROUPS_MAX, 0);
    }
}
