//! A guest that sends whatever it likes, or a monitor that was taken over.
//!
//! There is no FUSE in between: packets go straight to the process, whose jail holds nothing but a
//! file system in memory. The process may refuse a request, and must do nothing else.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_vmm::fileserver::config::{FsReport, FsVerdict, Listening, SocketKind};
use bulkhead_vmm::seqpacket;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::pod::{Server, relay_pair, tmpfs};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const MKNOD: u32 = 8;
const INIT: u32 = 26;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const SOCKET_CONNECT: u32 = 2050;
const SOCKET_LISTEN: u32 = 2051;
const SOCKET_RELEASE: u32 = 2052;
/// The requests that only our guest's kernel knows: watches, sockets, FIFOs.
const OUR_OWN: [u32; 7] = [2048, 2049, SOCKET_CONNECT, SOCKET_LISTEN, SOCKET_RELEASE, 2064, 2065];

struct Wire {
    server: Server,
    relay: OwnedFd,
    unique: u64,
}

impl Wire {
    fn new() -> Self {
        let (relay, ours) = relay_pair();
        let share = tmpfs();
        let server = Server::start(share.as_fd(), relay.as_fd(), None);
        // A writable directory: the root itself is served read-only.
        server.attach(&share, &tmpfs(), "w");
        // A directory of the host, of a container.
        server.attach(&share, &tmpfs(), "c/v");
        Self { server, relay: ours, unique: 0 }
    }

    fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        self.unique += 1;
        let len = u32::try_from(40 + body.len()).unwrap();
        let mut packet = Vec::new();
        packet.extend(len.to_le_bytes());
        packet.extend(opcode.to_le_bytes());
        packet.extend(self.unique.to_le_bytes());
        packet.extend(node.to_le_bytes());
        packet.extend([0; 16]);
        packet.extend(body);
        send(&self.relay, &packet, SendFlags::NOSIGNAL).unwrap();
        self.unique
    }

    /// The reply to this request: its error and its body; others are dropped.
    fn reply(&self, unique: u64) -> (i32, Vec<u8>) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            let Some(packet) = self.next(1000) else { continue };
            if packet[8..16] == unique.to_le_bytes() {
                let error = i32::from_le_bytes(packet[4..8].try_into().unwrap());
                return (error, packet[16..].to_vec());
            }
        }
        panic!("no reply to {unique}");
    }

    fn next(&self, milliseconds: i64) -> Option<Vec<u8>> {
        let mut ready = [PollFd::new(&self.relay, PollFlags::IN)];
        let timeout = rustix::time::Timespec {
            tv_sec: milliseconds / 1000,
            tv_nsec: milliseconds % 1000 * 1_000_000,
        };
        if poll(&mut ready, Some(&timeout)).unwrap() == 0 {
            return None;
        }
        let mut packet = vec![0; 1 << 20];
        let (len, _) = recv(&self.relay, packet.as_mut_slice(), RecvFlags::empty()).unwrap();
        assert!(len >= 16, "the file server ended");
        assert_eq!(packet[..4], u32::try_from(len).unwrap().to_le_bytes());
        packet.truncate(len);
        Some(packet)
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let unique = self.send(opcode, node, body);
        self.reply(unique)
    }

    fn init(&mut self) -> (i32, Vec<u8>) {
        let mut body = Vec::new();
        for field in [7_u32, 41, 1 << 20, u32::MAX, u32::MAX] {
            body.extend(field.to_le_bytes());
        }
        body.extend([0; 44]);
        self.call(INIT, 0, &body)
    }

    /// The node of the directory of the host.
    fn volume(&mut self) -> u64 {
        let mut node = 1;
        for name in [b"c\0", b"v\0"] {
            let (error, entry) = self.call(LOOKUP, node, name);
            assert_eq!(error, 0);
            node = u64::from_le_bytes(entry[..8].try_into().unwrap());
        }
        node
    }

    /// Binds a socket of this type.
    fn bind(&mut self, directory: u64, kind: u32, name: &str) -> (i32, u64) {
        let mut body: Vec<u8> = [0o140_755, kind, 0, 0].map(u32::to_le_bytes).concat();
        body.extend(name.as_bytes());
        body.push(0);
        let (error, entry) = self.call(MKNOD, directory, &body);
        let node = entry.first_chunk().map_or(0, |node| u64::from_le_bytes(*node));
        (error, node)
    }

    /// What is said of a connection to a node, with this type and that many groups.
    fn connect(&mut self, node: u64, kind: u32, groups: u32) -> (i32, Vec<u8>) {
        let mut body = vec![7; 16];
        body.extend([kind, groups].map(u32::to_le_bytes).concat());
        self.call(SOCKET_CONNECT, node, &body)
    }

    /// The next report to the supervisor, and whether a descriptor came with it.
    fn report(&self) -> (FsReport, bool) {
        let control = self.server.control.as_ref().unwrap();
        let message = seqpacket::receive(control).unwrap().unwrap();
        (serde_json::from_slice(&message.bytes).unwrap(), message.descriptors.len() == 1)
    }

    fn is_well(&mut self) {
        assert_eq!(self.call(GETATTR, 1, &[0; 16]).0, 0);
        assert!(self.server.child.try_wait().unwrap().is_none());
    }
}

