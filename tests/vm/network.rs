//! The network device between a tap of the host and a real guest kernel.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::memory::pss_kib;
use bulkhead_tests::network::Tap;
use bulkhead_tests::ping::ping;
use bulkhead_vmm::config::{DeviceConfig, Fd, NetConfig, RateLimit};
use bulkhead_vmm::control::Request;

use crate::devices::{ECHO, Probe, echo, wait_for};

/// The slot of the network device, which is attached late; Linux gives its platform device the same
/// number.
const SLOT: u8 = 12;
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The link-local address that the guest derives from the MAC address of [`network`] with one pair
/// of queues, RFC 4291.
const GUEST_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x42, 0x0aff, 0xfe4d, 1);
const PATIENCE: Duration = Duration::from_secs(20);
const ECHO_PORT: u16 = 7;
const COUNT_PORT: u16 = 9;

/// Who moves the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mover {
    Monitor,
    /// The host's kernel, by vhost-net.
    Kernel,
}

/// A network without rate limits.
fn network(queues: u8, mtu: u16) -> NetConfig {
    NetConfig {
        taps: (0..queues).map(Fd).collect(),
        vhost: Vec::new(),
        mac: [2, 0x42, 0x0a, 0x4d, 0, queues],
        mtu,
        receive: RateLimit::default(),
        transmit: RateLimit::default(),
    }
}

/// Attaches a network and has the guest configure it.
fn attach(probe: &mut Probe, mut network: NetConfig, mover: Mover) -> Tap {
    // The probe answers, so the guest has already probed all slots.
    assert!(!has_interface(probe));
    let tap = Tap::new("bulkhead-test", network.taps.len()).unwrap();
    tap.up(&format!("{HOST}/24"), network.mtu).unwrap();
    let vhost: Vec<File> = match mover {
        Mover::Monitor => Vec::new(),
        Mover::Kernel => network.taps.iter().map(|_| vhost()).collect(),
    };
    let pairs = u8::try_from(network.taps.len()).unwrap();
    network.vhost = (pairs..).map(Fd).take(vhost.len()).collect();
    let descriptors = [tap.descriptors(), vhost.iter().map(AsFd::as_fd).collect()].concat();
    let device = DeviceConfig::Net(network);
    probe.vm.call(Request::Attach { slot: SLOT, device }, &descriptors).unwrap();
    assert_eq!(probe.task(&format!("write {DRIVER}/bind virtio-mmio.{SLOT}")), "done");
    assert_eq!(probe.task(&format!("network up eth0 {GUEST} 255.255.255.0")), "done");
    tap
}

fn vhost() -> File {
    File::options().read(true).write(true).open("/dev/vhost-net").unwrap()
}

fn detach(probe: &mut Probe) {
    assert_eq!(probe.task(&format!("write {DRIVER}/unbind virtio-mmio.{SLOT}")), "done");
    probe.vm.call(Request::Detach { slot: SLOT }, &[]).unwrap();
    assert!(!has_interface(probe));
}

fn has_interface(probe: &mut Probe) -> bool {
    probe.task("list /sys/class/net").split(' ').any(|name| name == "eth0")
}

fn of_interface(probe: &mut Probe, what: &str) -> String {
    probe.task(&format!("show /sys/class/net/eth0/{what}"))
}

fn packets(probe: &mut Probe) -> u64 {
    of_interface(probe, "statistics/rx_packets").parse().unwrap()
}

fn connect() -> TcpStream {
    let address = SocketAddr::from((GUEST, ECHO_PORT));
    let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends and receives at the same time, because neither side can buffer everything.
fn echo_over(stream: &TcpStream, len: usize) {
    let bytes: Vec<u8> = (0_u8..251).cycle().take(len).collect();
    let mut back = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = stream;
            stream.write_all(&bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut stream = stream;
        stream.read_to_end(&mut back).unwrap();
    });
    assert!(back == bytes, "{} of {len} bytes came back as they were", back.len());
}

fn assert_alive(probe: &mut Probe) {
    ping(GUEST, 56, PATIENCE).unwrap();
    let answer = probe.task(&format!("network ping {HOST} 56"));
    assert!(answer.ends_with(" us"), "{answer}");
    assert!(probe.statistics().devices.iter().all(|device| !device.failed));
}

#[test]
fn an_interface_is_bound_late_and_another_takes_its_slot() {
    let mut probe = Probe::boot();
    let tap = attach(&mut probe, network(1, 1400), Mover::Monitor);
    assert_eq!(of_interface(&mut probe, "address"), "02:42:0a:4d:00:01");
    assert_eq!(of_interface(&mut probe, "mtu"), "1400");
    assert_eq!(of_interface(&mut probe, "carrier"), "1");
    for size in [0, 1300, 9000] {
        ping(GUEST, size, PATIENCE).unwrap();
        let answer = probe.task(&format!("network ping {HOST} {size}"));
        assert!(answer.ends_with(" us"), "{size}: {answer}");
    }
    // The device's filter follows the guest's new MAC address, and the host has to resolve it
    // again.
    assert_eq!(probe.task("network address eth0 02:42:0a:4d:00:77"), "done");
    tap.forget_neighbours().unwrap();
    assert_alive(&mut probe);

    detach(&mut probe);
    drop(tap);
    for (pairs, mover) in [(2, Mover::Kernel), (2, Mover::Monitor), (1, Mover::Kernel)] {
        let tap = attach(&mut probe, network(pairs, 9000), mover);
        assert_eq!(of_interface(&mut probe, "address"), format!("02:42:0a:4d:00:0{pairs}"));
        assert_eq!(of_interface(&mut probe, "mtu"), "9000");
        assert_alive(&mut probe);
        assert_eq!(has_kernel_thread(&probe), mover == Mover::Kernel);
        detach(&mut probe);
        drop(tap);
        assert!(!has_kernel_thread(&probe));
    }
}

