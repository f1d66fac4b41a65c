//! The relay against a driver on one side and a socket on the other.

use std::os::fd::OwnedFd;

use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::super::mock::{self, Driver, Part};
use super::*;
use crate::fileserver::wire::{ReplyHeader, opcode, put_u64, u32_at, u64_at};
use crate::seqpacket;

mod classes;
mod hostile;

const READ: u32 = opcode::READ;

fn pair() -> (Fs, OwnedFd) {
    let (device, server) = seqpacket::pair().unwrap();
    (Fs::new(device), server)
}

/// A request with its header.
fn request(op: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 40];
    let len = u32::try_from(40 + body.len()).unwrap();
    message[..4].copy_from_slice(&len.to_le_bytes());
    message[4..8].copy_from_slice(&op.to_le_bytes());
    put_u64(&mut message, 8, unique);
    message.extend(body);
    message
}

fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + body.len()).unwrap();
    let mut message = ReplyHeader { len, error, unique }.bytes().to_vec();
    message.extend(body);
    message
}

/// The next packet for the file server; `None` if there is none.
fn received(server: &OwnedFd) -> Option<Vec<u8>> {
    let mut packet = vec![0; 1 << 20];
    let (len, _) = recv(server, packet.as_mut_slice(), RecvFlags::DONTWAIT).ok()?;
    packet.truncate(len);
    Some(packet)
}

fn answer(server: &OwnedFd, message: &[u8]) {
    assert_eq!(send(server, message, SendFlags::NOSIGNAL).unwrap(), message.len());
}

#[test]
fn the_configuration_has_the_tag_and_one_queue() {
    let (_, server) = seqpacket::pair().unwrap();
    let device = device("bulkhead", server);
    let mut space = [0xff; 40];
    use crate::devices::virtio::VirtioDevice;
    device.config().read(0, &mut space);
    assert_eq!(&space[..9], b"bulkhead\0");
    assert_eq!(space[9..36], [0; 27]);
    assert_eq!(space[36..], [1, 0, 0, 0]);
    assert_eq!(device.identity().device_id, 26);
}

#[test]
fn a_request_goes_out_and_its_reply_comes_back() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let message = request(READ, 77, b"which file");
    let made = driver.add(
        1,
        &[Part::Out(&message[..30]), Part::Out(&message[30..]), Part::In(10), Part::In(4096)],
    );
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    assert_eq!(driver.used(1), []);
    let packet = received(&server).unwrap();
    let number = u64_at(&packet, 8).unwrap();
    assert_ne!(number, 77, "the number is ours");
    assert_eq!(packet[16..], message[16..]);
    answer(&server, &reply(number, 0, &[9; 1000]));
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    assert_eq!(driver.used(1), [(made.head, 1016)]);
    assert_eq!(driver.written(&made, 1016), reply(77, 0, &[9; 1000]));
}

#[test]
fn replies_may_come_in_any_order() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let message = request(READ, 5, b"");
    // Even a guest that uses one number twice gets each reply where it belongs.
    let first = driver.add(1, &[Part::Out(&message), Part::In(64)]);
    let second = driver.add(1, &[Part::Out(&message), Part::In(64)]);
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    let numbers = [(); 2].map(|()| u64_at(&received(&server).unwrap(), 8).unwrap());
    answer(&server, &reply(numbers[1], 0, b"second"));
    answer(&server, &reply(numbers[0], -2, b""));
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    assert_eq!(driver.used(1), [(second.head, 22), (first.head, 16)]);
    assert_eq!(driver.written(&second, 22), reply(5, 0, b"second"));
    assert_eq!(driver.written(&first, 16), reply(5, -2, b""));
}

#[test]
fn a_forget_is_done_at_once() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    let message = request(opcode::FORGET, 1, &1_u64.to_le_bytes());
    let made = driver.add(0, &[Part::Out(&message)]);
    driver.call(&mut fs, Ready::Queue(0)).unwrap();
    assert_eq!(driver.used(0), [(made.head, 0)]);
    assert_eq!(received(&server).unwrap()[16..], message[16..]);
}

