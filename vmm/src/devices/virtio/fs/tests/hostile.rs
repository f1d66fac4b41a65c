//! A file server that was taken over. Whatever it sends, the monitor neither ends, blocks nor
//! grows.

use std::io::Read;
use std::os::fd::AsFd;

use rustix::net::{Shutdown, shutdown};
use rustix::pipe::pipe;

use super::*;
use crate::fileserver::wire::OUT_HEADER;

/// The number of a relay's first request.
const FIRST: u64 = 1;

/// The guest's reply to one request in flight, after the file server has sent `packets`.
fn answered(packets: &[&[u8]]) -> Vec<u8> {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let made = driver.add(1, &[Part::Out(&request(READ, 8, b"")), Part::In(64)]);
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    assert_eq!(u64_at(&received(&server).unwrap(), 8), Some(FIRST));
    for packet in packets {
        answer(&server, packet);
    }
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    let used = driver.used(1);
    let [(head, len)] = used[..] else { panic!("given back: {used:?}") };
    assert_eq!(head, made.head);
    driver.written(&made, len)
}

/// The reply to every request after the relay has ended.
fn failure() -> Vec<u8> {
    reply(8, -libc::EIO, b"")
}

#[test]
fn a_reply_without_a_whole_header_ends_the_relay() {
    for len in 1..OUT_HEADER {
        let mut packet = reply(FIRST, 0, b"");
        packet[..4].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
        assert_eq!(answered(&[&packet[..len]]), failure(), "{len} bytes");
    }
    // An empty packet looks like the end of the socket.
    assert_eq!(answered(&[b""]), failure());
}

#[test]
fn a_reply_that_lies_about_its_length_ends_the_relay() {
    for (claimed, len) in
        [(0, 16), (15, 16), (17, 16), (u32::MAX, 16), (16, 17), (18, 17), (16, 100_000)]
    {
        let mut packet = reply(FIRST, 0, &vec![1; len - OUT_HEADER]);
        packet[..4].copy_from_slice(&claimed.to_le_bytes());
        assert_eq!(answered(&[&packet]), failure(), "{len} bytes that claim to be {claimed}");
    }
}

#[test]
fn an_error_that_no_file_server_may_send_ends_the_relay() {
    // Errors from 512 on are internal to the kernel: the guest's system call would be restarted
    // again and again.
    for error in [1, i32::MAX, i32::MIN, -512, -4095] {
        assert_eq!(answered(&[&reply(FIRST, error, b"")]), failure(), "{error}");
    }
    assert_eq!(answered(&[&reply(FIRST, -2, b"body")]), failure(), "an error has no body");
    assert_eq!(answered(&[&reply(FIRST, -511, b"")]), reply(8, -511, b""));
}

#[test]
fn a_reply_to_what_was_never_asked_ends_the_relay() {
    for unique in [0, FIRST + 1, u64::from(u32::MAX), u64::MAX] {
        let good = reply(FIRST, 0, b"good");
        assert_eq!(answered(&[&reply(unique, 0, b""), &good]), failure(), "{unique}");
    }
}

#[test]
fn a_reply_longer_than_any_request_fails_that_request_only() {
    let huge = reply(FIRST, 0, &vec![1; 150_000]);
    assert_eq!(answered(&[&huge]), failure());
    let one_too_many = reply(FIRST, 0, &[1; 64 - OUT_HEADER + 1]);
    assert_eq!(answered(&[&one_too_many]), failure());
    assert_eq!(answered(&[&reply(FIRST, 0, &[1; 64 - OUT_HEADER])]), reply(8, 0, &[1; 48]));
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    for packet in [&huge, &reply(FIRST + 1, 0, b"good")] {
        driver.add(1, &[Part::Out(&request(READ, 8, b"")), Part::In(64)]);
        driver.call(&mut fs, Ready::Queue(1)).unwrap();
        answer(&server, packet);
        driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    }
    assert_eq!(driver.used(1).iter().map(|(_, len)| *len).collect::<Vec<_>>(), [16, 20]);
}

