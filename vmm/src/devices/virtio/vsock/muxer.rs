//! All streams of one guest, by port, and what waits to be sent into it.
//!
//! Only the host opens connections; a guest that requests one is refused. Host ports are assigned
//! in turn and each names one stream, so the port is the key of the stream and the epoll token of
//! its socket. A packet must name the right guest port as well.
//!
//! Each try sends one request. Virtqueues lose nothing: a guest that has not answered will do so,
//! and a second request would make its listener accept twice. A refusal, on the other hand, means
//! that nothing listens yet, so the request is repeated until the deadline: now and then, and at
//! once when the guest requests a connection itself. It gets none, but that is how its agent knocks
//! when it has begun to listen.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmm_sys_util::epoll::EventSet;

use super::super::queue::{Buffers, GuestMemory, QueueError};
use super::super::worker::Sources;
use super::connection::{BUFFER_BYTES, Connection, Outgoing};
use super::opener::{OpenError, OpenRequest};
use super::packet::{HEADER_BYTES, HOST_CID, Header, Operation, Sides, TYPE_STREAM};
use super::stream::Stream;
use crate::devices::rate_limit::guest_warn;

/// Streams and pending requests together.
pub(super) const STREAMS_MAX: usize = 1024;
/// Resets that may wait for a buffer before the guest's packets have to wait themselves.
const RESETS_MAX: usize = 64;
/// Range of host ports, which are also tokens and must not be those of the device itself.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = u32::MAX - 1;
/// Time until a refused request is repeated, if the guest does not knock.
const RETRY: Duration = Duration::from_millis(10);

/// A request that the guest has not taken.
#[derive(Debug)]
struct Opening {
    request: OpenRequest,
    phase: Phase,
    refused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// In the line, to be sent.
    Due,
    /// Sent.
    Asked,
    /// Refused, to be repeated.
    Waiting(Instant),
}

/// The streams of a guest.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    pub(super) next_port: u32,
    openings: BTreeMap<u32, Opening>,
    streams: BTreeMap<u32, Stream>,
    /// Host ports with something to send, each once.
    line: VecDeque<u32>,
    /// Resets that belong to no stream.
    resets: VecDeque<Header>,
}

impl Muxer {
    pub(super) fn new(guest_cid: u32) -> Self {
        Self {
            guest_cid: u64::from(guest_cid),
            next_port: FIRST_PORT,
            openings: BTreeMap::new(),
            streams: BTreeMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
        }
    }

    /// Starts to open a stream.
    pub(super) fn open(&mut self, request: OpenRequest) {
        if self.openings.len() + self.streams.len() >= STREAMS_MAX && !self.evict() {
            return (request.answer)(Err(OpenError::Busy));
        }
        let port = self.take_port();
        let phase = Phase::Due;
        let opening = Opening { request, phase, refused: false };
        self.openings.insert(port, opening);
        self.line.push_back(port);
    }

    /// Fails requests that are overdue, and repeats those that were refused.
    pub(super) fn tick(&mut self, now: Instant) {
        let overdue = self.openings.extract_if(.., |_, opening| opening.request.deadline <= now);
        for (_, opening) in overdue {
            let error = if opening.refused { OpenError::Refused } else { OpenError::TimedOut };
            (opening.request.answer)(Err(error));
        }
        self.repeat(|until| until <= now);
    }

