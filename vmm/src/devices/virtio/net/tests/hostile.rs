//! Drivers that break the rules: a frame is dropped or the device fails, and nothing else happens.

use super::super::super::mock::Random;
use super::super::super::worker::Sources;
use super::super::super::{Context, Serve};
use super::*;

/// A device whose taps have frames, and which serves them after every event.
struct Flooded {
    net: Net<SocketTap>,
    wires: Vec<OwnedFd>,
    features: u64,
}

impl Flooded {
    fn new(pairs: usize, features: u64) -> Self {
        let (net, _, wires) = unstarted(pairs, RateLimit::default());
        for wire in &wires {
            for len in [60, 5000, 1500, 14] {
                write(wire, &[&NO_HEADER[..], &frame(OWN, len)].concat()).unwrap();
            }
        }
        Self { net, wires, features }
    }
}

impl Serve for Flooded {
    const NAME: &'static str = "flooded";
    const SYSCALLS: &'static [i64] = &[];

    fn start(&mut self, _: u64, sources: &Sources) -> io::Result<()> {
        self.net.start(self.features, sources)
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        self.net.serve(ready, context)?;
        for tap in 0..self.wires.len() {
            self.net.serve(Ready::Source(u32::try_from(tap).unwrap()), context)?;
        }
        self.net.serve(TIMER, context)
    }

    fn stop(&mut self, sources: &Sources) {
        self.net.stop(sources);
    }
}

#[test]
fn malformed_chains_are_survived() {
    for (pairs, features) in [(1, ALL & !F_MQ), (1, 0), (2, ALL), (2, ALL & !F_MRG_RXBUF)] {
        let make = || Flooded::new(pairs, features);
        mock::survives_malformed(&QUEUE_SIZES[..=2 * pairs], make);
        mock::survives_noise(&QUEUE_SIZES[..=2 * pairs], 200, make);
    }
}

#[test]
fn a_malformed_frame_is_dropped_and_counted() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    let outside = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];
    let unknown = [0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    guest.send(&outside, &frame(OTHER, 60));
    guest.send(&unknown, &frame(OTHER, 60));
    guest.send(&NO_HEADER, &frame(OTHER, 13));
    guest.send(&NO_HEADER, &vec![0; 0x1_1000]);
    guest.send(&NO_HEADER, &frame(OTHER, 60));
    guest.call(Ready::Queue(1)).unwrap();
    assert_eq!(guest.driver.used(1).len(), 5);
    assert_eq!(guest.driver.line.dropped(), 4);
    assert_eq!(guest.sent(0).unwrap().len(), 72);
    assert_eq!(guest.sent(0), None);
}

#[test]
fn a_chain_that_is_no_frame_fails_the_device() {
    let frame = frame(OTHER, 60);
    let chains: [&[Part<'_>]; 3] = [
        &[Part::Out(&NO_HEADER[..11])],
        &[Part::Out(&NO_HEADER), Part::Out(&frame), Part::In(1)],
        &[Part::In(100)],
    ];
    for parts in chains {
        let memory = mock::memory();
        let mut guest = Guest::new(&memory, ALL);
        guest.driver.add(1, parts);
        assert!(guest.call(Ready::Queue(1)).is_err());
        assert_eq!(guest.sent(0), None);
    }
}

#[test]
fn a_buffer_that_holds_no_header_fails_the_device() {
    let chains: [&[Part<'_>]; 3] =
        [&[Part::In(11)], &[Part::Out(&[0; 100])], &[Part::Out(&[0]), Part::In(2000)]];
    for parts in chains {
        let memory = mock::memory();
        let mut guest = Guest::new(&memory, ALL);
        guest.driver.add(0, parts);
        assert!(guest.call(Ready::Source(0)).is_err());
    }
}

#[test]
fn the_same_chain_offered_again_and_again_takes_no_memory() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    guest.driver.store(0, 0, &[(mock::HIGH_START, 12, mock::WRITE, 0)]);
    for _ in 0..122 {
        guest.driver.offer(0, 0);
    }
    for _ in 0..10_000 {
        for _ in 0..6 {
            guest.driver.offer(0, 0);
        }
        guest.call(Ready::Queue(0)).unwrap();
        guest.arrive(0, &frame(OWN, 60));
        assert_eq!(guest.driver.used(0).len(), 6);
    }
    assert!(guest.net.pairs[0].receive.chains() <= 256);
}

#[test]
fn buffers_in_many_pieces_are_filled_all_the_same() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL);
    let next =
        |at: u16| (mock::HIGH_START + u64::from(at) * 2, 1, mock::WRITE | mock::NEXT, at + 1);
    let mut pieces: Vec<_> = (0..200).map(next).collect();
    pieces[0].1 = 2;
    pieces[199].2 = mock::WRITE;
    guest.driver.store(0, 0, &pieces);
    for _ in 0..100 {
        guest.driver.offer(0, 0);
    }
    for _ in 0..70 {
        write(&guest.wires[0], &[&NO_HEADER[..], &frame(OWN, 189)].concat()).unwrap();
    }
    guest.call(Ready::Source(0)).unwrap();
    assert_eq!(guest.driver.used(0), [(0, 201); 64]);
}