#[test]
fn the_second_reply_to_one_request_ends_the_relay() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let asked =
        [8, 9].map(|unique| driver.add(1, &[Part::Out(&request(READ, unique, b"")), Part::In(64)]));
    driver.call(&mut fs, Ready::Queue(1)).unwrap();
    for _ in 0..2 {
        answer(&server, &reply(FIRST, 0, b""));
    }
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    assert_eq!(driver.used(1).len(), 2);
    assert_eq!(driver.written(&asked[0], 16), reply(8, 0, b""));
    assert_eq!(driver.written(&asked[1], 16), reply(9, -libc::EIO, b""));
}

#[test]
fn replies_to_what_the_driver_forgot_are_dropped_and_no_others() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let message = request(opcode::LOOKUP, 8, b"");
    let ask = |driver: &mut Driver<'_>, fs: &mut Fs| {
        let made = driver.add(1, &[Part::Out(&message), Part::In(64)]);
        driver.call(fs, Ready::Queue(1)).unwrap();
        (made, u64_at(&received(&server).unwrap(), 8).unwrap())
    };
    let (_, forgotten) = ask(&mut driver, &mut fs);
    // The driver resets the device; then the reply comes.
    fs.stop(&driver.sources);
    answer(&server, &reply(forgotten, 0, &[1; 5000]));
    let (made, number) = ask(&mut driver, &mut fs);
    answer(&server, &reply(number, 0, b"good"));
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    assert_eq!(driver.used(1), [(made.head, 20)]);
    let (made, _) = ask(&mut driver, &mut fs);
    answer(&server, &reply(forgotten, 0, b""));
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    assert_eq!(driver.written(&made, 16), failure());
}

#[test]
fn a_flood_of_replies_to_nothing_does_not_keep_the_worker() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    // A driver that resets the device again and again, each time with a request in flight.
    for _ in 0..3 * BATCH {
        driver.add(1, &[Part::Out(&request(opcode::LOOKUP, 8, b"")), Part::In(64)]);
        driver.call(&mut fs, Ready::Queue(1)).unwrap();
        received(&server).unwrap();
        fs.stop(&driver.sources);
    }
    let flood = || {
        let packet = reply(FIRST, 0, b"");
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        (0..).take_while(|_| send(&server, &packet, flags).is_ok()).count()
    };
    assert!(flood() > BATCH);
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    let taken = flood();
    assert!((1..=BATCH).contains(&taken), "{taken} packets before anything else is looked at");
    assert!(!fs.relay.is_gone());
}

#[test]
fn a_file_server_that_listens_no_more_fails_what_it_was_asked() {
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
    // The other direction stays open, so that only a request that fails shows the end.
    shutdown(&server, Shutdown::Read).unwrap();
    driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
    assert_eq!(driver.used(1).len(), 100, "processes of the guest wait for ever");
}

#[test]
fn descriptors_that_come_with_a_reply_are_not_kept() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (mut fs, server) = pair();
    fs.start(0, &driver.sources).unwrap();
    let (reader, writer) = pipe().unwrap();
    for (number, len) in (FIRST..).zip([0, 48, 49]) {
        driver.add(1, &[Part::Out(&request(READ, 8, b"")), Part::In(64)]);
        driver.call(&mut fs, Ready::Queue(1)).unwrap();
        let packet = reply(number, 0, &vec![1; len]);
        seqpacket::send(&server, &packet, &[writer.as_fd(); 8]).unwrap();
        driver.call(&mut fs, Ready::Source(SERVER)).unwrap();
        assert_eq!(driver.used(1).len(), 1);
    }
    drop(writer);
    // End of file: nobody holds the other end any more.
    assert_eq!(std::fs::File::from(reader).read(&mut [0]).unwrap(), 0);
}