    /// When [`Self::tick`] has something to do next.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let due = |opening: &Opening| match opening.phase {
            Phase::Waiting(until) => until.min(opening.request.deadline),
            Phase::Due | Phase::Asked => opening.request.deadline,
        };
        self.openings.values().map(due).min()
    }

    /// Takes a packet of the guest; its payload follows in `payload`.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        payload: &mut Buffers,
        memory: &GuestMemory,
        sources: &Sources,
    ) -> Result<(), QueueError> {
        if header.src_cid != self.guest_cid {
            guest_warn!("vsock: packet in the name of context {} dropped", header.src_cid);
            return Ok(());
        }
        let port = header.dst_port;
        if header.kind != TYPE_STREAM || header.dst_cid != HOST_CID {
            self.refuse(header);
        } else if self.opening_of(header).is_some() {
            self.receive_answer(header, sources);
        } else if let Some(stream) = self.streams.get_mut(&port)
            && stream.state.guest_port() == header.src_port
        {
            let alive = receive_in(stream, header, payload, memory)?;
            self.look_after(port, header, alive);
        } else {
            self.refuse(header);
            if header.operation == Some(Operation::Request) {
                self.repeat(|_| true);
            }
        }
        Ok(())
    }

    /// The socket of this port became ready.
    pub(super) fn on_edge(&mut self, port: u32) {
        let Some(stream) = self.streams.get_mut(&port) else { return };
        stream.on_edge();
        if stream.is_over() {
            self.streams.remove(&port);
        } else {
            self.enqueue(port);
        }
    }

    /// Whether resets pile up: the guest must take some before more of its packets are read.
    pub(super) fn is_clogged(&self) -> bool {
        self.resets.len() >= RESETS_MAX
    }

    /// Whether something may be there to send.
    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// Fills one buffer of the guest with the next packet; `None` if there was nothing to send. In
    /// that case part of `room` may be consumed.
    pub(super) fn fill(
        &mut self,
        memory: &GuestMemory,
        room: &mut Buffers,
    ) -> Result<Option<usize>, QueueError> {
        if let Some(reset) = self.resets.pop_front() {
            room.write(memory, &reset.encode())?;
            return Ok(Some(HEADER_BYTES));
        }
        while let Some(port) = self.line.pop_front() {
            if let Some(opening) = self.openings.get_mut(&port) {
                opening.phase = Phase::Asked;
                let guest_port = opening.request.port;
                let mut header = self.header(port, guest_port, Operation::Request);
                header.buf_alloc = BUFFER_BYTES;
                room.write(memory, &header.encode())?;
                return Ok(Some(HEADER_BYTES));
            }
            let Some(stream) = self.streams.get_mut(&port) else { continue };
            stream.queued = false;
            let Some(packet) = stream.next() else { continue };
            let filled = self.fill_from(port, packet, memory, room)?;
            self.enqueue(port);
            return Ok(filled);
        }
        Ok(None)
    }

    /// Bytes of the guest that wait for host sockets.
    #[cfg(test)]
    pub(super) fn kept_bytes(&mut self) -> usize {
        self.streams.values_mut().map(|stream| stream.state.backlog().len()).sum()
    }

    /// The driver is gone: streams end, requests start anew with the next driver.
    pub(super) fn reset(&mut self) -> impl Iterator<Item = OpenRequest> + use<> {
        self.streams.clear();
        self.line.clear();
        self.resets.clear();
        std::mem::take(&mut self.openings).into_values().map(|opening| opening.request)
    }

    /// Sends `packet` of the stream at `port`.
    fn fill_from(
        &mut self,
        port: u32,
        packet: Outgoing,
        memory: &GuestMemory,
        room: &mut Buffers,
    ) -> Result<Option<usize>, QueueError> {
        let Some(stream) = self.streams.get_mut(&port) else { return Ok(None) };
        let place = room.slices(memory, HEADER_BYTES)?;
        let mut len = 0;
        let (operation, sides) = match packet {
            Outgoing::Shutdown(sides) => (Operation::Shutdown, sides),
            Outgoing::CreditUpdate => (Operation::CreditUpdate, Sides::default()),
            Outgoing::CreditRequest => (Operation::CreditRequest, Sides::default()),
            Outgoing::Data(limit) => {
                let data = room.slices(memory, limit as usize)?;
                let Some(count) = stream.read(&data) else { return Ok(None) };
                len = count;
                (Operation::ReadWrite, Sides::default())
            }
        };
        // At most what `limit` allowed.
        let len_field = u32::try_from(len).unwrap_or(0);
        let (buf_alloc, fwd_cnt) = stream.state.note_sent(packet, len_field);
        stream.settle();
        let guest_port = stream.state.guest_port();
        let plain = self.header(port, guest_port, operation);
        let header = Header { len: len_field, sides, buf_alloc, fwd_cnt, ..plain };
        let encoded = header.encode();
        let mut rest = encoded.as_slice();
        for slice in place {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
        }
        Ok(Some(HEADER_BYTES + len))
    }

    /// The guest takes or refuses a request.
    fn receive_answer(&mut self, header: &Header, sources: &Sources) {
        let port = header.dst_port;
        match header.operation {
            Some(Operation::Response) => {
                let Some(opening) = self.openings.remove(&port) else { return };
                match connect(port, sources) {
                    Ok((own, theirs)) => {
                        let state = Connection::new(header.src_port, header);
                        self.streams.insert(port, Stream::new(state, own));
                        self.enqueue(port);
                        (opening.request.answer)(Ok(theirs));
                    }
                    Err(error) => {
                        self.refuse(header);
                        (opening.request.answer)(Err(error.into()));
                    }
                }
            }
            Some(Operation::Reset) => {
                let Some(opening) = self.openings.get_mut(&port) else { return };
                opening.refused = true;
                opening.phase = Phase::Waiting(Instant::now() + RETRY);
            }
            // No other packet is valid before the stream is open.
            _ => self.refuse(header),
        }
    }

    /// After a packet: resets, removes or queues the stream as its state requires.
    fn look_after(&mut self, port: u32, header: &Header, alive: bool) {
        let Some(stream) = self.streams.get(&port) else { return };
        let reset_by_guest = header.operation == Some(Operation::Reset);
        let ended = stream.state.ended_by_guest();
        let over = stream.is_over();
        if !alive || (ended && !reset_by_guest && header.operation == Some(Operation::Shutdown)) {
            self.refuse(header);
        }
        // After an orderly shutdown, the bytes before it must still reach the host.
        if !alive || over || (reset_by_guest && !ended) {
            self.streams.remove(&port);
        } else {
            self.enqueue(port);
        }
    }

    /// Repeats the refused requests whose time to wait for is `due`.
    fn repeat(&mut self, due: impl Fn(Instant) -> bool) {
        for (port, opening) in &mut self.openings {
            if matches!(opening.phase, Phase::Waiting(until) if due(until)) {
                opening.phase = Phase::Due;
                self.line.push_back(*port);
            }
        }
    }

    /// Answers with a reset.
    fn refuse(&mut self, header: &Header) {
        self.resets.extend(header.refusal());
    }

    /// The pending request that a packet answers.
    fn opening_of(&self, header: &Header) -> Option<&Opening> {
        self.openings.get(&header.dst_port).filter(|opening| {
            opening.phase == Phase::Asked && opening.request.port == header.src_port
        })
    }

    /// Puts a stream in the line if it has something to send.
    fn enqueue(&mut self, port: u32) {
        if let Some(stream) = self.streams.get_mut(&port)
            && !stream.queued
            && stream.next().is_some()
        {
            stream.queued = true;
            self.line.push_back(port);
        }
    }

    /// Removes a stream that only waits for the guest's reset; `false` if there is none.
    fn evict(&mut self) -> bool {
        let closing = self.streams.iter().find(|(_, stream)| stream.is_closing());
        let Some((&port, stream)) = closing else { return false };
        let reset = self.header(port, stream.state.guest_port(), Operation::Reset);
        self.resets.push_back(reset);
        self.streams.remove(&port).is_some()
    }

    /// A host port that is not in use.
    pub(super) fn take_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            // The highest number is reserved (VMADDR_PORT_ANY).
            self.next_port = if port >= LAST_PORT { FIRST_PORT } else { port + 1 };
            if !self.streams.contains_key(&port) && !self.openings.contains_key(&port) {
                return port;
            }
        }
    }

    fn header(&self, host_port: u32, guest_port: u32, operation: Operation) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            len: 0,
            kind: TYPE_STREAM,
            operation: Some(operation),
            sides: Sides::default(),
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// Takes a packet of an open stream; `false` when the guest broke the stream's rules.
fn receive_in(
    stream: &mut Stream,
    header: &Header,
    payload: &mut Buffers,
    memory: &GuestMemory,
) -> Result<bool, QueueError> {
    stream.state.note_credit(header);
    match header.operation {
        Some(Operation::ReadWrite) => stream.deliver(memory, payload, header.len as usize),
        Some(Operation::Shutdown) => {
            stream.state.note_guest_end(header.sides);
            stream.settle();
            Ok(true)
        }
        Some(Operation::CreditRequest) => {
            stream.state.note_credit_request();
            Ok(true)
        }
        Some(Operation::CreditUpdate | Operation::Reset) => Ok(true),
        Some(Operation::Request | Operation::Response) | None => Ok(false),
    }
}

/// Makes a pair of sockets: one for the muxer, which is watched, and one for the caller.
fn connect(port: u32, sources: &Sources) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (own, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let edges = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    sources.add(&own, port, edges)?;
    Ok((own, theirs))
}
