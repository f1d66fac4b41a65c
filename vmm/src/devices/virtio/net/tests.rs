//! The network device against a driver.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::io::{read, write};
use vmm_sys_util::epoll::EventSet;

use super::super::mock::{self, Driver, Part, Request};
use super::super::queue::GuestMemory;
use super::super::{Ready, Serve, ServeError};
use super::filter::Mac;
use super::header::HEADER_BYTES;
use super::mock::{ALL, Guest, OWN, SocketTap, TIMER, config, unstarted};
use super::*;
use crate::config::RateLimit;

mod hostile;
mod kernel;

const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const NO_HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

impl<'m> Guest<'m> {
    fn new(memory: &'m GuestMemory, features: u64) -> Self {
        Self::with(memory, features, 1, RateLimit::default())
    }

    /// A frame comes to a tap.
    fn arrive(&mut self, tap: usize, frame: &[u8]) {
        // A tap does not set the last field, which it does not know.
        let header = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        write(&self.wires[tap], &[&header, frame].concat()).unwrap();
        self.call(Ready::Source(u32::try_from(tap).unwrap())).unwrap();
    }

    /// What came out of a tap, with its header.
    fn sent(&self, tap: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 0x2_0000];
        let count = read(&self.wires[tap], &mut bytes).ok()?;
        bytes.truncate(count);
        Some(bytes)
    }

    /// Makes a frame available, in two pieces.
    fn send(&mut self, header: &[u8], frame: &[u8]) -> Request {
        self.driver.add(1, &[Part::Out(header), Part::Out(frame)])
    }

    /// Sends a command; returns the answer.
    fn command(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        let request = self.driver.add(queue, &[Part::Out(bytes), Part::In(1)]);
        self.call(Ready::Queue(queue)).unwrap();
        assert_eq!(self.driver.used(queue), [(request.head, 1)]);
        self.driver.written(&request, 1)[0]
    }

    fn status(&self) -> [u8; 2] {
        let mut status = [0; 2];
        self.space.read(STATUS as u64, &mut status);
        status
    }
}

/// A frame of `len` bytes for an address.
fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let rest = (6..len).map(|at| u8::try_from(at % 251).unwrap());
    to.into_iter().chain(rest).collect()
}

#[test]
fn the_configuration_says_what_was_asked_for() {
    let (_, space, _wires) = unstarted(3, RateLimit::default());
    let mut bytes = [0; CONFIG_BYTES];
    space.read(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0xdc, 5]);
}

#[test]
fn a_tap_is_told_what_the_driver_understands() {
    let memory = mock::memory();
    let (mut net, _, _wires) = unstarted(1, RateLimit::default());
    let driver = Driver::new(&memory, &QUEUE_SIZES[..3]);
    let told = Arc::clone(&net.pairs[0].tap.offloads);
    net.start(ALL, &driver.sources).unwrap();
    assert_eq!(told.load(Ordering::Relaxed), 0x6f);
    net.stop(&driver.sources);
    net.start(F_GUEST_CSUM, &driver.sources).unwrap();
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

#[test]
fn a_frame_comes_with_its_header() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    let room = guest.driver.add(0, &[Part::In(12), Part::In(2000)]);
    guest.driver.add(0, &[Part::In(0x1_1000)]);
    guest.arrive(0, &frame(OTHER, 60));
    assert_eq!(guest.driver.used(0), [(room.head, 72)]);
    let came = guest.driver.written(&room, 72);
    assert_eq!(came[..12], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(came[12..], frame(OTHER, 60));
    assert!(guest.driver.line.irq().read().is_ok());
}

#[test]
fn a_driver_that_knows_no_checksums_hears_nothing_of_them() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, 0);
    let room = guest.driver.add(0, &[Part::In(1600)]);
    guest.arrive(0, &frame(OTHER, 60));
    assert_eq!(guest.driver.written(&room, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
}

#[test]
fn a_long_frame_is_in_several_buffers_and_the_rest_is_for_the_next() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    let rooms: Vec<_> = (0..60).map(|_| guest.driver.add(0, &[Part::In(1536)])).collect();
    guest.arrive(0, &frame(OWN, 4000));
    let used = guest.driver.used(0);
    assert_eq!(used, [(rooms[0].head, 1536), (rooms[1].head, 1536), (rooms[2].head, 940)]);
    let mut came = Vec::new();
    for (room, (_, len)) in rooms.iter().zip(used) {
        came.extend(guest.driver.written(room, len));
    }
    assert_eq!(came[10..12], [3, 0]);
    assert_eq!(came[12..], frame(OWN, 4000));
    guest.arrive(0, &frame(OWN, 100));
    assert_eq!(guest.driver.used(0), [(rooms[3].head, 112)]);
    assert_eq!(guest.driver.written(&rooms[3], 112)[12..], frame(OWN, 100));
}

