//! Guests that break the protocol, and callers that want too much.

use super::super::muxer::STREAMS_MAX;
use super::*;

#[test]
fn a_packet_that_fits_no_stream_is_reset_and_a_reset_is_not_answered() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (_socket, to_host) = guest.connect();
    guest.offer(8);
    let other_port = Header { src_port: PORT + 1, ..to_host };
    guest.send(with(other_port, Operation::ReadWrite), b"x");
    guest.send(with(Header { kind: 9, ..to_host }, Operation::ReadWrite), b"x");
    guest.send(Header { operation: None, ..to_host }, &[]);
    assert_eq!(guest.operations(), [Operation::Reset; 3]);
    guest.send(with(other_port, Operation::Reset), &[]);
    guest.send(Header { src_cid: 99, ..with(to_host, Operation::ReadWrite) }, b"x");
    assert!(guest.received().is_empty());
}

#[test]
fn a_guest_that_takes_no_resets_has_to_wait() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (_socket, to_host) = guest.connect();
    let stray = with(Header { src_port: 9, ..to_host }, Operation::ReadWrite).encode();
    for _ in 0..200 {
        guest.driver.add(TX, &[Part::Out(&stray)]);
    }
    guest.driver.call(&mut guest.vsock, Ready::Queue(TX)).unwrap();
    let taken = guest.driver.used(TX).len();
    assert!(taken < 100, "{taken}");
    for _ in 0..10 {
        guest.offer(50);
        let _ = guest.received();
        guest.driver.call(&mut guest.vsock, Ready::Queue(TX)).unwrap();
    }
    assert_eq!(taken + guest.driver.used(TX).len(), 200);
}

#[test]
fn streams_are_bounded_and_those_only_waiting_for_the_guest_make_room() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (socket, to_host) = guest.connect();
    let mut waiting = Vec::new();
    for _ in 0..STREAMS_MAX - 1 {
        waiting.push(guest.open(Duration::from_secs(9)));
    }
    let busy = guest.open(Duration::from_secs(9));
    assert!(matches!(busy.try_recv().unwrap(), Err(OpenError::Busy)));
    drop(socket);
    guest.source(to_host.dst_port);
    let told = (0..20).any(|_| {
        guest.offer(100);
        guest.received().iter().any(|(header, _)| header.sides == Sides::BOTH)
    });
    assert!(told, "the end was not told");
    let taken = guest.open(Duration::from_secs(9));
    assert!(taken.try_recv().is_err());
    guest.offer(2);
    assert!(guest.operations().contains(&Operation::Reset));
}

#[test]
fn the_queue_of_requests_is_bounded() {
    let opener = Opener::new().unwrap();
    let mut answers: Vec<_> = (0..300).map(|_| ask(&opener, Duration::from_secs(9))).collect();
    let last = answers.pop().unwrap();
    assert!(matches!(last.try_recv().unwrap(), Err(OpenError::Busy)));
    assert!(answers[0].try_recv().is_err());
}

#[test]
fn host_ports_come_round_without_meeting() {
    let mut muxer = Muxer::new(CID);
    let ports: Vec<u32> = (0..3).map(|_| muxer.take_port()).collect();
    assert_eq!(ports[1], ports[0] + 1);
    muxer.next_port = u32::MAX - 1;
    assert_eq!(muxer.take_port(), u32::MAX - 1);
    assert_eq!(muxer.take_port(), ports[0]);
}

#[test]
fn a_failed_device_answers_who_waits() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let opened = guest.open(Duration::from_secs(9));
    guest.driver.add(TX, &[Part::Out(b"short")]);
    assert!(guest.driver.call(&mut guest.vsock, Ready::Queue(TX)).is_err());
    assert!(matches!(opened.try_recv().unwrap(), Err(OpenError::Gone)));
}

#[test]
fn a_length_beyond_the_chain_fails_the_device() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (_socket, to_host) = guest.connect();
    let liar = Header { len: 9, ..with(to_host, Operation::ReadWrite) };
    guest.driver.add(TX, &[Part::Out(&liar.encode()), Part::Out(b"eight by")]);
    assert!(guest.driver.call(&mut guest.vsock, Ready::Queue(TX)).is_err());
}

#[test]
fn a_receive_buffer_without_room_fails_the_device() {
    let memory = mock::memory();
    for parts in [&[Part::In(44)][..], &[Part::Out(b"?"), Part::In(4096)][..]] {
        let mut guest = Guest::new(&memory);
        let _opened = guest.open(Duration::from_secs(9));
        guest.driver.add(RX, parts);
        assert!(guest.driver.call(&mut guest.vsock, Ready::Queue(RX)).is_err());
    }
}