fn has_kernel_thread(probe: &Probe) -> bool {
    probe.vm.threads().unwrap().iter().any(|name| name.starts_with("vhost-"))
}

#[test]
fn a_driver_may_come_back_to_an_interface_of_the_kernel() {
    let mut probe = Probe::boot();
    let _tap = attach(&mut probe, network(1, 1500), Mover::Kernel);
    for _ in 0..3 {
        assert_alive(&mut probe);
        assert_eq!(probe.task(&format!("write {DRIVER}/unbind virtio-mmio.{SLOT}")), "done");
        assert!(ping(GUEST, 56, Duration::from_secs(1)).is_err(), "nobody is there");
        assert_eq!(probe.task(&format!("write {DRIVER}/bind virtio-mmio.{SLOT}")), "done");
        let up = format!("network up eth0 {GUEST} 255.255.255.0");
        assert_eq!(probe.task(&up), "done");
    }
}

#[test]
fn what_is_no_vhost_net_is_refused_and_the_slot_stays_free() {
    let mut probe = Probe::boot();
    let tap = Tap::new("bulkhead-test", 1).unwrap();
    let other = File::open("/dev/null").unwrap();
    let network = || NetConfig { vhost: vec![Fd(1)], ..network(1, 1500) };
    let request = || Request::Attach { slot: SLOT, device: DeviceConfig::Net(network()) };
    let descriptors = [tap.descriptors(), vec![other.as_fd()]].concat();
    let refused = probe.vm.call(request(), &descriptors).unwrap_err();
    assert!(format!("{refused:#}").contains("slot 12"), "{refused:#}");
    let own = vhost();
    let descriptors = [tap.descriptors(), vec![own.as_fd()]].concat();
    probe.vm.call(request(), &descriptors).unwrap();
}

#[test]
fn the_kernel_reaches_memory_that_is_plugged() {
    let mut probe = Probe::boot();
    let _tap = attach(&mut probe, network(1, 1500), Mover::Kernel);
    assert_eq!(probe.task(&format!("network echo {ECHO_PORT}")), "done");
    let device = DeviceConfig::Mem { region_mib: 512 };
    probe.vm.call(Request::Attach { slot: SLOT + 1, device }, &[]).unwrap();
    let bind = format!("write {DRIVER}/bind virtio-mmio.{}", SLOT + 1);
    assert_eq!(probe.task(&bind), "done");
    probe.vm.call(Request::Plug { target_mib: 512 }, &[]).unwrap();
    wait_for("plugging", || probe.statistics().plugged_mib == Some(512));
    // The guest's kernel allocates from the new, high memory first.
    echo_over(&connect(), 8 << 20);
    assert_alive(&mut probe);
}

#[test]
fn streams_carry_every_byte_in_few_packets() {
    let mut probe = Probe::boot();
    assert_eq!(probe.task(&format!("network echo {ECHO_PORT}")), "done");
    for mover in [Mover::Monitor, Mover::Kernel] {
        let tap = attach(&mut probe, network(1, 1500), mover);
        carries_streams(&mut probe, &tap);
        detach(&mut probe);
    }
}

fn carries_streams(probe: &mut Probe, tap: &Tap) {
    let in_few_packets = |probe: &mut Probe, stream: &TcpStream| {
        let before = packets(probe);
        echo_over(stream, 8 << 20);
        let received = packets(probe) - before;
        println!("{received} packets for 8 MiB and the acknowledgements of as much");
        assert!(received < 4000, "the host segments: {received} packets");
    };
    in_few_packets(probe, &connect());
    // IPv6 neighbour discovery uses multicast, so this needs the guest's multicast filter too.
    let address = SocketAddrV6::new(GUEST_LINK_LOCAL, ECHO_PORT, 0, tap.index().unwrap());
    let mut stream = None;
    wait_for("an address without a duplicate", || {
        stream = TcpStream::connect_timeout(&address.into(), PATIENCE).ok();
        stream.is_some()
    });
    in_few_packets(probe, &stream.unwrap());
    assert_alive(probe);
    assert_eq!(dropped(probe), 0);
}

fn dropped(probe: &mut Probe) -> u64 {
    probe.statistics().devices.iter().map(|device| device.dropped).sum()
}

