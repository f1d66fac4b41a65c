//! The whole device against a driver that knows the protocol, sockets included.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::super::VirtioDevice;
use super::super::mock::{self, Driver, Part, Request};
use super::super::queue::GuestMemory;
use super::connection::BUFFER_BYTES;
use super::packet::{HOST_CID, Operation, Sides, TYPE_STREAM};
use super::*;

mod hostile;

const CID: u32 = 3;
const PORT: u32 = 1025;
const GUEST_BUFFER: u32 = 0x1_0000;
const RX_BYTES: u32 = 4096;

type Opened = Receiver<Result<OwnedFd, OpenError>>;

/// A guest: the driver, the device, and the rx buffers that are on offer.
struct Guest<'m> {
    driver: Driver<'m>,
    vsock: Vsock,
    opener: Opener,
    offered: Vec<Request>,
}

fn logic() -> (Vsock, Opener) {
    let opener = Opener::new().unwrap();
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK).unwrap();
    let muxer = Muxer::new(CID);
    (Vsock { muxer, opener: opener.clone(), timer, timer_set: None, tx_held: false }, opener)
}

impl<'m> Guest<'m> {
    fn new(memory: &'m GuestMemory) -> Self {
        let driver = Driver::new(memory, QUEUE_SIZES);
        let (mut vsock, opener) = logic();
        vsock.start(0, &driver.sources).unwrap();
        Self { driver, vsock, opener, offered: Vec::new() }
    }

    /// Offers buffers to the device.
    fn offer(&mut self, count: usize) {
        for _ in 0..count {
            let request = self.driver.add(RX, &[Part::In(RX_BYTES)]);
            self.offered.push(request);
        }
        self.driver.call(&mut self.vsock, Ready::Queue(RX)).unwrap();
    }

    /// The packets that the device sent meanwhile.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        for (head, len) in self.driver.used(RX) {
            let place = self.offered.iter().position(|request| request.head == head).unwrap();
            let request = self.offered.remove(place);
            let bytes = self.driver.written(&request, len);
            let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
            packets.push((header, bytes[HEADER_BYTES..].to_vec()));
        }
        packets
    }

    /// The one packet that the device sent meanwhile.
    fn one(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    fn operations(&mut self) -> Vec<Operation> {
        self.received().iter().map(|(header, _)| header.operation.unwrap()).collect()
    }

    /// Sends a packet and lets the device take it.
    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header { len: u32::try_from(payload.len()).unwrap(), ..header };
        self.driver.add(TX, &[Part::Out(&header.encode()), Part::Out(payload)]);
        self.driver.call(&mut self.vsock, Ready::Queue(TX)).unwrap();
        assert_eq!(self.driver.used(TX).len(), 1);
    }

    fn open(&mut self, wait: Duration) -> Opened {
        let opened = ask(&self.opener, wait);
        self.source(WAKE);
        opened
    }

    fn source(&mut self, token: u32) {
        self.driver.call(&mut self.vsock, Ready::Source(token)).unwrap();
    }

    /// Opens a stream; gives its host socket and what to send to it.
    fn connect(&mut self) -> (UnixStream, Header) {
        self.offer(1);
        let opened = self.open(Duration::from_secs(9));
        let (request, _) = self.one();
        assert_eq!(request.operation, Some(Operation::Request));
        assert_eq!((request.dst_port, request.buf_alloc), (PORT, BUFFER_BYTES));
        let answer = answer_to(&request, Operation::Response);
        self.send(answer, &[]);
        let socket = UnixStream::from(opened.try_recv().unwrap().unwrap());
        socket.set_nonblocking(true).unwrap();
        (socket, answer)
    }
}

fn ask(opener: &Opener, wait: Duration) -> Opened {
    let (sender, receiver) = channel();
    opener.open(OpenRequest {
        port: PORT,
        deadline: Instant::now() + wait,
        // The test may have dropped the receiver.
        answer: Box::new(move |result| drop(sender.send(result))),
    });
    receiver
}

fn answer_to(header: &Header, operation: Operation) -> Header {
    let back = Header { operation: Some(Operation::Request), ..*header }.refusal().unwrap();
    Header { operation: Some(operation), buf_alloc: GUEST_BUFFER, ..back }
}

fn with(header: Header, operation: Operation) -> Header {
    Header { operation: Some(operation), ..header }
}

fn ending(header: Header, sides: Sides) -> Header {
    Header { sides, ..with(header, Operation::Shutdown) }
}

const SEND: Sides = Sides { receive: false, send: true };
const RECEIVE: Sides = Sides { receive: true, send: false };

fn read_all(socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) if error.kind() == ErrorKind::WouldBlock => bytes,
        Err(error) => panic!("{error}"),
    }
}

/// Whether the socket is at its end, rather than just empty.
fn at_end(socket: &mut UnixStream) -> bool {
    matches!(socket.read(&mut [0]), Ok(0))
}