#[test]
fn negotiation_bounds_messages() {
    let mut wire = Wire::new();
    let (error, body) = wire.init();
    assert_eq!((error, body.len()), (0, 64));
    let field = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
    assert_eq!((field(0), field(4)), (7, 38));
    assert_eq!(field(8), 256 << 10, "read-ahead");
    assert_eq!(field(20), 256 << 10, "one write");
    assert_eq!(field(28) & 0xffff, 64, "pages of a message");
    let writeback_cache = 1 << 16;
    assert_eq!(field(12) & writeback_cache, 0);
    // Another version of the protocol.
    let mut body = [0; 64];
    body[0] = 8;
    assert_eq!(wire.call(INIT, 0, &body).0, -libc::EPROTO);
}

#[test]
fn a_packet_that_is_no_request_is_dropped() {
    let mut wire = Wire::new();
    wire.init();
    for packet in [&[0; 1][..], &[0xff; 39], &[0; 40], &[0xff; 266_240], &[0xff; 500_000]] {
        send(&wire.relay, packet, SendFlags::NOSIGNAL).unwrap();
    }
    wire.is_well();
}

#[test]
fn names_that_lead_out_are_refused() {
    let mut wire = Wire::new();
    wire.init();
    for name in [&b"..\0"[..], b".\0", b"a/../..\0", b"/etc/passwd\0", b"\0", b"no end"] {
        assert_eq!(wire.call(LOOKUP, 1, name).0, -libc::EINVAL, "{name:?}");
    }
}

#[test]
fn what_was_never_given_out_is_refused() {
    let mut wire = Wire::new();
    wire.init();
    assert_eq!(wire.call(GETATTR, 99, &[0; 16]).0, -libc::ESTALE);
    let (error, opened) = wire.call(OPENDIR, 1, &[0; 8]);
    assert_eq!(error, 0);
    // Handles do not survive DESTROY.
    wire.call(DESTROY, 0, &[]);
    let mut body = opened[..8].to_vec();
    body.extend([0; 32]);
    body[16..20].copy_from_slice(&4096_u32.to_le_bytes());
    assert_eq!(wire.call(28, 1, &body).0, -libc::EBADF);
    wire.send(FORGET, 1, &u64::MAX.to_le_bytes());
    wire.is_well();
}

#[test]
fn a_guest_that_lets_ever_more_locks_wait_cannot_make_it_grow() {
    let mut wire = Wire::new();
    wire.init();
    let node = u64::from_le_bytes(wire.call(LOOKUP, 1, b"w\0").1[..8].try_into().unwrap());
    // Flags for reading and writing, mode, umask, flags of the open, name.
    let mut body: Vec<u8> = [2_u32, 0o644, 0, 0].map(u32::to_le_bytes).concat();
    body.extend(b"f\0");
    let (error, made) = wire.call(CREATE, node, &body);
    assert_eq!(error, 0);
    let file = u64::from_le_bytes(made[..8].try_into().unwrap());
    let handle = u64::from_le_bytes(made[128..136].try_into().unwrap());
    // Handle, owner, first and last byte; a write lock, process, flags.
    let lock = |owner: u64| {
        let mut body: Vec<u8> = [handle, owner, 0, 0].map(u64::to_le_bytes).concat();
        body.extend([1_u32, 0, 0, 0].map(u32::to_le_bytes).concat());
        body
    };
    assert_eq!(wire.call(SETLK, file, &lock(1)).0, 0);
    let (mut sent, mut refused) = (0, 0);
    // Until all are sent and nothing comes any more.
    while sent < 5000 || refused < 5000 - 1000 {
        let patience = if sent < 5000 { 0 } else { 2000 };
        if sent < 5000 {
            wire.send(SETLKW, file, &lock(2));
            sent += 1;
        }
        match wire.next(patience) {
            Some(packet) => {
                assert_eq!(packet[4..8], (-libc::ENOLCK).to_le_bytes());
                refused += 1;
            }
            None => assert_eq!(patience, 0, "{} locks wait", sent - refused),
        }
    }
    wire.is_well();
}

