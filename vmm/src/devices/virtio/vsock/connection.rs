//! One stream between a host socket and a guest socket: its state, VIRTIO 1.2 §5.10.6.3–5.
//!
//! Pure: no descriptor and no guest memory, so that credit and shutdown can be tested alone.
//! [`super::stream`] moves the bytes. "Ended" sides are always named from the point of view of the
//! peer that ended them.

use std::collections::VecDeque;

use super::packet::{Header, Sides};

/// Guest bytes that may wait for a host reader: the credit of a guest at first.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;
/// After this many consumed bytes the guest is told its credit in a packet of its own.
const UPDATE_BYTES: u32 = 64 << 10;
/// The largest payload of one packet to the guest; more would let one stream hold up the others.
const PAYLOAD_MAX: u32 = 64 << 10;

/// What is to be sent to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// These directions have ended.
    Shutdown(Sides),
    /// The guest has room again, or asked how much it has.
    CreditUpdate,
    /// The host has bytes to send and waits for credit.
    CreditRequest,
    /// Up to this many bytes of the host.
    Data(u32),
}

/// What to do with bytes that the guest sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Pass them on.
    Deliver,
    /// Nobody reads them any more.
    Discard,
    /// The guest sent more than its credit allows, or sent after it had ended sending.
    Violation,
}

/// The state of a stream.
#[derive(Debug)]
pub(super) struct Connection {
    guest_port: u32,
    guest_ended: Sides,
    host_ended: Sides,
    /// The part of `host_ended` that the guest was told.
    told: Sides,
    /// Guest bytes that the host socket did not take yet.
    backlog: VecDeque<u8>,
    credit: Credit,
    /// The guest asked for its credit.
    update_asked: bool,
    /// The host asked for credit and has not got any since.
    credit_asked: bool,
}

/// The counters of §5.10.6.3; all wrap.
#[derive(Debug, Default)]
struct Credit {
    /// Guest bytes that ever left the buffer.
    forwarded: u32,
    /// The last value of `forwarded` that the guest was told.
    advertised: u32,
    /// Host bytes ever sent.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
}

impl Credit {
    /// Bytes that the guest has room for; 0 when its counters make no sense.
    fn room(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(in_flight)
    }
}

impl Connection {
    /// A stream that the guest's listener at `guest_port` accepted with this response.
    pub(super) fn new(guest_port: u32, response: &Header) -> Self {
        let mut connection = Self {
            guest_port,
            guest_ended: Sides::default(),
            host_ended: Sides::default(),
            told: Sides::default(),
            backlog: VecDeque::new(),
            credit: Credit::default(),
            update_asked: false,
            credit_asked: false,
        };
        connection.note_credit(response);
        connection
    }

    pub(super) fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// Takes the credit fields that every packet has.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.credit.guest_buffer = header.buf_alloc;
        self.credit.guest_forwarded = header.fwd_cnt;
        if self.credit.room() > 0 {
            self.credit_asked = false;
        }
    }

    /// The guest asks for its credit.
    pub(super) fn note_credit_request(&mut self) {
        self.update_asked = true;
    }

    /// The guest ended directions; those that it ended before stay ended.
    pub(super) fn note_guest_end(&mut self, sides: Sides) {
        self.guest_ended = self.guest_ended.union(sides);
    }

    /// The host socket has no more bytes.
    pub(super) fn note_host_end(&mut self) {
        self.host_ended.send = true;
    }

    /// The host socket has no reader any more. Bytes may still be read from it.
    pub(super) fn note_host_gone(&mut self) {
        self.host_ended.receive = true;
        if self.guest_ended.receive {
            self.host_ended.send = true;
        }
        let lost = self.backlog.len();
        self.backlog = VecDeque::new();
        self.note_forwarded(lost);
    }

    /// Decides what to do with `len` bytes that the guest sends.
    pub(super) fn judge(&self, len: usize) -> Incoming {
        if self.guest_ended.send || self.backlog.len() + len > BUFFER_BYTES as usize {
            Incoming::Violation
        } else if self.host_ended.receive || self.told.receive {
            Incoming::Discard
        } else {
            Incoming::Deliver
        }
    }

    /// `len` bytes have left the buffer: the host socket took them, or they were discarded.
    pub(super) fn note_forwarded(&mut self, len: usize) {
        // The counter wraps by design, and `len` is at most the buffer.
        let len = u32::try_from(len).unwrap_or(0);
        self.credit.forwarded = self.credit.forwarded.wrapping_add(len);
    }

    /// Bytes that wait for the host socket.
    pub(super) fn backlog(&mut self) -> &mut VecDeque<u8> {
        &mut self.backlog
    }

    /// The guest ended both directions: the answer is a reset, and the stream is over once the
    /// backlog is empty.
    pub(super) fn ended_by_guest(&self) -> bool {
        self.guest_ended == Sides::BOTH
    }

    /// The guest was told that both directions have ended: only its reset is missing.
    pub(super) fn ended_by_host(&self) -> bool {
        self.told == Sides::BOTH
    }

    /// No byte will go to the host socket any more.
    pub(super) fn delivered_all(&self) -> bool {
        self.guest_ended.send && self.backlog.is_empty()
    }

    /// The guest reads no more.
    pub(super) fn guest_deaf(&self) -> bool {
        self.guest_ended.receive
    }

    /// The host socket is at its end, or the guest does not read any more.
    pub(super) fn reads_no_more(&self) -> bool {
        self.host_ended.send || self.guest_ended.receive
    }

    /// What to send next; `readable` says whether the host socket may have bytes.
    pub(super) fn next(&self, readable: bool) -> Option<Outgoing> {
        if self.ended_by_guest() || self.ended_by_host() {
            return None;
        }
        let ended = self.ended();
        if ended != self.told {
            return Some(Outgoing::Shutdown(ended));
        }
        let untold = self.credit.forwarded.wrapping_sub(self.credit.advertised);
        if self.update_asked || untold >= UPDATE_BYTES {
            return Some(Outgoing::CreditUpdate);
        }
        if !readable || self.reads_no_more() {
            return None;
        }
        match self.credit.room() {
            0 => (!self.credit_asked).then_some(Outgoing::CreditRequest),
            room => Some(Outgoing::Data(room.min(PAYLOAD_MAX))),
        }
    }

    /// The directions that the host has ended; both if neither side sends any more.
    fn ended(&self) -> Sides {
        if self.host_ended.send && self.delivered_all() { Sides::BOTH } else { self.host_ended }
    }

    /// Notes what was sent, with `len` bytes of payload, and returns the credit fields
    /// (`buf_alloc`, `fwd_cnt`) for its header.
    pub(super) fn note_sent(&mut self, packet: Outgoing, len: u32) -> (u32, u32) {
        match packet {
            Outgoing::Shutdown(sides) => self.told = sides,
            Outgoing::CreditRequest => self.credit_asked = true,
            Outgoing::CreditUpdate => {}
            Outgoing::Data(_) => self.credit.sent = self.credit.sent.wrapping_add(len),
        }
        self.update_asked = false;
        self.credit.advertised = self.credit.forwarded;
        (BUFFER_BYTES, self.credit.forwarded)
    }
}

#[cfg(test)]
mod tests;