#[test]
fn a_frame_without_room_waits_in_the_tap_and_wakes_nobody() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    guest.arrive(0, &frame(OWN, 60));
    assert!(guest.net.pairs[0].watched.is_empty());
    guest.driver.add(0, &[Part::In(3000)]);
    guest.call(Ready::Queue(0)).unwrap();
    assert_eq!(guest.driver.used(0), [], "the longest frame would not fit");
    guest.driver.add(0, &[Part::In(0x1_1000)]);
    guest.call(Ready::Queue(0)).unwrap();
    assert_eq!(guest.driver.used(0).len(), 1);
    assert_eq!(guest.net.pairs[0].watched, EventSet::IN);
}

#[test]
fn half_of_a_queue_does_where_no_more_can_come() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    for _ in 0..128 {
        guest.driver.add(0, &[Part::In(100)]);
    }
    guest.arrive(0, &frame(OWN, 200));
    assert_eq!(guest.driver.used(0).len(), 3);
    for _ in 0..3 {
        guest.driver.add(0, &[Part::In(100)]);
    }
    guest.call(Ready::Queue(0)).unwrap();
    guest.arrive(0, &frame(OWN, 0x8000));
    assert_eq!(guest.driver.used(0), []);
    assert_eq!(guest.driver.line.dropped(), 1);
}

#[test]
fn without_merging_a_frame_is_in_one_buffer_or_dropped() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL & !F_MRG_RXBUF);
    let rooms = [200, 1600].map(|len| guest.driver.add(0, &[Part::In(len)]));
    guest.arrive(0, &frame(OWN, 189));
    assert_eq!(guest.driver.used(0), []);
    assert_eq!(guest.driver.line.dropped(), 1);
    guest.arrive(0, &frame(OWN, 188));
    guest.arrive(0, &frame(OWN, 1514));
    assert_eq!(guest.driver.used(0), [(rooms[0].head, 200), (rooms[1].head, 1526)]);
}

#[test]
fn only_wanted_frames_come() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL & !F_MQ);
    for _ in 0..2 {
        guest.driver.add(0, &[Part::In(0x1_1000)]);
    }
    assert_eq!(guest.command(2, &[0, 0, 0]), 0);
    guest.arrive(0, &frame(OTHER, 60));
    assert_eq!(guest.driver.used(0), []);
    guest.arrive(0, &frame(OWN, 60));
    assert_eq!(guest.driver.used(0).len(), 1);
    assert_eq!(guest.driver.line.dropped(), 0, "nobody lost anything");
}

#[test]
fn a_frame_is_sent_behind_a_header_that_was_checked() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    let told = [0x81, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0x77, 0x77];
    let first = guest.send(&told, &frame(OTHER, 5000));
    // The header in two pieces, the second of which has the frame as well.
    let whole = [&NO_HEADER[..], &frame(OTHER, 60)].concat();
    let second = guest.driver.add(1, &[Part::Out(&whole[..5]), Part::Out(&whole[5..])]);
    guest.call(Ready::Queue(1)).unwrap();
    assert_eq!(guest.driver.used(1), [(first.head, 0), (second.head, 0)]);
    let sent = guest.sent(0).unwrap();
    assert_eq!(sent[..12], [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
    assert_eq!(sent[12..], frame(OTHER, 5000));
    assert_eq!(guest.sent(0).unwrap(), whole);
    assert_eq!(guest.sent(0), None);
}

#[test]
fn what_a_tap_does_not_take_waits_in_the_queue() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    guest.driver.add(0, &[Part::In(0x1_1000)]);
    for _ in 0..30 {
        guest.send(&NO_HEADER, &frame(OTHER, 60_000));
    }
    guest.call(Ready::Queue(1)).unwrap();
    let first = guest.driver.used(1).len();
    assert!((1..30).contains(&first), "{first}");
    assert_eq!(guest.net.pairs[0].watched, EventSet::IN | EventSet::OUT);
    let mut sent = 0;
    while guest.sent(0).is_some() {
        sent += 1;
        guest.call(Ready::Source(0)).unwrap();
    }
    assert_eq!((sent, first + guest.driver.used(1).len()), (30, 30));
    assert_eq!(guest.net.pairs[0].watched, EventSet::IN);
    assert_eq!(guest.driver.line.dropped(), 0);
}

