//! Readiness of a service: sd_notify(3). As under runc, a command that starts a container and has
//! `NOTIFY_SOCKET` in its environment waits until one of the container's processes says that it is
//! ready. Then it tells systemd so, and which process of the host stands for the container.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use bulkhead_protocol::NOTIFY_BYTES_MAX;
use bulkhead_vmm::seqpacket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::state::Home;
use crate::state::socket_path::SocketPath;
use crate::supervisor::lifecycle::Status;

/// The variable that names the socket of systemd.
const VARIABLE: &str = "NOTIFY_SOCKET";
/// How often to check whether the container has ended.
const LOOK: Duration = Duration::from_millis(100);
/// How long systemd may take to have read everything.
const BARRIER: Duration = Duration::from_secs(30);

/// Whether systemd waits for the container.
pub(super) fn is_wanted() -> bool {
    socket_of_systemd().is_some()
}

/// Receives what a container's processes say.
pub(super) struct Listener {
    socket: UnixDatagram,
    systemd: SocketAddr,
    home: Home,
}

impl Listener {
    /// Listens, before the container is started. Returns `None` if systemd does not wait for it, or
    /// did not when the container was created.
    pub(super) fn bind(home: &Home) -> anyhow::Result<Option<Self>> {
        let Some(systemd) = socket_of_systemd() else { return Ok(None) };
        let Ok(path) = SocketPath::notify(home) else { return Ok(None) };
        let systemd = address(&systemd).context(VARIABLE)?;
        // An earlier start that failed may have left the socket.
        let _ = std::fs::remove_file(path.path());
        let socket = UnixDatagram::bind(path.path()).context("socket for sd_notify")?;
        socket.set_read_timeout(Some(LOOK))?;
        Ok(Some(Self { socket, systemd, home: home.clone() }))
    }

    /// Waits until the container is ready or has ended; tells systemd, and that `pid` is its main
    /// process.
    pub(super) fn wait(self, pid: u32) -> anyhow::Result<()> {
        let mut datagram = [0; NOTIFY_BYTES_MAX];
        loop {
            match self.socket.recv(&mut datagram) {
                Ok(count) => {
                    if let Some(ready) = ready(datagram.get(..count).unwrap_or_default()) {
                        return self.tell(ready, pid).with_context(|| format!("tell {VARIABLE}"));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let state = self.home.read();
                    if state.map_or(Status::Stopped, |state| state.observed()) == Status::Stopped {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("socket for sd_notify"),
            }
        }
    }

    /// As [`Listener::wait`], for a container that has a stand-in.
    pub(super) fn wait_for_stand_in(self) -> anyhow::Result<()> {
        match self.home.read()?.stand_in {
            Some(stand_in) => self.wait(stand_in.pid),
            None => Ok(()),
        }
    }

    fn tell(&self, ready: &[u8], pid: u32) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&self.systemd)?;
        socket.send(&[ready, b"\n"].concat())?;
        socket.send(format!("MAINPID={pid}\n").as_bytes())?;
        // systemd looks for the sender when it reads: this process must not be gone by then.
        let (reader, writer) = io::pipe()?;
        seqpacket::send(&socket, b"BARRIER=1", &[writer.as_fd()])?;
        drop(writer);
        let limit = Timespec::try_from(BARRIER).map_err(io::Error::other)?;
        // systemd closes it when it has read all; a version without barriers does not.
        poll(&mut [PollFd::new(&reader, PollFlags::empty())], Some(&limit))?;
        Ok(())
    }
}

/// The line of a datagram that says that the service is ready, if there is one.
fn ready(datagram: &[u8]) -> Option<&[u8]> {
    datagram.split(|byte| *byte == b'\n').find(|line| line.starts_with(b"READY="))
}

fn socket_of_systemd() -> Option<OsString> {
    env::var_os(VARIABLE).filter(|path| !path.is_empty())
}

/// The address that is written as in the variable: a path, or a name after `@`.
fn address(written: &OsString) -> io::Result<SocketAddr> {
    match written.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => {
            SocketAddr::from_pathname(Path::new(&OsString::from_vec(written.clone().into_vec())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_of_several_says_that_it_is_ready() {
        assert_eq!(ready(b"READY=1"), Some(&b"READY=1"[..]));
        assert_eq!(ready(b"STATUS=up\nREADY=1\n"), Some(&b"READY=1"[..]));
        assert_eq!(ready(b"STATUS=READY=1"), None);
    }

    #[test]
    fn addresses_are_paths_or_names() {
        assert_eq!(address(&"/run/x".into()).unwrap().as_pathname(), Some(Path::new("/run/x")));
        assert_eq!(address(&"@x".into()).unwrap().as_abstract_name(), Some(&b"x"[..]));
    }
}
