//! Terminals of the host: the one that a stand-in has, and the one that is made for a caller who waits
//! at a console socket.
//!
//! The real terminal is in the guest: it echoes, edits lines and turns keys into signals. So the
//! one here is raw and only passes bytes on. As under runc, input comes from standard input and
//! output goes to standard output, whether those are the terminal or not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bulkhead_vmm::seqpacket;
use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::streams::attach::TerminalSize;

/// The controlling terminal of this process, tty(4).
const CONTROLLING: &str = "/dev/tty";

/// The terminal of this process.
#[derive(Debug)]
pub struct Terminal {
    fd: OwnedFd,
    /// How it was before it was made raw.
    saved: Option<Termios>,
}

impl Terminal {
    /// The first of the standard streams that is a terminal, else the controlling one.
    ///
    /// # Errors
    /// When there is none.
    pub fn own() -> io::Result<Self> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let streams: [BorrowedFd<'_>; 3] = [stderr.as_fd(), stdout.as_fd(), stdin.as_fd()];
        if let Some(found) = streams.into_iter().find(|stream| isatty(stream)) {
            return Ok(Self { fd: found.try_clone_to_owned()?, saved: None });
        }
        let controlling = File::options().read(true).write(true).open(CONTROLLING);
        let controlling = controlling.map_err(|error| {
            io::Error::other(format!(
                "process.terminal needs a terminal, and no standard stream is one: open \
                 {CONTROLLING}: {error}"
            ))
        })?;
        Ok(Self { fd: controlling.into(), saved: None })
    }

    /// Makes it the controlling terminal of this process, which becomes the leader of a new
    /// session: then signals tell of a new size, and of a caller that hangs up.
    ///
    /// # Errors
    /// When it is the controlling terminal of another session.
    pub fn control(&self) -> io::Result<()> {
        // Fails only for the leader of a process group, which this is not.
        let _ = rustix::process::setsid();
        Ok(ioctl_tiocsctty(&self.fd)?)
    }

    /// Lets bytes through as they are until this value is dropped.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn make_raw(&mut self) -> io::Result<()> {
        let saved = tcgetattr(&self.fd)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&self.fd, OptionalActions::Now, &raw)?;
        self.saved = Some(saved);
        Ok(())
    }

    /// Its size; zero if it is not known.
    #[must_use]
    pub fn size(&self) -> TerminalSize {
        tcgetwinsize(&self.fd).map_or_else(
            |_| TerminalSize::default(),
            |size| TerminalSize { rows: size.ws_row, columns: size.ws_col },
        )
    }

    /// Where its input is read.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn keyboard(&self) -> io::Result<OwnedFd> {
        io::stdin().as_fd().try_clone_to_owned()
    }

    /// Where its output is written.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn screen(&self) -> io::Result<OwnedFd> {
        io::stdout().as_fd().try_clone_to_owned()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            // A terminal that is gone needs no restoring.
            let _ = tcsetattr(&self.fd, OptionalActions::Now, saved);
        }
    }
}

/// Makes a terminal, sends its master to the listener at `socket`, as runc does, and returns the
/// slave.
///
/// # Errors
/// When nobody listens there.
pub fn send_master(socket: &Path) -> io::Result<OwnedFd> {
    let caller = UnixStream::connect(socket)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    let name = ptsname(&master, Vec::new())?;
    // One message on a stream that carries nothing else.
    seqpacket::send(&caller, name.to_bytes(), &[master.as_fd()])?;
    Ok(slave)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::termios::{InputModes, LocalModes};

    use super::*;

    #[test]
    fn a_caller_gets_the_master_of_a_terminal_that_is_raw_while_it_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.sock");
        assert!(send_master(&path).is_err(), "nobody listens");
        let listener = UnixListener::bind(&path).unwrap();
        let slave = send_master(&path).unwrap();
        let (caller, _) = listener.accept().unwrap();
        let message = seqpacket::receive(&caller).unwrap().unwrap();
        let master = message.descriptors.into_iter().next().unwrap();
        assert!(message.bytes.starts_with(b"/dev/pts/"));
        let mut terminal = Terminal { fd: slave.try_clone().unwrap(), saved: None };
        terminal.make_raw().unwrap();
        rustix::io::write(&slave, b"a\n").unwrap();
        let mut seen = [0; 8];
        assert_eq!(rustix::io::read(&master, &mut seen).unwrap(), 2, "a line feed stays alone");
        assert!(!tcgetattr(&slave).unwrap().local_modes.contains(LocalModes::ECHO));
        drop(terminal);
        let modes = tcgetattr(&slave).unwrap();
        assert!(modes.local_modes.contains(LocalModes::ECHO));
        assert!(modes.input_modes.contains(InputModes::ICRNL));
    }
}
