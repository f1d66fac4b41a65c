//! Contents: reading, writing, holes, mappings, and concurrent access.

// UNSAFETY: mapping a file.
#![expect(unsafe_code, reason = "mmap")]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::process::Command;
use std::thread;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Mode, OFlags, SeekFrom as Position, copy_file_range, fallocate,
    linkat, openat, seek,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use crate::pod::Pod;

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

#[test]
fn what_is_written_is_read_at_any_size() {
    let pod = Pod::new();
    for len in [0, 1, 4095, 4096, 4097, 256 << 10, (256 << 10) + 1, 3_000_003] {
        let data = noise(len);
        fs::write(pod.guest.join("file"), &data).unwrap();
        assert!(fs::read(pod.host.join("file")).unwrap() == data, "{len} written");
        let other = format!("other-{len}");
        fs::write(pod.host.join(&other), &data).unwrap();
        assert!(fs::read(pod.guest.join(&other)).unwrap() == data, "{len} read");
    }
}

#[test]
fn open_flags_behave() {
    let pod = Pod::new();
    let path = pod.guest.join("file");
    let open = |flags| openat(CWD, &path, flags, Mode::from_raw_mode(0o600));
    assert_eq!(open(OFlags::RDONLY).unwrap_err(), Errno::NOENT);
    drop(open(OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL).unwrap());
    let again = open(OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL);
    assert_eq!(again.unwrap_err(), Errno::EXIST);
    drop(open(OFlags::WRONLY | OFlags::CREATE).unwrap());
    fs::write(&path, b"0123456789").unwrap();
    drop(open(OFlags::WRONLY | OFlags::TRUNC).unwrap());
    assert_eq!(fs::metadata(pod.host.join("file")).unwrap().size(), 0);
    assert_eq!(open(OFlags::RDONLY | OFlags::DIRECTORY).unwrap_err(), Errno::NOTDIR);
    assert_eq!(openat(CWD, &pod.guest, OFlags::WRONLY, Mode::empty()).unwrap_err(), Errno::ISDIR);
}

#[test]
fn appending_goes_to_the_end_whoever_wrote_last() {
    let pod = Pod::new();
    let open = |path| File::options().append(true).create(true).open(path).unwrap();
    let mut guest = open(pod.guest.join("log"));
    let mut host = open(pod.host.join("log"));
    for line in 0..10 {
        writeln!(guest, "guest {line}").unwrap();
        writeln!(host, "host {line}").unwrap();
    }
    let text = fs::read_to_string(pod.host.join("log")).unwrap();
    let expected: String = (0..10).map(|line| format!("guest {line}\nhost {line}\n")).collect();
    assert_eq!(text, expected);
}

#[test]
fn direct_reads_and_writes_work() {
    let pod = Pod::new();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(pod.guest.join("file"))
        .unwrap();
    let data = noise(1 << 20);
    file.write_all_at(&data, 0).unwrap();
    assert!(fs::read(pod.host.join("file")).unwrap() == data);
    // The host changes it; a direct read sees that at once.
    File::options()
        .write(true)
        .open(pod.host.join("file"))
        .unwrap()
        .write_all_at(b"now", 5)
        .unwrap();
    let mut seen = [0; 4096];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen[5..8], b"now");
}

#[test]
fn holes_can_be_found_and_made() {
    let pod = Pod::new();
    let file = File::create(pod.guest.join("file")).unwrap();
    file.set_len(10 << 20).unwrap();
    file.write_all_at(&[1; 4096], 5 << 20).unwrap();
    let file = File::options().read(true).write(true).open(pod.guest.join("file")).unwrap();
    assert_eq!(seek(&file, Position::Data(0)), Ok(5 << 20));
    assert_eq!(seek(&file, Position::Hole(5 << 20)), Ok((5 << 20) + 4096));
    assert_eq!(seek(&file, Position::Data((5 << 20) + 4096)), Err(Errno::NXIO));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 5 << 20, 4096).unwrap();
    assert_eq!(fs::metadata(pod.host.join("file")).unwrap().blocks(), 0);
    fallocate(&file, FallocateFlags::empty(), 0, 11 << 20).unwrap();
    assert_eq!(fs::metadata(pod.host.join("file")).unwrap().size(), 11 << 20);
    assert_eq!(fs::metadata(pod.guest.join("file")).unwrap().size(), 11 << 20);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let pod = Pod::new();
    let data = noise(1 << 20);
    fs::write(pod.guest.join("from"), &data).unwrap();
    let from = File::open(pod.guest.join("from")).unwrap();
    let to = File::create(pod.guest.join("to")).unwrap();
    let (mut at, mut into) = (1000, 2000);
    let copied = copy_file_range(&from, Some(&mut at), &to, Some(&mut into), 500_000).unwrap();
    assert_eq!(copied, 500_000);
    let seen = fs::read(pod.host.join("to")).unwrap();
    assert!(seen[2000..] == data[1000..501_000]);
}

