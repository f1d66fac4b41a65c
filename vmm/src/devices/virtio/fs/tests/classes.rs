//! Slow requests leave the file server a thread for quick ones.

use super::*;
use crate::devices::virtio::queue::GuestMemory;
use crate::fileserver::config::THREADS_MIN;
use crate::fileserver::wire::Class;

/// How many requests of the slowest class are in flight at once.
const SYNCS: usize = Class::Sync.at_once() as usize;
const FSYNC: u32 = opcode::FSYNC;
const WRITE: u32 = opcode::WRITE;
const LOOKUP: u32 = opcode::LOOKUP;

/// A guest, the device, and the file server's end of the socket.
struct Scene<'m> {
    driver: Driver<'m>,
    fs: Fs,
    server: OwnedFd,
    asked: u64,
}

impl<'m> Scene<'m> {
    fn new(memory: &'m GuestMemory) -> Self {
        let driver = Driver::new(memory, QUEUE_SIZES);
        let (mut fs, server) = pair();
        fs.start(0, &driver.sources).unwrap();
        Self { driver, fs, server, asked: 0 }
    }

    /// The guest makes `count` requests, with ascending numbers.
    fn ask(&mut self, op: u32, count: usize) {
        for _ in 0..count {
            self.asked += 1;
            let message = request(op, self.asked, b"");
            self.driver.add(1, &[Part::Out(&message), Part::In(16)]);
        }
        self.driver.call(&mut self.fs, Ready::Queue(1)).unwrap();
    }

    /// The requests that the file server was given since the last call: opcode and number.
    fn given(&self) -> Vec<(u32, u64)> {
        let packets = std::iter::from_fn(|| received(&self.server));
        packets.map(|it| (u32_at(&it, 4).unwrap(), u64_at(&it, 8).unwrap())).collect()
    }

    fn answer(&mut self, number: u64) {
        answer(&self.server, &reply(number, 0, b""));
        self.driver.call(&mut self.fs, Ready::Source(SERVER)).unwrap();
    }

    /// How many requests of the guest were answered since the last call.
    fn answered(&mut self) -> usize {
        self.driver.used(1).len()
    }
}

/// How many of the given requests have this opcode.
fn count(given: &[(u32, u64)], op: u32) -> usize {
    given.iter().filter(|(it, _)| *it == op).count()
}

#[test]
fn many_fsyncs_delay_no_lookup_no_read_and_no_write() {
    let memory = mock::memory();
    let mut scene = Scene::new(&memory);
    scene.ask(FSYNC, 20);
    let first = scene.given();
    assert_eq!(first.len(), SYNCS);
    for op in [LOOKUP, READ, WRITE] {
        scene.ask(op, 1);
        let given = scene.given();
        assert_eq!(given.len(), 1, "{op} waits for an fsync");
        scene.answer(given[0].1);
    }
    assert_eq!(scene.answered(), 3);
    // Each fsync that is done lets the next one go.
    let mut waiting = first;
    for done in 1..=20 {
        assert!(!waiting.is_empty() && waiting.len() <= SYNCS);
        let (_, number) = waiting.remove(0);
        scene.answer(number);
        waiting.extend(scene.given());
        assert_eq!(scene.answered(), 1, "after {done}");
    }
    assert!(waiting.is_empty());
}

#[test]
fn a_thread_is_left_for_each_quicker_class() {
    let memory = mock::memory();
    let mut scene = Scene::new(&memory);
    for op in [FSYNC, WRITE, READ] {
        scene.ask(op, 10);
    }
    let mut given = scene.given();
    assert_eq!([FSYNC, WRITE, READ].map(|op| count(&given, op)), [2, 2, 1]);
    assert_eq!(given.len() + 1, usize::from(THREADS_MIN));
    scene.ask(LOOKUP, 50);
    assert_eq!(scene.given().len(), 50);
    // The end of a quick request lets no slow one exceed its limit.
    while let Some(place) = given.iter().position(|(op, _)| *op == READ) {
        let (_, number) = given.remove(place);
        scene.answer(number);
        given.extend(scene.given());
        assert!(count(&given, FSYNC) <= 2 && count(&given, WRITE) <= 2);
    }
    assert_eq!(given.len(), 4, "reads have ended, nothing else has");
}

#[test]
fn quick_ones_alone_may_have_what_slow_ones_leave() {
    for (op, expected) in [(READ, 5), (WRITE, 4), (FSYNC, 2)] {
        let memory = mock::memory();
        let mut scene = Scene::new(&memory);
        scene.ask(op, 30);
        assert_eq!(scene.given().len(), expected, "{op}");
    }
    // However many requests wait, a slower one gets the first place that is free.
    let memory = mock::memory();
    let mut scene = Scene::new(&memory);
    scene.ask(READ, 30);
    let given = scene.given();
    scene.ask(FSYNC, 1);
    assert_eq!(scene.given(), []);
    scene.answer(given[0].1);
    assert_eq!(scene.given()[0].0, FSYNC);
}

#[test]
fn what_is_held_back_keeps_its_order() {
    let memory = mock::memory();
    let mut scene = Scene::new(&memory);
    scene.ask(WRITE, 20);
    let mut order = Vec::new();
    let mut given = scene.given();
    while let Some((_, number)) = given.first().copied() {
        given.remove(0);
        scene.answer(number);
        order.extend(scene.driver.used(1).into_iter().map(|(head, _)| head));
        given.extend(scene.given());
    }
    assert_eq!(order.len(), 20);
    assert!(order.is_sorted(), "{order:?}");
}

#[test]
fn a_dead_file_server_fails_what_is_held_back() {
    let memory = mock::memory();
    let mut scene = Scene::new(&memory);
    for op in [FSYNC, WRITE, READ, LOOKUP] {
        scene.ask(op, 10);
    }
    scene.server = pair().1;
    scene.driver.call(&mut scene.fs, Ready::Source(SERVER)).unwrap();
    assert_eq!(scene.answered(), 40);
}

#[test]
fn a_driver_that_resets_the_device_does_not_get_more_threads() {
    let memory = mock::memory();
    let mut scene = Scene::new(&memory);
    let mut at_work = Vec::new();
    for _ in 0..10 {
        scene.ask(FSYNC, 10);
        at_work.extend(scene.given());
        scene.fs.stop(&scene.driver.sources);
    }
    assert_eq!(at_work.len(), SYNCS);
    scene.ask(FSYNC, 3);
    assert_eq!(scene.given(), []);
    for (_, number) in at_work {
        scene.answer(number);
    }
    assert_eq!(scene.answered(), 0, "the driver forgot those");
    let given = scene.given();
    assert_eq!(given.len(), SYNCS);
    scene.answer(given[0].1);
    assert_eq!(scene.answered(), 1);
}

#[test]
fn a_full_socket_loses_nothing_that_is_held_back() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (device, server) = seqpacket::pair().unwrap();
    set_socket_send_buffer_size(&device, 4096).unwrap();
    let mut fs = Fs::new(device);
    fs.start(0, &driver.sources).unwrap();
    for unique in 0..100 {
        let op = [WRITE, READ, FSYNC, LOOKUP][unique % 4];
        let message = request(op, unique as u64, &[0; 1500]);
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
    assert_eq!((seen, driver.used(1).len()), (100, 100));
}