#[test]
fn a_malformed_command_is_refused_and_changes_nothing() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, ALL & !F_MQ);
    let many = vec![0; 10_000];
    let commands: [&[u8]; 6] =
        [&[0], &[0, 0], &[9, 9, 9], &[1, 0, 1, 0, 0, 0], &[4, 0, 1, 0], &many];
    for bytes in commands {
        assert_eq!(guest.command(2, bytes), 1);
    }
    assert!(guest.net.filter.promiscuous);
    guest.driver.add(2, &[Part::Out(&[0, 0, 0])]);
    assert!(guest.call(Ready::Queue(2)).is_err(), "there is no room for the answer");
}

#[test]
fn commands_of_features_that_were_not_negotiated_are_refused() {
    let memory = mock::memory();
    let mut guest = Guest::new(&memory, F_CTRL_VQ);
    for bytes in [&[0, 0, 0][..], &[0, 1, 1], &[1, 1, 2, 0, 0, 0, 0, 9], &[4, 0, 1, 0]] {
        assert_eq!(guest.command(2, bytes), 1);
    }
    let mut guest = Guest::new(&memory, 0);
    guest.driver.add(2, &[Part::Out(&[0, 0, 0]), Part::In(1)]);
    guest.call(Ready::Queue(2)).unwrap();
    assert_eq!(guest.driver.used(2), [], "there is no such queue");
}

#[test]
fn frames_are_whole_however_they_are_cut() {
    let memory = mock::memory();
    let mut random = Random(0x5eed_0f0f_1234_5679);
    let mut below = |limit: u64| usize::try_from(random.below(limit)).unwrap();
    let mut guest = Guest::new(&memory, ALL);
    for _ in 0..300 {
        let mut parts = Vec::new();
        let sent = [&NO_HEADER[..], &frame(OTHER, 14 + below(3000))].concat();
        let mut rest = &sent[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at((1 + below(700)).min(rest.len()));
            parts.push(Part::Out(now));
            rest = later;
        }
        guest.driver.add(1, &parts);
        guest.call(Ready::Queue(1)).unwrap();
        assert!(guest.sent(0).unwrap() == sent);
        assert_eq!(guest.driver.used(1).len(), 1);
    }
    let mut rooms = std::collections::VecDeque::new();
    for _ in 0..300 {
        while rooms.len() < 128 {
            let first = u32::try_from(12 + below(200)).unwrap();
            let second = u32::try_from(below(3000)).unwrap();
            rooms.push_back(guest.driver.add(0, &[Part::In(first), Part::In(second)]));
        }
        let came = frame(OWN, 14 + below(3000));
        guest.arrive(0, &came);
        let mut bytes = Vec::new();
        let used = guest.driver.used(0);
        for (head, len) in &used {
            let room: Request = rooms.pop_front().unwrap();
            assert_eq!(room.head, *head);
            bytes.extend(guest.driver.written(&room, *len));
        }
        assert_eq!(usize::from(bytes[10]), used.len());
        assert!(bytes[12..] == came);
    }
}