#[test]
fn bytes_pass_both_ways() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    guest.send(with(to_host, Operation::ReadWrite), b"from the guest");
    assert_eq!(read_all(&mut socket), b"from the guest");
    socket.write_all(b"from the host").unwrap();
    guest.offer(2);
    guest.source(to_host.dst_port);
    let (header, data) = guest.one();
    assert_eq!(
        (header.operation, data.as_slice()),
        (Some(Operation::ReadWrite), &b"from the host"[..])
    );
    assert_eq!(header.fwd_cnt, 14);
}

#[test]
fn a_stream_asked_for_before_the_driver_came_is_opened_after() {
    let memory = mock::memory();
    let (mut vsock, opener) = logic();
    let opened = ask(&opener, Duration::from_secs(9));
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    vsock.start(0, &driver.sources).unwrap();
    driver.call(&mut vsock, Ready::Source(WAKE)).unwrap();
    driver.add(RX, &[Part::In(RX_BYTES)]);
    driver.call(&mut vsock, Ready::Queue(RX)).unwrap();
    assert_eq!(driver.used(RX).len(), 1);
    assert!(opened.try_recv().is_err());
}

#[test]
fn a_request_survives_a_reset_of_the_driver() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    guest.offer(1);
    let opened = guest.open(Duration::from_secs(9));
    assert_eq!(guest.operations(), [Operation::Request]);
    guest.vsock.stop(&guest.driver.sources);
    guest.vsock.start(0, &guest.driver.sources).unwrap();
    guest.source(WAKE);
    guest.offer(1);
    assert_eq!(guest.operations(), [Operation::Request]);
    assert!(opened.try_recv().is_err());
}

#[test]
fn requests_that_nobody_serves_expire() {
    let (_vsock, opener) = logic();
    let soon = ask(&opener, Duration::ZERO);
    let late = ask(&opener, Duration::from_secs(9));
    assert!(opener.expire(Instant::now()).is_some());
    assert!(matches!(soon.try_recv().unwrap(), Err(OpenError::TimedOut)));
    assert!(late.try_recv().is_err());
}

#[test]
fn a_refused_request_is_repeated_until_its_deadline() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let opened = guest.open(Duration::from_millis(55));
    let mut requests = 0;
    let result = loop {
        guest.offer(1);
        for (header, _) in guest.received() {
            assert_eq!(header.operation, Some(Operation::Request));
            requests += 1;
            guest.send(answer_to(&header, Operation::Reset), &[]);
        }
        if let Ok(result) = opened.try_recv() {
            break result;
        }
        std::thread::sleep(Duration::from_millis(1));
        guest.source(TIMER);
    };
    assert!(matches!(result, Err(OpenError::Refused)));
    assert!((3..7).contains(&requests), "{requests}");
}

#[test]
fn a_refused_request_is_repeated_at_once_when_the_guest_knocks() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    guest.offer(1);
    let opened = guest.open(Duration::from_secs(9));
    let (request, _) = guest.one();
    guest.send(answer_to(&request, Operation::Reset), &[]);
    let knock = Header { dst_port: PORT, ..answer_to(&request, Operation::Request) };
    guest.send(knock, &[]);
    guest.offer(2);
    assert_eq!(guest.operations(), [Operation::Reset, Operation::Request]);
    assert!(opened.try_recv().is_err());
}

#[test]
fn a_request_without_answer_times_out_and_a_late_answer_is_reset() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    guest.offer(2);
    let opened = guest.open(Duration::from_millis(2));
    let (request, _) = guest.one();
    std::thread::sleep(Duration::from_millis(3));
    guest.source(TIMER);
    assert!(matches!(opened.try_recv().unwrap(), Err(OpenError::TimedOut)));
    guest.send(answer_to(&request, Operation::Response), &[]);
    assert_eq!(guest.operations(), [Operation::Reset]);
}

#[test]
fn the_timer_rings_for_the_deadline() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let _opened = guest.open(Duration::from_millis(5));
    std::thread::sleep(Duration::from_millis(10));
    rustix::io::read(&guest.vsock.timer, &mut [0; 8]).unwrap();
}

#[test]
fn the_hosts_end_reaches_the_guest_after_the_data() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    socket.write_all(b"last words").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    guest.offer(4);
    guest.source(to_host.dst_port);
    let packets = guest.received();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!((packets[1].0.operation, packets[1].0.sides), (Some(Operation::Shutdown), SEND));
    assert_eq!(packets.len(), 2);
    guest.send(with(to_host, Operation::ReadWrite), b"still here");
    assert_eq!(read_all(&mut socket), b"still here");
}

#[test]
fn a_host_that_closed_ends_both_directions() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    socket.write_all(b"bye").unwrap();
    drop(socket);
    guest.offer(4);
    guest.source(to_host.dst_port);
    let packets = guest.received();
    assert_eq!(packets[0].1, b"bye");
    assert_eq!(packets.last().unwrap().0.sides, Sides::BOTH);
    guest.send(with(to_host, Operation::Reset), &[]);
    assert!(!guest.vsock.muxer.has_output());
}

