//! Passes FUSE messages between queue and socket, and numbers them anew.
//!
//! The guest numbers its requests, and a hostile guest may use a number twice. So the relay gives
//! each request a number that is never used again, and puts the guest's number into the reply.
//!
//! The file server may have been taken over, so its packets are checked as well. A reply must have
//! a consistent header and belong to a request that waits for it, or to one that the driver forgot
//! when it reset the device; in the second case it is dropped. Any other packet ends the relay:
//! from then on every request fails with EIO. If a reply is too long for its request, only that
//! request fails.
//!
//! Slow requests never occupy all threads of the file server: one is left for quick requests
//! ([`Class`]). A request that is held back stays in guest memory; only its addresses are kept
//! here.
//!
//! The header of a request is copied out of guest memory, checked and then used; the rest goes to
//! the socket without a copy and is not looked at here.

use std::collections::{HashMap, VecDeque};
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
    Class, IN_HEADER, INTERRUPT_UNIQUE, OUT_HEADER, PACKET_MAX, ReplyHeader, Request, opcode,
    put_u64,
};

/// The most runs of guest memory in one message, below what one system call takes.
const RUNS_MAX: usize = 1000;
/// The last error number of user space; larger ones are internal to the kernel.
const ERROR_MAX: i32 = 511;
/// Offset of a request's number in a header.
const UNIQUE: usize = 8;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forwarded {
    /// The chain is kept until the file server answers. The request was sent, or will be when
    /// others have been answered.
    Kept,
    /// The chain is to be completed, with this many bytes written.
    Done(usize),
    /// Nothing happened: the socket is full.
    Full,
}

/// The result of sending a request.
#[derive(Debug)]
enum Passed {
    /// The file server has it.
    Sent,
    /// The socket is full; nothing happened.
    Full(Asked),
    /// The request has no reply, or the relay has answered it.
    Done(Answer),
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

/// A chain to be completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) written: usize,
}

/// A request that was read and checked.
#[derive(Debug)]
struct Asked {
    request: Request,
    queue: usize,
    /// What follows the part that was copied, and room for the reply.
    chain: Chain,
    /// The header, and what follows it in an INTERRUPT.
    copied: [u8; INTERRUPT_UNIQUE + 8],
    copied_len: usize,
}

/// A request that the file server has.
#[derive(Debug)]
struct InFlight {
    class: Class,
    /// `None` when the driver has forgotten it.
    waiting: Option<Waiting>,
}

/// The chain that waits for a reply.
#[derive(Debug)]
struct Waiting {
    queue: usize,
    head: u16,
    /// The guest's number of the request.
    unique: u64,
    writable: Buffers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Alive,
    /// It has ended; the requests that it has not answered still wait.
    Ended,
    Gone,
}

/// The socket and what is in flight on it.
#[derive(Debug)]
pub(super) struct Relay {
    socket: OwnedFd,
    server: Server,
    in_flight: HashMap<u64, InFlight>,
    /// Requests that are held back, for each of [`Class::BOUNDED`].
    held: [VecDeque<Asked>; Class::BOUNDED.len()],
    /// How many replies may still come to requests of other classes that the driver forgot.
    forgotten: u64,
    last: u64,
}

