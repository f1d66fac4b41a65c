//! The virtio devices against a real guest kernel; `device-probe` is the guest's only process.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::vm::{Options, TestVm};
use bulkhead_vmm::config::{DeviceConfig, Fd, SlotDevice, VmConfig};
use bulkhead_vmm::control::{Reply, Request, Statistics};
use tempfile::TempDir;

const BOOT: Duration = Duration::from_secs(60);
pub(crate) const ECHO: u32 = 1;
const SEND: u32 = 2;
const COUNT: u32 = 3;
pub(crate) const TASK: u32 = 4;
const CLOSE: u32 = 5;
/// The slot of the disk that is attached late; Linux gives its platform device the same number.
const DISK_SLOT: u8 = 7;
const DISK: u64 = 1 << 20;

/// A machine whose first process is the probe.
pub(crate) struct Probe {
    pub(crate) vm: TestVm,
    _image: TempDir,
}

impl Probe {
    pub(crate) fn boot() -> Self {
        Self::boot_with(|config| {
            config.devices.push(SlotDevice { slot: 2, device: DeviceConfig::Balloon });
        })
    }

    pub(crate) fn boot_with(spoil: fn(&mut VmConfig)) -> Self {
        let image = tempfile::tempdir().unwrap();
        let initramfs = image.path().join("initramfs.cpio");
        let program = Path::new(env!("CARGO_BIN_EXE_device-probe"));
        guest_image::initramfs::write(program, &initramfs).unwrap();
        let options =
            Options { initramfs: Some(initramfs), spoil: Some(spoil), ..Options::default() };
        let vm = TestVm::boot(&options).unwrap();
        Self { vm, _image: image }
    }

    pub(crate) fn open(&mut self, port: u32) -> UnixStream {
        self.vm.open_stream(port, BOOT).unwrap()
    }