#[test]
fn a_guest_that_lies_about_sockets_reaches_none() {
    const STREAM: u32 = 1;
    const PACKETS: u32 = 5;
    const DATAGRAMS: u32 = 2;
    let mut wire = Wire::new();
    wire.init();
    let volume = wire.volume();
    // What is no socket, what was never given out, and what nobody else can have bound.
    assert_eq!(wire.connect(volume, STREAM, 0).0, -libc::ECONNREFUSED);
    assert_eq!(wire.connect(99, STREAM, 0).0, -libc::ESTALE);
    let (error, plain) = wire.bind(volume, 0, "plain");
    assert_eq!(error, 0);
    // Other types, and groups that do not follow or are too many.
    for kind in [0, 3, u32::MAX] {
        assert_eq!(wire.connect(plain, kind, 0).0, -libc::EPROTOTYPE, "{kind}");
    }
    for groups in [1, 257, u32::MAX] {
        assert_eq!(wire.connect(plain, STREAM, groups).0, -libc::EINVAL, "{groups}");
    }
    // To listen and to close says nothing about what was not bound here.
    for node in [plain, volume, 99, 0, u64::MAX] {
        wire.call(SOCKET_LISTEN, node, &u32::MAX.to_le_bytes());
        wire.call(SOCKET_RELEASE, node, &[]);
    }
    // The first report is of the first socket that listens, once, and of no other.
    let (error, bound) = wire.bind(volume, PACKETS, "bound");
    assert_eq!(error, 0);
    for _ in 0..3 {
        assert_eq!(wire.call(SOCKET_LISTEN, bound, &1_u32.to_le_bytes()).0, 0);
    }
    let listening = Listening { node: bound, kind: SocketKind::Seqpacket };
    assert_eq!(wire.report(), (FsReport::Listen(listening), true));
    // One for datagrams is reported when it is bound, and does not listen.
    let (error, taking) = wire.bind(volume, DATAGRAMS, "taking");
    assert_eq!(error, 0);
    let listening = Listening { node: taking, kind: SocketKind::Datagram };
    assert_eq!(wire.report(), (FsReport::Listen(listening), true));
    let error = wire.call(SOCKET_LISTEN, taking, &1_u32.to_le_bytes()).0;
    assert_eq!(error, -libc::EOPNOTSUPP);
    wire.call(SOCKET_RELEASE, taking, &[]);
    // What it has bound itself is its own.
    assert_eq!(wire.connect(bound, PACKETS, 0), (0, bound.to_le_bytes().to_vec()));
    wire.call(SOCKET_RELEASE, bound, &[]);
    wire.call(SOCKET_RELEASE, bound, &[]);
    // Then the supervisor is asked, and the guest waits for it.
    let waits = {
        let body: Vec<u8> = [vec![7; 16], PACKETS.to_le_bytes().to_vec(), vec![0; 4]].concat();
        wire.send(SOCKET_CONNECT, bound, &body)
    };
    let (FsReport::Connect(wanted), true) = wire.report() else { panic!("another report") };
    assert_eq!((wanted.kind, wanted.token, wanted.uid), (SocketKind::Seqpacket, [7; 16], 0));
    let verdict = FsVerdict { request: wanted.request, error: libc::EACCES };
    let verdict = serde_json::to_vec(&verdict).unwrap();
    seqpacket::send(wire.server.control.as_ref().unwrap(), &verdict, &[]).unwrap();
    assert_eq!(wire.reply(waits).0, -libc::EACCES);
    // No more than so many.
    let errors: Vec<_> =
        (0..1100).map(|number| wire.bind(volume, STREAM, &number.to_string()).0).collect();
    assert_eq!(errors.iter().filter(|error| **error == 0).count(), 1024);
    assert_eq!(errors.last(), Some(&-libc::ENOSPC));
    wire.is_well();
}

#[test]
fn noise_is_survived() {
    let mut wire = Wire::new();
    wire.init();
    assert_eq!(wire.call(LOOKUP, 1, b"w\0").0, 0);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    for round in 0..20_000 {
        // Requests that forget everything are rare, so that there is something to attack.
        let opcode = match random(56 + OUR_OWN.len() as u64) as u32 {
            INIT | DESTROY | FORGET if round % 64 != 0 => CREATE,
            opcode => *OUR_OWN.get((opcode as usize).wrapping_sub(56)).unwrap_or(&opcode),
        };
        let mut body = vec![0; random(160) as usize];
        for field in body.chunks_mut(4) {
            let value = match random(6) {
                0 => random(u64::MAX) as u32,
                1 => u32::MAX,
                2 => 4096,
                3 => u32::from_le_bytes(*b"ab\0\0"),
                _ => random(4) as u32,
            };
            field.copy_from_slice(&value.to_le_bytes()[..field.len()]);
        }
        let node = random(4);
        wire.send(opcode, node, &body);
        while wire.next(0).is_some() {}
    }
    wire.is_well();
}