#[test]
fn an_interface_that_goes_away_takes_the_link_down() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    guest.driver.add(0, &[Part::In(0x1_1000)]);
    assert_eq!(guest.status(), [1, 0]);
    guest.wires.clear();
    guest.call(Ready::Source(0)).unwrap();
    assert_eq!(guest.status(), [0, 0]);
    assert!(guest.driver.line.irq().read().is_ok());
    assert!(guest.net.pairs[0].watched.is_empty());
    guest.send(&NO_HEADER, &frame(OTHER, 60));
    guest.call(Ready::Queue(1)).unwrap();
    assert_eq!((guest.driver.used(1).len(), guest.driver.line.dropped()), (1, 1));
}

#[test]
fn another_address_lasts_until_the_reset() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL & !F_MQ);
    let address = |guest: &Guest<'_>| {
        let mut bytes = [0; 6];
        guest.space.read(0, &mut bytes);
        bytes
    };
    assert_eq!(guest.command(2, &[&[1, 1], &OTHER[..]].concat()), 0);
    assert_eq!(address(&guest), OTHER);
    assert!(guest.net.filter.own == Mac(OTHER));
    guest.net.stop(&guest.driver.sources);
    assert_eq!(address(&guest), OWN);
    assert!(guest.net.filter.own == Mac(OWN));
}

#[test]
fn frames_of_every_tap_come_to_the_queues_that_are_used() {
    let memory = mock::memory();
    let mut guest = Guest::with(&memory, ALL, 2, RateLimit::default());
    for queue in [0, 0, 0, 2] {
        guest.driver.add(queue, &[Part::In(0x1_1000)]);
    }
    guest.arrive(0, &frame(OWN, 60));
    guest.arrive(1, &frame(OWN, 61));
    let used = guest.driver.used(0);
    assert_eq!(used.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [72, 73]);
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), 0);
    guest.arrive(1, &frame(OWN, 62));
    assert_eq!((guest.driver.used(0), guest.driver.used(2).len()), (vec![], 1));
    for pairs in [0, 3] {
        assert_eq!(guest.command(4, &[4, 0, pairs, 0]), 1, "{pairs} pairs");
    }
    guest.driver.add(3, &[Part::Out(&NO_HEADER), Part::Out(&frame(OTHER, 60))]);
    guest.call(Ready::Queue(3)).unwrap();
    assert_eq!((guest.sent(0), guest.sent(1).unwrap().len()), (None, 72));
}

/// A thousand packets a second.
fn thousand() -> RateLimit {
    RateLimit { packets_per_s: Some(1000.try_into().unwrap()), ..RateLimit::default() }
}

#[test]
fn what_is_over_the_limit_waits_on_its_side() {
    let memory = mock::memory();
    let mut guest = Guest::with(&memory, ALL, 1, thousand());
    guest.driver.add(0, &[Part::In(0x1_1000)]);
    for _ in 0..20 {
        guest.driver.add(0, &[Part::In(0x1_1000)]);
        guest.send(&NO_HEADER, &frame(OTHER, 60));
        write(&guest.wires[0], &[&NO_HEADER[..], &frame(OWN, 60)].concat()).unwrap();
    }
    guest.call(Ready::Queue(1)).unwrap();
    guest.call(Ready::Source(0)).unwrap();
    let (mut sent, mut received) = (guest.driver.used(1).len(), guest.driver.used(0).len());
    assert!((1..20).contains(&sent) && (1..20).contains(&received), "{sent} {received}");
    assert!(guest.net.pairs[0].watched.is_empty());
    for _ in 0..100 {
        thread::sleep(Duration::from_millis(2));
        guest.call(TIMER).unwrap();
        sent += guest.driver.used(1).len();
        received += guest.driver.used(0).len();
    }
    assert_eq!((sent, received), (20, 20));
    assert_eq!(guest.net.pairs[0].watched, EventSet::IN);
}

#[test]
fn a_flood_does_not_keep_the_worker() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    for _ in 0..100 {
        guest.driver.add(0, &[Part::In(2000)]);
        guest.send(&NO_HEADER, &frame(OTHER, 60));
    }
    for _ in 0..100 {
        write(&guest.wires[0], &[&NO_HEADER[..], &frame(OWN, 60)].concat()).unwrap();
    }
    guest.call(Ready::Source(0)).unwrap();
    assert_eq!(guest.driver.used(0).len(), 64);
    guest.call(Ready::Queue(1)).unwrap();
    assert_eq!(guest.driver.used(1).len(), 64);
    assert!(guest.driver.queues[1].kick().read().is_ok(), "it comes back by itself");
}