#[test]
fn an_unnamed_file_can_be_given_a_name() {
    let pod = Pod::new();
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = openat(CWD, &pod.guest, flags, Mode::from_raw_mode(0o640)).unwrap();
    rustix::io::write(&file, b"unnamed").unwrap();
    assert_eq!(fs::read_dir(&pod.host).unwrap().count(), 0);
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, link, CWD, pod.guest.join("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(fs::read(pod.host.join("named")).unwrap(), b"unnamed");
}

#[test]
fn a_removed_file_stays_as_long_as_it_is_open() {
    let pod = Pod::new();
    let path = pod.guest.join("file");
    fs::write(&path, b"still here").unwrap();
    let mut file = File::options().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(fs::read_dir(&pod.host).unwrap().count(), 0);
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(b"anew").unwrap();
    file.set_len(4).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(file.metadata().unwrap().size(), 4);
}

#[test]
fn a_shared_mapping_reaches_the_file_and_the_file_reaches_a_mapping() {
    const LEN: usize = 64 << 10;
    let pod = Pod::new();
    fs::write(pod.guest.join("file"), noise(LEN)).unwrap();
    // The file is also open for appending: the pages must still go to their own offsets.
    let file = File::options().read(true).append(true).open(pod.guest.join("file")).unwrap();
    let writable = File::options().read(true).write(true).open(pod.guest.join("file")).unwrap();
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let map = unsafe {
        mmap(
            std::ptr::null_mut(),
            LEN,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &writable,
            0,
        )
    }
    .unwrap();
    // SAFETY: the mapping is as long as that and nobody else uses it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), LEN) };
    assert!(bytes == noise(LEN));
    bytes[10_000..10_004].copy_from_slice(b"here");
    // SAFETY: the range is the mapping.
    unsafe { msync(map, LEN, MsyncFlags::SYNC) }.unwrap();
    assert_eq!(&fs::read(pod.host.join("file")).unwrap()[10_000..10_004], b"here");
    assert_eq!(fs::metadata(pod.host.join("file")).unwrap().size(), LEN as u64);
    // The mapping has what the guest writes.
    writable.write_all_at(b"there", 20_000).unwrap();
    assert_eq!(&bytes[20_000..20_005], b"there");
    drop(file);
    // SAFETY: `bytes` is not used any more.
    unsafe { munmap(map, LEN) }.unwrap();
}

#[test]
fn a_program_can_be_run_and_run_again() {
    let pod = Pod::new();
    let program = pod.guest.join("true");
    let source = ["/bin/busybox", "/bin/true"].iter().find(|path| fs::exists(path).unwrap());
    // Copied by another process: if this one had the program open for writing, a child that another
    // test forks would keep it open until it has executed its own program, and this one could not
    // be executed meanwhile.
    let copied = Command::new("cp").arg(source.unwrap()).arg(&program).status();
    assert!(copied.unwrap().success());
    for _ in 0..3 {
        let mut command = Command::new(&program);
        let status = std::os::unix::process::CommandExt::arg0(&mut command, "true").status();
        assert!(status.unwrap().success());
    }
}

#[test]
fn pages_are_kept_between_opens_until_the_host_changes_the_file() {
    let pod = Pod::new();
    let (guest, host) = (pod.guest.join("file"), pod.host.join("file"));
    fs::write(&host, noise(1 << 20)).unwrap();
    thread::sleep(std::time::Duration::from_millis(100));
    for _ in 0..3 {
        assert!(fs::read(&guest).unwrap() == noise(1 << 20));
    }
    // The length is the same, so only the change time shows the change.
    File::options().write(true).open(&host).unwrap().write_all_at(b"changed", 1000).unwrap();
    assert_eq!(&fs::read(&guest).unwrap()[1000..1007], b"changed");
    File::options().write(true).open(&host).unwrap().write_all_at(b"again!!", 1000).unwrap();
    assert_eq!(&fs::read(&guest).unwrap()[1000..1007], b"again!!");
}

#[test]
fn many_hands_at_once() {
    let pod = Pod::new();
    thread::scope(|scope| {
        for worker in 0..8 {
            let root = pod.guest.join(format!("worker-{worker}"));
            scope.spawn(move || {
                fs::create_dir(&root).unwrap();
                for round in 0..50_usize {
                    let data = noise(round * 997);
                    let path = root.join(format!("file-{round}"));
                    fs::write(&path, &data).unwrap();
                    assert!(fs::read(&path).unwrap() == data);
                    fs::rename(&path, root.join("kept")).unwrap();
                    assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
                }
            });
        }
    });
    assert_eq!(fs::read_dir(&pod.host).unwrap().count(), 8);
}
