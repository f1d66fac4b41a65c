//! One stream between a host socket and a guest socket: its state, VIRTIO 1.2 §5.10.6.3–5.
//!
//! Pure: no descriptor and no guest memory, so that credit and shutdown can be tested alone.
//! [`super::stream`] moves the bytes. "Ended" sides are always seen from who ended them.

use std::collections::VecDeque;

use super::packet::{Header, Sides};

/// Guest bytes that may wait for a host reader, which is the credit a guest has at first.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;
/// Consumed bytes that are worth a packet of their own to tell.
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
    /// The host waits for room.
    CreditRequest,
    /// Up to so many bytes of the host's.
    Data(u32),
}

/// What to do with bytes that the guest sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Pass them on.
    Deliver,
    /// Nobody reads them any more.
    Discard,
    /// The guest sent more than it may, or after it said that it would not.
    Violation,
}

/// The state of a stream.
#[derive(Debug)]
pub(super) struct Connection {
    guest_port: u32,
    guest_ended: Sides,
    host_ended: Sides,
    /// What of `host_ended` the guest was told.
    told: Sides,
    /// Guest bytes that the host socket did not take yet.
    backlog: VecDeque<u8>,
    credit: Credit,
    /// The guest asked for its credit.
    update_asked: bool,
    /// The host asked for credit and did not get any since.
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
    /// A stream that the guest's listener at `guest_port` took with this response.
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

    /// The guest ended directions; those ended before stay so.
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

    /// Judges `len` bytes that the guest sends.
    pub(super) fn judge(&self, len: usize) -> Incoming {
        if self.guest_ended.send || self.backlog.len() + len > BUFFER_BYTES as usize {
            Incoming::Violation
        } else if self.host_ended.receive || self.told.receive {
            Incoming::Discard
        } else {
            Incoming::Deliver
        }
    }

    /// The host socket took, or nobody wants, `len` bytes.
    pub(super) fn note_forwarded(&mut self, len: usize) {
        // The counter wraps by design, and `len` is at most the buffer.
        let len = u32::try_from(len).unwrap_or(0);
        self.credit.forwarded = self.credit.forwarded.wrapping_add(len);
    }

    /// Bytes that wait for the host socket.
    pub(super) fn backlog(&mut self) -> &mut VecDeque<u8> {
        &mut self.backlog
    }

    /// The guest ended both directions: it is to be answered with a reset, and the stream is over
    /// once the backlog is.
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

    /// The host socket's end was seen, or does not matter.
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

    /// The host's ends; when neither side sends any more, nobody receives either.
    fn ended(&self) -> Sides {
        if self.host_ended.send && self.delivered_all() { Sides::BOTH } else { self.host_ended }
    }

    /// Notes what was sent, `len` bytes of payload, and gives the credit fields
    /// (`buf_alloc`, `fwd_cnt`) of its header.
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