impl Relay {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            server: Server::Alive,
            in_flight: HashMap::new(),
            held: Default::default(),
            forgotten: 0,
            last: 0,
        }
    }

    pub(super) fn server(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether the file server died since the last [`Relay::fail_all`].
    pub(super) fn has_ended(&self) -> bool {
        self.server == Server::Ended
    }

    /// Whether the file server has ended, so that the socket cannot be used any more.
    pub(super) fn is_gone(&self) -> bool {
        self.server != Server::Alive
    }

    /// Forgets the driver's requests; replies to them are dropped. Slow ones still count, because
    /// they occupy a thread of the file server.
    pub(super) fn forget_all(&mut self) {
        self.held = Default::default();
        let forgotten = &mut self.forgotten;
        self.in_flight.retain(|_, in_flight| {
            in_flight.waiting = None;
            let bounded = in_flight.class != Class::Look;
            *forgotten = forgotten.saturating_add(u64::from(!bounded));
            bounded
        });
    }

    /// Passes one request on, or keeps it until there is room for it.
    pub(super) fn forward(
        &mut self,
        memory: &GuestMemory,
        chain: Chain,
        queue: usize,
    ) -> Result<Forwarded, ServeError> {
        let asked = match self.read(memory, chain, queue)? {
            Ok(asked) => asked,
            Err(written) => return Ok(Forwarded::Done(written)),
        };
        let class = asked.request.class();
        if let Some(held) = self.held.get_mut(class as usize)
            && (!held.is_empty() || !has_room(&self.in_flight, class))
        {
            held.push_back(asked);
            return Ok(Forwarded::Kept);
        }
        Ok(match self.pass(memory, asked)? {
            Passed::Sent => Forwarded::Kept,
            Passed::Full(_) => Forwarded::Full,
            Passed::Done(answer) => Forwarded::Done(answer.written),
        })
    }

    /// Sends requests that were held back, as far as there is room for them. The slowest go first,
    /// so that quicker ones cannot take all of the room. Returns the chains that are done without
    /// the file server, and whether the socket is full.
    pub(super) fn resume(
        &mut self,
        memory: &GuestMemory,
    ) -> Result<(Vec<Answer>, bool), ServeError> {
        let mut done = Vec::new();
        for class in Class::BOUNDED {
            while has_room(&self.in_flight, class)
                && let Some(asked) = self.held[class as usize].pop_front()
            {
                match self.pass(memory, asked)? {
                    Passed::Sent => {}
                    Passed::Done(answer) => done.push(answer),
                    Passed::Full(asked) => {
                        self.held[class as usize].push_front(asked);
                        return Ok((done, true));
                    }
                }
            }
        }
        Ok((done, false))
    }

    /// Reads and checks what the relay needs of a request. If it answers the request itself,
    /// returns the number of bytes written.
    fn read(
        &self,
        memory: &GuestMemory,
        mut chain: Chain,
        queue: usize,
    ) -> Result<Result<Asked, usize>, ServeError> {
        let len = chain.readable.left();
        let mut copied = [0; INTERRUPT_UNIQUE + 8];
        let mut copied_len = IN_HEADER;
        let (header, body) = copied.split_at_mut(IN_HEADER);
        chain.readable.read(memory, header)?;
        let Some(request) = Request::parse(header) else {
            return Err(ServeError::Request("no FUSE header"));
        };
        if request.has_reply() && chain.writable.left() < OUT_HEADER {
            return Err(ServeError::Request("no room for a FUSE reply"));
        }
        if request.len as usize != len || len > PACKET_MAX {
            return refuse(memory, &mut chain, &request, Errno::INVAL).map(Err);
        }
        if self.is_gone() {
            return refuse(memory, &mut chain, &request, Errno::IO).map(Err);
        }
        let limit = usize::from(QUEUE_SIZES.get(queue).copied().unwrap_or(0));
        if self.kept(queue) >= limit {
            return Err(ServeError::Request("more requests than the queue has descriptors"));
        }
        if request.opcode == opcode::INTERRUPT {
            chain.readable.read(memory, body)?;
            let target = u64::from_le_bytes(body.try_into().unwrap_or([0; 8]));
            let Some(target) = self.number_of(target) else { return Ok(Err(0)) };
            put_u64(body, 0, target);
            copied_len += body.len();
        }
        Ok(Ok(Asked { request, queue, chain, copied, copied_len }))
    }

    /// Sends a request to the file server.
    fn pass(&mut self, memory: &GuestMemory, mut asked: Asked) -> Result<Passed, ServeError> {
        let (queue, head, request) = (asked.queue, asked.chain.head, asked.request);
        let number = self.last + 1;
        put_u64(&mut asked.copied, UNIQUE, number);
        let front = asked.copied.get_mut(..asked.copied_len).unwrap_or_default();
        let mut runs = vec![VolatileSlice::from(front)];
        asked.chain.readable.gather(memory, &mut runs)?;
        let sent = if runs.len() > RUNS_MAX { Err(Errno::TOOBIG) } else { self.send(&runs) };
        match sent {
            Ok(true) => self.last = number,
            Ok(false) => return Ok(Passed::Full(asked)),
            Err(error) => {
                let written = refuse(memory, &mut asked.chain, &request, error)?;
                return Ok(Passed::Done(Answer { queue, head, written }));
            }
        }
        if !request.has_reply() {
            return Ok(Passed::Done(Answer { queue, head, written: 0 }));
        }
        let (unique, writable) = (request.unique, asked.chain.writable);
        let waiting = Some(Waiting { queue, head, unique, writable });
        self.in_flight.insert(number, InFlight { class: request.class(), waiting });
        Ok(Passed::Sent)
    }

    /// How many requests of a queue are not answered yet.
    fn kept(&self, queue: usize) -> usize {
        let in_flight = self.in_flight.values().filter_map(|it| it.waiting.as_ref());
        in_flight.filter(|it| it.queue == queue).count()
            + self.held.iter().flatten().filter(|it| it.queue == queue).count()
    }

    /// Sends one packet; `false` when there is no room for it now.
    fn send(&mut self, packet: &[VolatileSlice<'_>]) -> Result<bool, Errno> {
        let Err(error) = vectored::send(&self.socket, packet) else { return Ok(true) };
        match error.raw_os_error() {
            // ENOBUFS and ENOMEM: the kernel has no contiguous memory now. The socket is writable,
            // so the worker tries again at once, and the kernel makes room meanwhile.
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

    /// Handles the next packet of the file server.
    pub(super) fn receive(&mut self, memory: &GuestMemory) -> Result<Received, ServeError> {
        if self.server != Server::Alive {
            return Ok(Received::Nothing);
        }
        let Some((reply, total)) = self.peek() else { return Ok(Received::Nothing) };
        match self.in_flight.remove(&reply.unique) {
            Some(InFlight { waiting: Some(waiting), .. }) => {
                return Ok(Received::Reply(self.deliver(memory, waiting, reply, total)?));
            }
            Some(InFlight { waiting: None, .. }) => {}
            None if self.forgotten > 0 => self.forgotten -= 1,
            None => {
                self.end(&format!("answered request {}, which does not wait", reply.unique));
                return Ok(Received::Nothing);
            }
        }
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

    /// Ends the relay, because the file server cannot be trusted any more.
    fn end(&mut self, why: &str) {
        log::error!("fs: the file server {why}; every request fails from now on");
        self.server = Server::Ended;
    }

    /// Fails the requests that the ended file server will not answer.
    pub(super) fn fail_all(&mut self, memory: &GuestMemory) -> Result<Vec<Answer>, ServeError> {
        self.server = Server::Gone;
        let mut answers = Vec::new();
        for waiting in self.in_flight.drain().filter_map(|(_, in_flight)| in_flight.waiting) {
            let Waiting { queue, head, unique, mut writable } = waiting;
            writable.write(memory, &ReplyHeader::failure(unique, Errno::IO).bytes())?;
            answers.push(Answer { queue, head, written: OUT_HEADER });
        }
        for mut asked in std::mem::take(&mut self.held).into_iter().flatten() {
            let written = refuse(memory, &mut asked.chain, &asked.request, Errno::IO)?;
            answers.push(Answer { queue: asked.queue, head: asked.chain.head, written });
        }
        Ok(answers)
    }

    /// Receives the reply that was peeked at into the buffers of its request.
    fn deliver(
        &self,
        memory: &GuestMemory,
        waiting: Waiting,
        reply: ReplyHeader,
        total: usize,
    ) -> Result<Answer, ServeError> {
        let Waiting { queue, head, unique, mut writable } = waiting;
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

    /// Drops the packet that was peeked at.
    fn discard(&self) -> Result<(), ServeError> {
        match recv(&self.socket, &mut [0; OUT_HEADER], RecvFlags::DONTWAIT) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// The relay's number of the request that has the guest's number `unique`.
    fn number_of(&self, unique: u64) -> Option<u64> {
        let called = |it: &InFlight| it.waiting.as_ref().is_some_and(|it| it.unique == unique);
        Some(*self.in_flight.iter().find(|(_, in_flight)| called(in_flight))?.0)
    }
}

/// Whether a header is consistent with its packet: what Linux checks in writes to /dev/fuse.
fn is_true(header: &ReplyHeader, total: usize) -> bool {
    let errors = -ERROR_MAX..=-1;
    header.len as usize == total
        && (header.error == 0 || errors.contains(&header.error) && total == OUT_HEADER)
}

/// Whether one more request of a class may be in flight.
fn has_room(in_flight: &HashMap<u64, InFlight>, class: Class) -> bool {
    // A request in flight counts for its own class and for the quicker ones.
    Class::BOUNDED.into_iter().filter(|bounded| *bounded >= class).all(|bounded| {
        let busy = in_flight.values().filter(|it| it.class <= bounded).count();
        busy < usize::from(bounded.at_once())
    })
}

/// Answers a request without the file server; returns the number of bytes written.
fn refuse(
    memory: &GuestMemory,
    chain: &mut Chain,
    request: &Request,
    errno: Errno,
) -> Result<usize, ServeError> {
    if !request.has_reply() {
        return Ok(0);
    }
    let failure = ReplyHeader::failure(request.unique, errno);
    chain.writable.write(memory, &failure.bytes())?;
    Ok(OUT_HEADER)
}