#[test]
fn an_interrupt_names_the_request_by_our_number() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    let waiting = request(opcode::SETLKW, 900, b"");
    driver.add(1, &[Part::Out(&waiting), Part::In(16)]);
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    let number = u64_at(&received(&server).unwrap(), 8);
    for (unique, expected) in [(900_u64, number), (901, None)] {
        let interrupt = request(opcode::INTERRUPT, 902, &unique.to_le_bytes());
        driver.add(0, &[Part::Out(&interrupt)]);
        driver.call(&mut fs, Ready::Queue(0)).unwrap();
        assert_eq!(driver.used(0).len(), 1);
        let packet = received(&server);
        assert_eq!(packet.and_then(|packet| u64_at(&packet, 40)), expected);
    }
}

#[test]
fn a_full_socket_holds_requests_back_and_loses_none() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (device, server) = seqpacket::pair().unwrap();
    set_socket_send_buffer_size(&device, 4096).unwrap();
    let mut fs = Fs::new(device);
    fs.start(0, &driver.sources).unwrap();
    for unique in 0..100 {
        let message = request(opcode::LOOKUP, unique, &[0; 500]);
        driver.add(1, &[Part::Out(&message), Part::In(16)]);
    }
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    assert!(fs.full);
    let mut seen = 0;
    while let Some(packet) = received(&server) {
        seen += 1;
        answer(&server, &reply(u64_at(&packet, 8).unwrap(), 0, b""));
        driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    }
    assert_eq!(seen, 100);
    assert_eq!(driver.used(1).len(), 100);
}

#[test]
fn a_dead_file_server_fails_requests_and_nothing_else() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let message = request(READ, 3, b"");
    let before = driver.add(1, &[Part::Out(&message), Part::In(64)]);
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    drop(server);
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    let after = driver.add(1, &[Part::Out(&message), Part::In(64)]);
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    assert_eq!(driver.used(1), [(before.head, 16), (after.head, 16)]);
    for made in [before, after] {
        assert_eq!(driver.written(&made, 16), reply(3, -5, b""));
    }
    // The same holds for a driver that comes back.
    fs.stop(&driver.sources);
    fs.start(0, &driver.sources).unwrap();
}

#[test]
fn a_file_server_found_dead_while_sending_fails_all_that_waits() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let message = request(READ, 3, b"");
    driver.add(1, &[Part::Out(&message), Part::In(64)]);
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    drop(server);
    driver.add(1, &[Part::Out(&message), Part::In(64)]);
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    assert_eq!(driver.used(1).len(), 2);
}

#[test]
fn requests_that_lie_about_their_length_are_refused() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    for claimed in [0_u32, 39, 41, u32::MAX] {
        let mut message = request(READ, 8, b"");
        message[..4].copy_from_slice(&claimed.to_le_bytes());
        let made = driver.add(1, &[Part::Out(&message), Part::In(64)]);
        driver.call(&mut fs, Ready::Queue(1)).unwrap();
        assert_eq!(driver.used(1), [(made.head, 16)]);
        let error = u32_at(&driver.written(&made, 16), 4).unwrap().cast_signed();
        assert_eq!(error, -libc::EINVAL);
    }
    assert_eq!(received(&server), None);
}

#[test]
fn requests_without_header_or_room_fail_the_device() {
    let whole = request(READ, 1, b"");
    let cases: [&[Part<'_>]; 4] = [
        &[Part::Out(&whole[..39]), Part::In(64)],
        &[Part::In(64)],
        &[Part::Out(&whole)],
        &[Part::Out(&whole), Part::In(15)],
    ];
    for parts in cases {
        let memory = mock::memory();
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        let (mut fs, _server) = pair();
        driver.add(1, parts);
        assert!(driver.call(&mut fs, Ready::Queue(1)).is_err());
    }
}

#[test]
fn a_driver_that_reuses_chains_in_flight_cannot_make_it_grow() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    let made = driver.add(1, &[Part::Out(&request(READ, 1, b"")), Part::In(64)]);
    let mut result = Ok(());
    for _ in 0..2000 {
        result = driver.call(&mut fs, Ready::Queue(1));
        if result.is_err() {
            break;
        }
        while received(&server).is_some() {}
        driver.offer(1, made.head);
    }
    assert!(matches!(result, Err(ServeError::Request(_))));
}

#[test]
fn malformed_chains_are_survived() {
    // The other end stays open as long as the test runs.
    let servers = std::cell::RefCell::new(Vec::new());
    let make = || {
        let (fs, server) = pair();
        servers.borrow_mut().push(server);
        fs
    };
    mock::survives_malformed(QUEUE_SIZES, make);
    servers.borrow_mut().clear();
    mock::survives_noise(QUEUE_SIZES, 300, make);
}