#[test]
fn several_queues_are_used_by_several_processors() {
    let mut probe = Probe::boot_with(|config| (config.vcpus, config.vcpus_max) = (2, 2));
    assert_eq!(probe.task("write /sys/devices/system/cpu/cpu1/online 1"), "done");
    assert_eq!(probe.task(&format!("network echo {ECHO_PORT}")), "done");
    for mover in [Mover::Monitor, Mover::Kernel] {
        let _tap = attach(&mut probe, network(2, 1500), mover);
        assert_eq!(probe.task("list /sys/class/net/eth0/queues"), "rx-0 rx-1 tx-0 tx-1");
        carries_streams_at_once(&mut probe);
        detach(&mut probe);
    }
}

fn carries_streams_at_once(probe: &mut Probe) {
    let streams: Vec<_> = (0..6).map(|_| connect()).collect();
    let echoes =
        streams.into_iter().map(|stream| thread::spawn(move || echo_over(&stream, 1 << 20)));
    for echo in echoes.collect::<Vec<_>>() {
        echo.join().unwrap();
    }
    assert_alive(probe);
}

/// Sends datagrams to the guest as fast as the host can; returns how many.
fn flood(time: Duration) -> u64 {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    let end = Instant::now() + time;
    let mut sent = 0;
    while Instant::now() < end {
        sent += u64::from(socket.send_to(&[0xa5; 1000], (GUEST, COUNT_PORT)).is_ok());
    }
    sent
}

#[test]
fn floods_from_either_side_pass_by() {
    passes_floods(Mover::Monitor);
}

#[test]
fn floods_from_either_side_pass_by_the_kernel() {
    passes_floods(Mover::Kernel);
}

fn passes_floods(mover: Mover) {
    let mut probe = Probe::boot();
    let _tap = attach(&mut probe, network(1, 1500), mover);
    assert_alive(&mut probe);
    echo(probe.open(ECHO), 1 << 20);
    let (before, _) = pss_kib(probe.vm.pid()).unwrap();

    let outside = thread::spawn(|| flood(Duration::from_secs(4)));
    echo(probe.open(ECHO), 100_000);
    println!("{} datagrams were sent to the guest", outside.join().unwrap());
    assert_alive(&mut probe);

    // Frames that a guest does not receive stay in the tap and cause no wake-ups.
    probe.vm.call(Request::Pause, &[]).unwrap();
    let ticks = probe.vm.ticks().unwrap();
    flood(Duration::from_secs(2));
    let used = probe.vm.ticks().unwrap() - ticks;
    probe.vm.call(Request::Resume, &[]).unwrap();
    println!("{used} ticks in two seconds for a guest that takes nothing");
    assert!(used <= 20, "{used} ticks");
    assert_alive(&mut probe);

    let inside = UdpSocket::bind((HOST, COUNT_PORT)).unwrap();
    let flood = probe.open(crate::devices::TASK);
    let words = format!("network flood {HOST}:{COUNT_PORT} 4");
    (&flood).write_all(words.as_bytes()).unwrap();
    flood.shutdown(Shutdown::Write).unwrap();
    echo(probe.open(ECHO), 100_000);
    let mut sent = String::new();
    (&flood).read_to_string(&mut sent).unwrap();
    println!("{sent} datagrams were sent by the guest");
    drop(inside);
    assert_alive(&mut probe);

    let (after, _) = pss_kib(probe.vm.pid()).unwrap();
    println!("the monitor itself has {before} kB before and {after} kB after");
    assert!(after < before + 500.0, "{before} kB before, {after} kB after");
}

#[test]
fn limits_hold_in_both_directions() {
    const BYTES: u64 = 256 << 10;
    const PACKETS: u64 = 50;
    let mut probe = Probe::boot();
    let bytes = RateLimit { bytes_per_s: Some(BYTES.try_into().unwrap()), packets_per_s: None };
    let limited = NetConfig { receive: bytes, transmit: bytes, ..network(1, 1500) };
    let tap = attach(&mut probe, limited, Mover::Monitor);
    assert_eq!(probe.task(&format!("network echo {ECHO_PORT}")), "done");
    let start = Instant::now();
    echo_over(&connect(), 1 << 20);
    let took = start.elapsed();
    println!("1 MiB there and back took {took:?} at {BYTES} bytes a second each way");
    assert!((3..30).contains(&took.as_secs()), "{took:?}");
    detach(&mut probe);
    drop(tap);

    let packets = RateLimit { bytes_per_s: None, packets_per_s: Some(PACKETS.try_into().unwrap()) };
    let limited = NetConfig { receive: packets, ..network(1, 1500) };
    let _tap = attach(&mut probe, limited, Mover::Monitor);
    wait_for("the first packet", || ping(GUEST, 0, PATIENCE).is_ok());
    let outside = thread::spawn(|| flood(Duration::from_secs(6)));
    let counted: u64 = probe.task(&format!("network count {COUNT_PORT} 4")).parse().unwrap();
    println!("{counted} packets in 4 s at {PACKETS} a second");
    assert!((PACKETS..=PACKETS * 5).contains(&counted), "{counted}");
    outside.join().unwrap();
}
