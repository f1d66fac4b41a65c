//! Relays a caller's descriptors to those of a process in the guest, each over its stream.
//!
//! Unlike standard streams they are let go as soon as nobody can use them any more: a pipe whose other
//! end is closed inside has to look closed to the caller's peers, also to one that waits. A socket is
//! closed, not shut down, when the container closes it, because its caller may go on using it.
//!
//! Each direction is copied by a thread of its own, which waits before it reads or writes: how a
//! descriptor is open is shared with the caller, so it may or may not block.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown as Side;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::net::{Shutdown, shutdown};

use super::DescriptorKind;

/// The most bytes that one step of a copy moves: what a pipe holds.
const CHUNK: usize = 64 << 10;
/// Nobody is at the other end any more.
const GONE: PollFlags = PollFlags::HUP.union(PollFlags::ERR);

/// A caller's descriptor and the stream that leads into the guest.
#[derive(Debug)]
struct Pair {
    caller: OwnedFd,
    stream: UnixStream,
    socket: bool,
}

/// Starts to copy; gives the thread that copies what the container writes, if it does.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn start(
    kind: &DescriptorKind,
    caller: OwnedFd,
    stream: UnixStream,
) -> io::Result<Option<JoinHandle<()>>> {
    let socket = *kind == DescriptorKind::Socket;
    let pair = Arc::new(Pair { caller, stream, socket });
    if matches!(kind, DescriptorKind::Reading | DescriptorKind::Socket) {
        let pair = pair.clone();
        thread::Builder::new().name("descriptor in".into()).spawn(move || pair.feed())?;
    }
    if *kind == DescriptorKind::Reading {
        return Ok(None);
    }
    thread::Builder::new().name("descriptor out".into()).spawn(move || pair.drain()).map(Some)
}

impl Pair {
    /// Copies what the caller has to the container, and its end.
    fn feed(&self) {
        let mut buffer = vec![0; CHUNK];
        while let Ok((readable, container)) = wait(&self.caller, PollFlags::IN, &self.stream) {
            if container.intersects(GONE) {
                return;
            }
            if readable.is_empty() {
                continue;
            }
            let bytes = match read(&self.caller, &mut buffer) {
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Ok(count) if count > 0 => buffer.get(..count).unwrap_or_default(),
                // A connection that was reset has ended too.
                Ok(_) | Err(_) => {
                    let _ = self.stream.shutdown(Side::Write);
                    return;
                }
            };
            if (&self.stream).write_all(bytes).is_err() {
                if self.socket && !self.is_closed_inside() {
                    let _ = shutdown(&self.caller, Shutdown::Read);
                }
                return;
            }
        }
    }

    /// Copies what the container writes to the caller. When nobody reads that any more the container
    /// learns it.
    fn drain(&self) {
        let mut buffer = vec![0; CHUNK];
        while let Ok((readable, reader)) = wait(&self.stream, PollFlags::IN, &self.caller) {
            if reader.intersects(GONE) {
                return self.tell_that_nobody_reads();
            }
            if readable.is_empty() {
                continue;
            }
            match (&self.stream).read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(count) if count > 0 => {
                    if self.pass_on(buffer.get(..count).unwrap_or_default()).is_err() {
                        return self.tell_that_nobody_reads();
                    }
                }
                Ok(_) | Err(_) => {
                    if self.socket && !self.is_closed_inside() {
                        let _ = shutdown(&self.caller, Shutdown::Write);
                    }
                    return;
                }
            }
        }
    }

    /// Writes all of it to the caller's descriptor.
    fn pass_on(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match write(&self.caller, bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    poll(&mut [PollFd::new(&self.caller, PollFlags::OUT)], None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn tell_that_nobody_reads(&self) {
        // What the caller's peer has sent before still goes in.
        let side = if self.socket { Side::Read } else { Side::Both };
        let _ = self.stream.shutdown(side);
    }

    /// Whether the container has let go of its end, not only ended one direction.
    fn is_closed_inside(&self) -> bool {
        let mut watched = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut watched, Some(&now)).is_err() || watched[0].revents().intersects(GONE)
    }
}

/// Waits until one descriptor is as wanted, or the other has nobody at its other end; says what both
/// are.
fn wait(
    one: &impl AsFd,
    wanted: PollFlags,
    other: &impl AsFd,
) -> io::Result<(PollFlags, PollFlags)> {
    let mut watched = [PollFd::new(one, wanted), PollFd::new(other, PollFlags::empty())];
    loop {
        match poll(&mut watched, None) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok((watched[0].revents(), watched[1].revents())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What a test waits for at most.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair() -> (UnixStream, UnixStream) {
        let (one, other) = UnixStream::pair().unwrap();
        for end in [&one, &other] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        (one, other)
    }

    /// A caller's socket that is relayed: its peer, and the container's side of the stream.
    fn relayed() -> (UnixStream, UnixStream, JoinHandle<()>) {
        let ((peer, caller), (inside, stream)) = (pair(), pair());
        let thread = start(&DescriptorKind::Socket, caller.into(), stream).unwrap().unwrap();
        (peer, inside, thread)
    }

    fn rest(mut of: &UnixStream) -> String {
        let mut text = String::new();
        of.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_socket_goes_both_ways_and_each_way_ends_by_itself() {
        let (mut peer, mut inside, thread) = relayed();
        peer.write_all(b"question").unwrap();
        peer.shutdown(Side::Write).unwrap();
        assert_eq!(rest(&inside), "question");
        inside.write_all(b"answer").unwrap();
        inside.shutdown(Side::Write).unwrap();
        assert_eq!(rest(&peer), "answer");
        thread.join().unwrap();
    }

    #[test]
    fn a_socket_that_is_closed_inside_is_closed_and_not_shut_down() {
        let ((peer, caller), (mut inside, stream)) = (pair(), pair());
        let kept = caller.try_clone().unwrap();
        let thread = start(&DescriptorKind::Socket, caller.into(), stream).unwrap().unwrap();
        inside.write_all(b"last").unwrap();
        drop(inside);
        thread.join().unwrap();
        // The caller goes on where the container has stopped.
        (&kept).write_all(b" words").unwrap();
        drop(kept);
        assert_eq!(rest(&peer), "last words");
    }

    #[test]
    fn a_writer_learns_that_its_reader_inside_is_gone() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (inside, stream) = pair();
        assert!(start(&DescriptorKind::Reading, reader.into(), stream).unwrap().is_none());
        writer.write_all(b"x").unwrap();
        (&inside).read_exact(&mut [0]).unwrap();
        drop(inside);
        let mut watched = [PollFd::new(&writer, PollFlags::empty())];
        let patience = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut watched, Some(&patience)).unwrap(), 1, "nobody let go of the reader");
        assert_eq!(writer.write(b"y").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_container_learns_that_its_reader_is_gone_before_it_writes() {
        let (reader, writer) = io::pipe().unwrap();
        let (inside, stream) = pair();
        let thread = start(&DescriptorKind::Writing, writer.into(), stream).unwrap().unwrap();
        drop(reader);
        assert_eq!(rest(&inside), "");
        thread.join().unwrap();
    }

    #[test]
    fn a_pipe_that_does_not_block_loses_nothing() {
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let (mut inside, stream) = pair();
        let thread = start(&DescriptorKind::Writing, writer.into(), stream).unwrap().unwrap();
        let feeding = thread::spawn(move || inside.write_all(&[7; 1 << 20]).unwrap());
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        assert!(received == vec![7; 1 << 20], "{} bytes", received.len());
        feeding.join().unwrap();
        thread.join().unwrap();
    }
}