    pub(crate) fn task(&mut self, words: &str) -> String {
        let mut stream = self.open(TASK);
        stream.write_all(words.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub(crate) fn statistics(&mut self) -> Statistics {
        let (reply, _) = self.vm.call(Request::Statistics, &[]).unwrap();
        let Reply::Statistics(statistics) = reply else { panic!("{reply:?}") };
        statistics
    }

    /// The resident memory of the monitor, in kilobytes.
    pub(crate) fn resident(&self) -> u64 {
        let rollup = self.vm.proc("smaps_rollup").unwrap();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

/// Sends and receives at the same time, because neither side can buffer everything.
pub(crate) fn echo(stream: UnixStream, len: usize) {
    let mut sender = stream.try_clone().unwrap();
    let sending = thread::spawn(move || {
        sender.write_all(&pattern(len)).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    (&stream).read_to_end(&mut back).unwrap();
    sending.join().unwrap();
    assert!(back == pattern(len), "{} of {len} bytes came back as they were", back.len());
}

pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOOT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn streams_carry_every_byte_and_end_in_order() {
    let mut probe = Probe::boot();
    echo(probe.open(ECHO), 3 << 20);
    let streams: Vec<_> = (0..20).map(|_| probe.open(ECHO)).collect();
    let echoes = streams.into_iter().map(|stream| thread::spawn(|| echo(stream, 300_000)));
    for echo in echoes.collect::<Vec<_>>() {
        echo.join().unwrap();
    }
    let mut counted = probe.open(COUNT);
    counted.write_all(&pattern(1_000_000)).unwrap();
    counted.shutdown(Shutdown::Write).unwrap();
    let mut count = [0; 8];
    counted.read_exact(&mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), 1_000_000);
}

#[test]
fn a_slow_host_loses_nothing_and_a_lost_one_disturbs_nobody() {
    let mut probe = Probe::boot();
    let mut slow = probe.open(SEND);
    slow.write_all(&2_000_000_u64.to_le_bytes()).unwrap();
    let mut lost = probe.open(SEND);
    lost.write_all(&u64::MAX.to_le_bytes()).unwrap();
    lost.read_exact(&mut [0; 100_000]).unwrap();
    drop(lost);
    assert_eq!(probe.open(CLOSE).read(&mut [0]).unwrap(), 0);
    thread::sleep(Duration::from_millis(300));
    let mut bytes = Vec::new();
    slow.read_to_end(&mut bytes).unwrap();
    assert!(bytes == pattern(2_000_000));
    assert!(probe.statistics().devices.iter().all(|device| !device.failed));
}

#[test]
fn a_disk_is_bound_late_and_keeps_what_is_written() {
    let mut probe = Probe::boot();
    assert!(probe.task("read /dev/vda").starts_with("failed"));
    let disk = tempfile::tempfile().unwrap();
    disk.write_all_at(&pattern(usize::try_from(DISK).unwrap()), 0).unwrap();
    let device = DeviceConfig::Blk { disk: Fd(0), read_only: false, serial: "late-7".into() };
    let attach = Request::Attach { slot: DISK_SLOT, device };
    probe.vm.call(attach, &[disk.as_fd()]).unwrap();
    let bind = format!("/sys/bus/platform/drivers/virtio-mmio/bind virtio-mmio.{DISK_SLOT}");
    assert_eq!(probe.task(&format!("write {bind}")), "done");
    assert_eq!(probe.task("show /sys/block/vda/serial"), "late-7");
    assert_eq!(probe.task("read /dev/vda"), DISK.to_string());
    assert_eq!(probe.task("change /dev/vda"), "done");
    assert_eq!(contents(&disk, 0), pattern(4096));
    assert_eq!(contents(&disk, 1), [0xee; 4096]);
    assert_eq!(contents(&disk, 2), [0; 4096]);
    assert_eq!(contents(&disk, 3), [0; 4096]);
    assert_eq!(probe.task(&format!("write {}", bind.replacen("/bind", "/unbind", 1))), "done");
    probe.vm.call(Request::Detach { slot: DISK_SLOT }, &[]).unwrap();
    assert!(probe.task("read /dev/vda").starts_with("failed"));
}

fn contents(disk: &File, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    disk.read_exact_at(&mut bytes, page * 4096).unwrap();
    bytes
}

#[test]
fn random_numbers_come_from_the_host() {
    let mut probe = Probe::boot();
    let rng = probe.task("show /sys/class/misc/hw_random/rng_current");
    assert!(rng.starts_with("virtio_rng"), "{rng}");
    let first = probe.task("random");
    assert!(first.starts_with('['), "{first}");
    assert_ne!(first, probe.task("random"));
}

#[test]
fn the_balloon_takes_memory_and_gives_it_back() {
    let mut probe = Probe::boot();
    // The guest writes to nearly all of its memory, so that it takes memory of the host.
    assert_eq!(probe.task("use 56"), "done");
    probe.vm.call(Request::Balloon { target_mib: 48 }, &[]).unwrap();
    wait_for("inflating", || probe.statistics().balloon_mib == Some(48));
    let resident = probe.resident();
    assert!(resident < 90_000, "{resident} kB of 128 MiB are in use");
    probe.vm.call(Request::Balloon { target_mib: 0 }, &[]).unwrap();
    wait_for("deflating", || probe.statistics().balloon_mib == Some(0));
    assert_eq!(probe.task("use 56"), "done");
}

#[test]
fn an_idle_machine_uses_no_processor_time() {
    let mut probe = Probe::boot();
    let mut idle = probe.open(ECHO);
    // A stream with unread bytes on either side must not cause wake-ups either.
    let mut stalled = probe.open(SEND);
    stalled.write_all(&u64::MAX.to_le_bytes()).unwrap();
    idle.write_all(b"x").unwrap();
    thread::sleep(Duration::from_secs(2));
    let before = probe.vm.ticks().unwrap();
    thread::sleep(Duration::from_secs(2));
    let used = probe.vm.ticks().unwrap() - before;
    assert!(used <= 10, "{used} ticks in two seconds");
}
