//! A driver's requests to disks, most of all malformed ones.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::super::mock::{self, Driver, Part};
use super::super::{Ready, Serve, VirtioDevice};
use super::request::Status;
use super::*;

const DISK: usize = 1 << 20;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const IDENTIFY: u32 = 8;
const DISCARD: u32 = 11;
const ZERO: u32 = 13;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

fn file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&pattern(DISK), 0).unwrap();
    file
}

fn disk(read_only: bool) -> (Block, File) {
    let file = file();
    let logic = logic(RawDisk::new(file.try_clone().unwrap()).unwrap(), read_only, "serial-1");
    let mut logic = logic.unwrap();
    logic.write_through = false;
    (logic, file)
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; DISK];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Makes one request; returns its status and the bytes that the device wrote.
fn request(logic: &mut Block, parts: &[Part<'_>]) -> (Status, Vec<u8>) {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let request = driver.add(0, parts);
    driver.call(logic, Ready::Queue(0)).unwrap();
    let used = driver.used(0);
    assert_eq!(used.len(), 1);
    let room: u32 = parts.iter().map(|part| if let Part::In(len) = part { *len } else { 0 }).sum();
    let mut bytes = driver.written(&request, room);
    let status = match bytes.pop().unwrap() {
        0 => Status::Done,
        1 => Status::Failed,
        2 => Status::Unsupported,
        other => panic!("status {other}"),
    };
    bytes.truncate(used[0].1 as usize);
    (status, bytes)
}

#[test]
fn reads_give_the_bytes_of_the_disk() {
    let (mut logic, file) = disk(true);
    let parts = [Part::Out(&header(READ, 3)), Part::In(700), Part::In(836), Part::In(1)];
    let (status, bytes) = request(&mut logic, &parts);
    assert_eq!(status, Status::Done);
    assert!(bytes == contents(&file)[3 * 512..6 * 512]);
}

#[test]
fn writes_change_the_disk_there_and_nowhere_else() {
    let (mut logic, file) = disk(false);
    let data = vec![0xaa; 1024];
    let (front, back) = data.split_at(100);
    let parts = [Part::Out(&header(WRITE, 5)), Part::Out(front), Part::Out(back), Part::In(1)];
    assert_eq!(request(&mut logic, &parts).0, Status::Done);
    let mut expected = pattern(DISK);
    expected[5 * 512..7 * 512].fill(0xaa);
    assert!(contents(&file) == expected);
}

#[test]
fn the_layout_of_a_request_is_the_drivers_choice() {
    let (mut logic, file) = disk(false);
    let mut all = header(WRITE, 0).to_vec();
    all.extend([7; 512]);
    let (front, back) = all.split_at(9);
    let parts = [Part::Out(front), Part::Out(back), Part::In(1)];
    assert_eq!(request(&mut logic, &parts).0, Status::Done);
    assert_eq!(contents(&file)[..512], [7; 512]);
    let (status, bytes) = request(&mut logic, &[Part::Out(&header(READ, 0)), Part::In(513)]);
    assert_eq!((status, bytes), (Status::Done, vec![7; 512]));
}

/// Name, type, sector, data, room, status.
type Case<'a> = (&'a str, u32, u64, &'a [u8], u32, Status);

#[test]
fn requests_that_cannot_be_met_have_a_status_and_change_nothing() {
    let sector = [0; 512];
    let long = vec![0; SEGMENTS_MAX * 16 + 16];
    let cases: &[Case<'_>] = &[
        ("read behind the end", READ, 2048, &[], 512, Status::Failed),
        ("read over the end", READ, 2047, &[], 1024, Status::Failed),
        ("read that wraps", READ, u64::MAX, &[], 512, Status::Failed),
        ("read that wraps in bytes", READ, u64::MAX / 512, &[], 512, Status::Failed),
        ("read of half a sector", READ, 0, &[], 256, Status::Failed),
        ("write behind the end", WRITE, 2048, &sector, 0, Status::Failed),
        ("write of half a sector", WRITE, 0, &[1; 100], 0, Status::Failed),
        ("short serial", IDENTIFY, 0, &[], 19, Status::Failed),
        ("unknown", 99, 0, &[], 512, Status::Unsupported),
        ("secure erase", 14, 0, &sector, 0, Status::Unsupported),
        ("discard of nothing", DISCARD, 0, &[], 0, Status::Failed),
        ("discard cut off", DISCARD, 0, &[0; 15], 0, Status::Failed),
        ("discard too long", DISCARD, 0, &long, 0, Status::Failed),
        ("discard behind the end", DISCARD, 0, &segment(2048, 1, 0), 0, Status::Failed),
        ("discard with flags", DISCARD, 0, &segment(0, 1, 1), 0, Status::Unsupported),
        ("zeroes over the end", ZERO, 0, &segment(2047, 2, 0), 0, Status::Failed),
        ("zeroes with flags", ZERO, 0, &segment(0, 1, 2), 0, Status::Unsupported),
        (
            "zeroes, the second wrong",
            ZERO,
            0,
            &[segment(0, 1, 0), segment(4096, 1, 0)].concat(),
            0,
            Status::Failed,
        ),
    ];
    for (name, kind, sector, data, room, expected) in cases {
        let (mut logic, file) = disk(false);
        let parts = [Part::Out(&header(*kind, *sector)), Part::Out(data), Part::In(room + 1)];
        assert_eq!(request(&mut logic, &parts).0, *expected, "{name}");
        assert!(contents(&file) == pattern(DISK), "{name}");
    }
}

#[test]
fn a_short_header_fails_the_request_only() {
    let (mut logic, _file) = disk(false);
    let parts = [Part::Out(&[0; 15]), Part::In(513)];
    assert_eq!(request(&mut logic, &parts).0, Status::Failed);
    assert_eq!(request(&mut logic, &[Part::In(513)]).0, Status::Failed);
}

#[test]
fn a_read_only_disk_does_not_change() {
    for (kind, data) in
        [(WRITE, vec![0; 512]), (DISCARD, segment(0, 8, 0)), (ZERO, segment(0, 8, 0))]
    {
        let (mut logic, file) = disk(true);
        let parts = [Part::Out(&header(kind, 0)), Part::Out(&data), Part::In(1)];
        assert_eq!(request(&mut logic, &parts).0, Status::Failed);
        assert!(contents(&file) == pattern(DISK));
    }
}

#[test]
fn a_chain_without_a_status_byte_fails_the_device() {
    let (mut logic, file) = disk(false);
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    driver.add(0, &[Part::Out(&header(WRITE, 0)), Part::Out(&[0; 512])]);
    assert!(driver.call(&mut logic, Ready::Queue(0)).is_err());
    assert!(contents(&file) == pattern(DISK));
}

#[test]
fn flush_and_serial_answer() {
    let (mut logic, _file) = disk(false);
    let flush = request(&mut logic, &[Part::Out(&header(FLUSH, 0)), Part::In(1)]);
    assert_eq!(flush, (Status::Done, vec![]));
    let parts = [Part::Out(&header(IDENTIFY, 0)), Part::In(20), Part::In(1)];
    let (status, bytes) = request(&mut logic, &parts);
    assert_eq!(
        (status, bytes.as_slice()),
        (Status::Done, &b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0"[..])
    );
}

#[test]
fn discards_and_zeroes_leave_zeroes_and_keep_the_size() {
    for (kind, flags) in [(DISCARD, 0), (ZERO, 0), (ZERO, 1)] {
        let (mut logic, file) = disk(false);
        let data = [segment(8, 8, flags), segment(2040, 8, flags)].concat();
        let parts = [Part::Out(&header(kind, 0)), Part::Out(&data), Part::In(1)];
        assert_eq!(request(&mut logic, &parts).0, Status::Done);
        let mut expected = pattern(DISK);
        expected[8 * 512..16 * 512].fill(0);
        expected[2040 * 512..].fill(0);
        assert!(contents(&file) == expected, "{kind} {flags}");
        assert_eq!(file.metadata().unwrap().size(), DISK as u64);
    }
}

#[test]
fn a_disk_that_became_shorter_fails_the_read() {
    let (mut logic, file) = disk(false);
    file.set_len(1024).unwrap();
    let parts = [Part::Out(&header(READ, 0)), Part::In(4096), Part::In(1)];
    assert_eq!(request(&mut logic, &parts).0, Status::Failed);
}

#[test]
fn many_requests_are_answered_in_order_with_one_signal() {
    let (mut logic, _file) = disk(false);
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let heads: Vec<u16> = (0..40)
        .map(|sector| {
            driver.add(0, &[Part::Out(&header(READ, sector)), Part::In(512), Part::In(1)]).head
        })
        .collect();
    driver.call(&mut logic, Ready::Queue(0)).unwrap();
    let used: Vec<u16> = driver.used(0).into_iter().map(|(head, _)| head).collect();
    assert_eq!(used, heads);
    assert_eq!(driver.line.irq().read().unwrap(), 1);
}

#[test]
fn without_flushes_each_write_is_durable() {
    let (mut logic, _file) = disk(false);
    let memory = mock::memory();
    let driver = Driver::new(&memory, QUEUE_SIZES);
    logic.start(F_FLUSH, &driver.sources).unwrap();
    assert!(!logic.write_through);
    logic.start(0, &driver.sources).unwrap();
    assert!(logic.write_through);
    let parts = [Part::Out(&header(WRITE, 0)), Part::Out(&[0; 512]), Part::In(1)];
    assert_eq!(request(&mut logic, &parts).0, Status::Done);
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let writable = device(file(), false, "").unwrap();
    let mut capacity = [0; 8];
    writable.config().read(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), DISK as u64 / 512);
    assert_eq!(writable.config().u32(12), BUFFERS_MAX);
    assert_eq!(writable.identity().features & (F_RO | F_DISCARD), F_DISCARD);
    let read_only = device(file(), true, "").unwrap();
    assert_eq!(read_only.identity().features & (F_RO | F_DISCARD), F_RO);
}

#[test]
fn a_disk_must_be_a_file_and_a_serial_must_fit() {
    assert!(device(File::open("/").unwrap(), true, "").is_err());
    assert!(device(File::open("/dev/null").unwrap(), true, "").is_err());
    assert!(device(file(), true, "twenty-one characters").is_err());
    assert!(device(file(), true, "twenty   characters.").is_ok());
}

#[test]
fn malformed_chains_are_survived() {
    let empty = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1_0000).unwrap();
        logic(RawDisk::new(file).unwrap(), false, "").unwrap()
    };
    mock::survives_malformed(QUEUE_SIZES, empty);
    mock::survives_noise(QUEUE_SIZES, 300, empty);
}