#[test]
fn the_guests_end_reaches_the_host_after_the_data() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    guest.send(with(to_host, Operation::ReadWrite), b"done");
    guest.send(ending(to_host, SEND), &[]);
    assert_eq!(read_all(&mut socket), b"done");
    assert!(at_end(&mut socket));
    socket.write_all(b"ok").unwrap();
    guest.offer(1);
    guest.source(to_host.dst_port);
    assert_eq!(guest.one().1, b"ok");
}

#[test]
fn a_guest_that_reads_no_more_ends_the_hosts_writing() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    guest.send(ending(to_host, RECEIVE), &[]);
    assert_eq!(socket.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(with(to_host, Operation::ReadWrite), b"one way");
    assert_eq!(read_all(&mut socket), b"one way");
}

#[test]
fn a_guest_that_closes_gets_a_reset() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    guest.offer(1);
    guest.send(with(to_host, Operation::ReadWrite), b"bye");
    guest.send(ending(to_host, Sides::BOTH), &[]);
    assert_eq!(guest.operations(), [Operation::Reset]);
    assert_eq!(read_all(&mut socket), b"bye");
    assert!(at_end(&mut socket));
}

#[test]
fn when_both_sides_sent_all_the_stream_is_over() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (socket, to_host) = guest.connect();
    guest.send(ending(to_host, SEND), &[]);
    socket.shutdown(Shutdown::Write).unwrap();
    guest.offer(3);
    guest.source(to_host.dst_port);
    assert_eq!(guest.received().last().unwrap().0.sides, Sides::BOTH);
}

/// Sends this many bytes, more than the host socket takes, and returns them.
fn send_until_kept(guest: &mut Guest<'_>, to_host: Header, total: usize) -> Vec<u8> {
    let bytes: Vec<u8> = (0..total).map(|at| u8::try_from(at % 251).unwrap()).collect();
    for chunk in bytes.chunks(0x8000) {
        guest.send(with(to_host, Operation::ReadWrite), chunk);
    }
    bytes
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    let sent = send_until_kept(&mut guest, to_host, BUFFER_BYTES as usize);
    guest.offer(8);
    let told = guest.received().last().map_or(0, |(header, _)| header.fwd_cnt);
    assert!(told < BUFFER_BYTES, "credit was given for bytes that nobody read");
    let mut read = Vec::new();
    while read.len() < sent.len() {
        let more = read_all(&mut socket);
        assert!(!more.is_empty(), "stalled at {}", read.len());
        read.extend(more);
        guest.source(to_host.dst_port);
    }
    assert!(read == sent);
    guest.send(with(to_host, Operation::CreditRequest), &[]);
    let (header, _) = guest.received().pop().unwrap();
    assert_eq!(header.fwd_cnt, BUFFER_BYTES);
}

#[test]
fn a_guest_that_closes_with_a_slow_host_still_delivers_all() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    let sent = send_until_kept(&mut guest, to_host, BUFFER_BYTES as usize);
    guest.send(ending(to_host, Sides::BOTH), &[]);
    let mut read = Vec::new();
    while !at_end_after(&mut socket, &mut read) {
        guest.source(to_host.dst_port);
    }
    assert!(read == sent);
}

fn at_end_after(socket: &mut UnixStream, read: &mut Vec<u8>) -> bool {
    socket.read_to_end(read).is_ok()
}

#[test]
fn nothing_is_read_from_the_host_without_a_buffer_or_credit() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    let mut written = 0;
    while let Ok(count) = socket.write(&[7; 0x4000]) {
        written += count;
        guest.source(to_host.dst_port);
    }
    assert!(written < 1 << 20, "the device took {written} bytes without a buffer");
    guest.offer(64);
    let mut taken = 0;
    let mut asked = 0;
    for (header, data) in guest.received() {
        taken += data.len();
        asked += usize::from(header.operation == Some(Operation::CreditRequest));
    }
    assert_eq!((taken, asked), (GUEST_BUFFER as usize, 1));
    guest.offer(8);
    assert!(guest.received().is_empty());
    guest.send(Header { fwd_cnt: 1000, ..with(to_host, Operation::CreditUpdate) }, &[]);
    let more: usize = guest.received().iter().map(|(_, data)| data.len()).sum();
    assert_eq!(more, 1000);
}

#[test]
fn a_credit_request_is_answered() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (_socket, to_host) = guest.connect();
    guest.offer(1);
    guest.send(with(to_host, Operation::CreditRequest), &[]);
    let (header, _) = guest.one();
    assert_eq!((header.operation, header.buf_alloc), (Some(Operation::CreditUpdate), BUFFER_BYTES));
}

#[test]
fn the_configuration_space_holds_the_context_id() {
    let (device, _opener) = device(CID).unwrap();
    let mut cid = [0; 8];
    device.config().read(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID));
    assert!(super::device(2).is_err());
}
