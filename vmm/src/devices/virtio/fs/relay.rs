//! FUSE messages between queue and socket, with numbers of our own.
//!
//! The guest numbers its requests, and a hostile one may use a number twice. So each request gets
//! a number here that is never used again, and the guest's own comes back in the reply.
//!
//! The file server may have been taken over, so what it says is checked as well. A reply must have
//! a header that is true, and answer a request that waits for it or that the driver forgot when it
//! reset the device; those are dropped. The first packet that is anything else ends the relay: from
//! then on every request fails with EIO. A reply that is too long for its request fails that one.
//!
//! The header of a request is copied out of guest memory, checked and then used; what follows goes
//! to the socket without a copy, and nobody here looks at it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use vm_memory::VolatileSlice;

use super::QUEUE_SIZES;
use crate::devices::rate_limit::guest_warn;
use crate::devices::virtio::ServeError;
use crate::devices::virtio::queue::{Buffers, Chain, GuestMemory};
use crate::devices::virtio::vectored;
use crate::fileserver::wire::{
    IN_HEADER, INTERRUPT_UNIQUE, OUT_HEADER, PACKET_MAX, ReplyHeader, Request, opcode, put_u64,
};

/// The most runs of guest memory in one message, below what one system call takes.
const RUNS_MAX: usize = 1000;
/// The last error number of user space; those above are the kernel's own.
const ERROR_MAX: i32 = 511;
/// Where in a header the number of the request stands.
const UNIQUE: usize = 8;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forwarded {
    /// The file server has it; the chain is kept until it answers.
    Sent,
    /// The chain is to be given back, so many bytes written.
    Done(usize),
    /// Nothing happened: the socket is full.
    Full,
}

/// What came from the file server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// No packet is there now.
    Nothing,
    /// A reply that nobody waits for.
    Dropped,
    /// A reply, in the buffers of its request.
    Reply(Answer),
}

/// A chain to be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) written: usize,
}

#[derive(Debug)]
struct InFlight {
    queue: usize,
    head: u16,
    /// The guest's number of the request.
    unique: u64,
    writable: Buffers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Alive,
    /// Found dead; what it was asked is not answered yet.
    Ended,
    Gone,
}

/// The socket and what is in flight on it.
#[derive(Debug)]
pub(super) struct Relay {
    socket: OwnedFd,
    server: Server,
    in_flight: HashMap<u64, InFlight>,
    /// How many replies may still come to requests that the driver forgot.
    forgotten: u64,
    last: u64,
}

impl Relay {
    pub(super) fn new(socket: OwnedFd) -> Self {
        let in_flight = HashMap::new();
        Self { socket, server: Server::Alive, in_flight, forgotten: 0, last: 0 }
    }