#[test]
fn malformed_chains_are_survived() {
    mock::survives_malformed(QUEUE_SIZES, || {
        let (mut vsock, opener) = logic();
        // Something to send, so that rx buffers are looked at.
        let _opened = ask(&opener, Duration::from_secs(9));
        opener.take().into_iter().for_each(|request| vsock.muxer.open(request));
        vsock
    });
    mock::survives_noise(QUEUE_SIZES, 300, || logic().0);
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (socket, to_host) = guest.connect();
    guest.offer(64);
    let mut sent = 0;
    let chunk = [0; 0x8000];
    while !guest.operations().contains(&Operation::Reset) {
        guest.send(with(to_host, Operation::ReadWrite), &chunk);
        sent += chunk.len();
        assert!(sent < 4 << 20, "never reset");
    }
    drop(socket);
}

#[test]
fn a_guest_cannot_open_a_stream() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    guest.offer(1);
    let wish = Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: 7,
        dst_port: 22,
        len: 0,
        kind: TYPE_STREAM,
        operation: Some(Operation::Request),
        sides: Sides::default(),
        buf_alloc: GUEST_BUFFER,
        fwd_cnt: 0,
    };
    guest.send(wish, &[]);
    let (header, _) = guest.one();
    assert_eq!((header.operation, header.dst_port), (Some(Operation::Reset), 7));
}

#[test]
fn counters_that_make_no_sense_give_no_credit() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory);
    let (mut socket, to_host) = guest.connect();
    guest.send(Header { fwd_cnt: 5, ..with(to_host, Operation::CreditUpdate) }, &[]);
    socket.write_all(b"x").unwrap();
    guest.offer(4);
    guest.source(to_host.dst_port);
    assert_eq!(guest.operations(), [Operation::CreditRequest]);
}

#[test]
fn no_sequence_of_packets_breaks_the_device() {
    let memory = mock::memory();
    let mut random = mock::Random(11);
    for _ in 0..60 {
        let mut guest = Guest::new(&memory);
        let (mut socket, to_host) = guest.connect();
        let _second = guest.connect();
        for _ in 0..60 {
            match random.below(8) {
                0 => guest.offer(3),
                1 => drop(socket.write(&[1; 5000])),
                2 => drop(socket.read(&mut [0; 0x1_0000])),
                3 => guest.source(to_host.dst_port + u32::try_from(random.below(3)).unwrap()),
                4 if random.below(10) == 0 => drop(socket.shutdown(Shutdown::Write)),
                5 if random.below(10) == 0 => drop(guest.open(Duration::from_millis(1))),
                _ => {
                    let (header, len) = any_packet(&mut random, to_host);
                    guest.send(header, &vec![0; len]);
                }
            }
            let _ = guest.received();
        }
        let kept: usize = guest.vsock.muxer.kept_bytes();
        assert!(kept <= 2 * BUFFER_BYTES as usize, "{kept} bytes are kept");
    }
}

/// A packet that is often nearly valid, and the length of its payload.
fn any_packet(random: &mut mock::Random, to_host: Header) -> (Header, usize) {
    let operation = match random.below(12) {
        0 => None,
        1 => Some(Operation::Request),
        2 => Some(Operation::Response),
        3 if random.below(4) == 0 => Some(Operation::Reset),
        4 if random.below(4) == 0 => Some(Operation::Shutdown),
        5 => Some(Operation::CreditUpdate),
        6 => Some(Operation::CreditRequest),
        _ => Some(Operation::ReadWrite),
    };
    let mut number = |limit| u32::try_from(random.below(limit)).unwrap();
    let header = Header {
        dst_port: to_host.dst_port + number(3),
        src_port: to_host.src_port + number(16) / 15,
        kind: if number(16) == 0 { 7 } else { TYPE_STREAM },
        operation,
        sides: Sides { receive: number(2) == 0, send: number(2) == 0 },
        buf_alloc: if number(4) == 0 { number(1 << 32) } else { GUEST_BUFFER },
        fwd_cnt: if number(4) == 0 { number(1 << 32) } else { number(0x8000) },
        ..to_host
    };
    let len = if number(4) == 0 { number(0x1_0000) } else { number(100) };
    (header, usize::try_from(len).unwrap())
}