    pub(super) fn server(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether the file server died since the last [`Relay::fail_all`].
    pub(super) fn has_ended(&self) -> bool {
        self.server == Server::Ended
    }

    /// Whether the socket is of no use any more.
    pub(super) fn is_gone(&self) -> bool {
        self.server != Server::Alive
    }

    /// The driver has forgotten its requests; answers to them go nowhere.
    pub(super) fn forget_all(&mut self) {
        self.forgotten = self.forgotten.saturating_add(self.in_flight.len() as u64);
        self.in_flight.clear();
    }

    /// Passes one request on.
    pub(super) fn forward(
        &mut self,
        memory: &GuestMemory,
        mut chain: Chain,
        queue: usize,
    ) -> Result<Forwarded, ServeError> {
        let len = chain.readable.left();
        // The header, and what follows it in an INTERRUPT.
        let mut copied = [0; INTERRUPT_UNIQUE + 8];
        let (header, body) = copied.split_at_mut(IN_HEADER);
        chain.readable.read(memory, header)?;
        let Some(request) = Request::parse(header) else {
            return Err(ServeError::Request("no FUSE header"));
        };
        if request.has_reply() && chain.writable.left() < OUT_HEADER {
            return Err(ServeError::Request("no room for a FUSE reply"));
        }
        if request.len as usize != len || len > PACKET_MAX {
            return refuse(memory, chain, &request, Errno::INVAL);
        }
        if self.is_gone() {
            return refuse(memory, chain, &request, Errno::IO);
        }
        let limit = usize::from(QUEUE_SIZES.get(queue).copied().unwrap_or(0));
        if self.in_flight.values().filter(|other| other.queue == queue).count() >= limit {
            return Err(ServeError::Request("more requests than the queue has descriptors"));
        }
        let number = self.last + 1;
        put_u64(header, UNIQUE, number);
        let mut copied_len = IN_HEADER;
        if request.opcode == opcode::INTERRUPT {
            chain.readable.read(memory, body)?;
            let Some(target) =
                self.number_of(u64::from_le_bytes(body.try_into().unwrap_or([0; 8])))
            else {
                return Ok(Forwarded::Done(0));
            };
            put_u64(body, 0, target);
            copied_len += body.len();
        }
        let mut runs = vec![VolatileSlice::from(&mut copied[..copied_len])];
        runs.extend(chain.readable.slices(memory, len)?);
        if runs.len() > RUNS_MAX {
            return refuse(memory, chain, &request, Errno::TOOBIG);
        }
        match self.send(&runs) {
            Ok(true) => self.last = number,
            Ok(false) => return Ok(Forwarded::Full),
            Err(error) => return refuse(memory, chain, &request, error),
        }
        if !request.has_reply() {
            return Ok(Forwarded::Done(0));
        }
        let Chain { head, writable, .. } = chain;
        let in_flight = InFlight { queue, head, unique: request.unique, writable };
        self.in_flight.insert(number, in_flight);
        Ok(Forwarded::Sent)
    }

    /// Sends one packet; `false` when there is no room for it now.
    fn send(&mut self, packet: &[VolatileSlice<'_>]) -> Result<bool, Errno> {
        let Err(error) = vectored::send(&self.socket, packet) else { return Ok(true) };
        match error.raw_os_error() {
            // The last two: the kernel has no memory in one piece now. The socket is writable, so
            // the worker comes back at once, and the kernel makes room meanwhile.
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Ok(false),
            Some(libc::EMSGSIZE) => {
                let len: usize = packet.iter().map(VolatileSlice::len).sum();
                guest_warn!("fs: a request of {len} bytes does not fit the socket");
                Err(Errno::IO)
            }
            _ => {
                self.end(&format!("takes no requests: {error}"));
                Err(Errno::IO)
            }
        }
    }

    /// Takes the next packet.
    pub(super) fn receive(&mut self, memory: &GuestMemory) -> Result<Received, ServeError> {
        if self.server != Server::Alive {
            return Ok(Received::Nothing);
        }
        let Some((reply, total)) = self.peek() else { return Ok(Received::Nothing) };
        if let Some(in_flight) = self.in_flight.remove(&reply.unique) {
            return Ok(Received::Reply(self.deliver(memory, in_flight, reply, total)?));
        }
        if self.forgotten == 0 {
            self.end(&format!("answered request {}, which does not wait", reply.unique));
            return Ok(Received::Nothing);
        }
        self.forgotten -= 1;
        self.discard()?;
        Ok(Received::Dropped)
    }

    /// The header of the next reply and the length of its packet; `None` when there is none now, or
    /// when it is not a reply, which ends the relay.
    fn peek(&mut self) -> Option<(ReplyHeader, usize)> {
        let mut bytes = [0; OUT_HEADER];
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (filled, total) = loop {
            match recv(&self.socket, bytes.as_mut_slice(), flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Ok((_, 0)) | Err(_) => {
                    self.end("closed its socket");
                    return None;
                }
                Ok(lengths) => break lengths,
            }
        };
        let header = bytes.get(..filled).and_then(ReplyHeader::parse);
        let reply = header.filter(|header| is_true(header, total));
        if reply.is_none() {
            self.end(&format!("sent {total} bytes that are not a FUSE reply"));
        }
        Some((reply?, total))
    }

    /// Believes the file server no more.
    fn end(&mut self, why: &str) {
        log::error!("fs: the file server {why}; every request fails from now on");
        self.server = Server::Ended;
    }

    /// Fails what the dead file server will not answer.
    pub(super) fn fail_all(&mut self, memory: &GuestMemory) -> Result<Vec<Answer>, ServeError> {
        self.server = Server::Gone;
        let mut answers = Vec::new();
        for (_, mut in_flight) in self.in_flight.drain() {
            let failure = ReplyHeader::failure(in_flight.unique, Errno::IO);
            in_flight.writable.write(memory, &failure.bytes())?;
            let InFlight { queue, head, .. } = in_flight;
            answers.push(Answer { queue, head, written: OUT_HEADER });
        }
        Ok(answers)
    }

    /// Receives the reply at hand into the buffers of its request.
    fn deliver(
        &self,
        memory: &GuestMemory,
        in_flight: InFlight,
        reply: ReplyHeader,
        total: usize,
    ) -> Result<Answer, ServeError> {
        let InFlight { queue, head, unique, mut writable } = in_flight;
        let fits = total <= writable.left();
        let head_runs = writable.slices(memory, OUT_HEADER)?;
        let mut seen = [0; OUT_HEADER];
        let mut runs = vec![VolatileSlice::from(seen.as_mut_slice())];
        if fits {
            runs.extend(writable.slices(memory, total - OUT_HEADER)?);
        }
        let (header, written) = if fits && runs.len() <= RUNS_MAX {
            vectored::receive(&self.socket, &runs)?;
            (ReplyHeader { unique, ..reply }, total)
        } else {
            guest_warn!("fs: a reply of {total} bytes does not fit the request");
            self.discard()?;
            (ReplyHeader::failure(unique, Errno::IO), OUT_HEADER)
        };
        let bytes = header.bytes();
        let mut rest = bytes.as_slice();
        for run in head_runs {
            let (now, later) = rest.split_at(run.len());
            run.copy_from(now);
            rest = later;
        }
        Ok(Answer { queue, head, written })
    }

    /// Drops the packet at hand.
    fn discard(&self) -> Result<(), ServeError> {
        match recv(&self.socket, &mut [0; OUT_HEADER], RecvFlags::DONTWAIT) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// Our number of the request that the guest calls `unique`.
    fn number_of(&self, unique: u64) -> Option<u64> {
        let in_flight = self.in_flight.iter().find(|(_, other)| other.unique == unique)?;
        Some(*in_flight.0)
    }
}

/// Whether the header fits a packet of so many bytes, as Linux checks what it reads from /dev/fuse.
fn is_true(header: &ReplyHeader, total: usize) -> bool {
    let errors = -ERROR_MAX..=-1;
    header.len as usize == total
        && (header.error == 0 || errors.contains(&header.error) && total == OUT_HEADER)
}

/// Answers a request without the file server.
fn refuse(
    memory: &GuestMemory,
    mut chain: Chain,
    request: &Request,
    errno: Errno,
) -> Result<Forwarded, ServeError> {
    if !request.has_reply() {
        return Ok(Forwarded::Done(0));
    }
    let failure = ReplyHeader::failure(request.unique, errno);
    chain.writable.write(memory, &failure.bytes())?;
    Ok(Forwarded::Done(OUT_HEADER))
}
