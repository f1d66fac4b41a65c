//! Names: creating, finding, renaming and removing them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev, mknodat, renameat_with};
use rustix::io::Errno;

use crate::pod::{Pod, as_user};

/// Longer than the guest may cache names and attributes.
const STALE: Duration = Duration::from_millis(1100);

/// All attributes that must be the same through the mount and on the host.
fn facts(path: &Path) -> (u32, u64, u32, u32, u64, u64, u64, i64, i64) {
    let stat = fs::symlink_metadata(path).unwrap();
    let size = if stat.is_dir() { 0 } else { stat.size() };
    (
        stat.mode(),
        stat.nlink(),
        stat.uid(),
        stat.gid(),
        stat.rdev(),
        size,
        stat.ino(),
        stat.mtime(),
        stat.mtime_nsec(),
    )
}

fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            let target = fs::read_link(&path).ok();
            found.insert(name, format!("{:?} {target:?} {:?}", facts(&path), entry.file_type()));
            if entry.file_type().unwrap().is_dir() {
                todo.push(path);
            }
        }
    }
    found
}

fn populate(root: &Path) {
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::write(root.join("a/file"), b"hello").unwrap();
    fs::hard_link(root.join("a/file"), root.join("a/b/same")).unwrap();
    symlink("../file", root.join("a/b/link")).unwrap();
    symlink("/nowhere", root.join("dangling")).unwrap();
    let mode = Mode::from_raw_mode(0o640);
    mknodat(CWD, root.join("fifo"), FileType::Fifo, mode, 0).unwrap();
    mknodat(CWD, root.join("null"), FileType::CharacterDevice, mode, makedev(1, 3)).unwrap();
    mknodat(CWD, root.join("disk"), FileType::BlockDevice, mode, makedev(259, 70_000)).unwrap();
    drop(UnixListener::bind(root.join("socket")).unwrap());
    std::os::unix::fs::chown(root.join("a/file"), Some(1000), Some(2000)).unwrap();
    for (name, mode) in [("a", 0o1777), ("a/b", 0o2755), ("a/file", 0o4755)] {
        fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
}

#[test]
fn what_the_host_made_looks_the_same_to_the_guest() {
    let pod = Pod::new();
    populate(&pod.host);
    assert_eq!(tree(&pod.guest), tree(&pod.host));
    assert_eq!(tree(&pod.host).len(), 11);
}

#[test]
fn what_the_guest_makes_looks_the_same_to_the_host() {
    let pod = Pod::new();
    populate(&pod.guest);
    assert_eq!(tree(&pod.guest), tree(&pod.host));
    assert_eq!(fs::read(pod.host.join("a/b/same")).unwrap(), b"hello");
}

#[test]
fn a_listing_has_dot_and_dot_dot_and_numbers_that_stat_gives() {
    let pod = Pod::new();
    fs::create_dir(pod.host.join("d")).unwrap();
    fs::write(pod.host.join("d/f"), b"").unwrap();
    let directory = File::open(pod.guest.join("d")).unwrap();
    let entries: Vec<_> = rustix::fs::Dir::read_from(&directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().to_str().unwrap().to_owned(), entry.ino()))
        .collect();
    let names: Vec<_> = entries.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [".", "..", "f"]);
    let number = |path: &str| fs::metadata(pod.guest.join(path)).unwrap().ino();
    assert_eq!(entries[0].1, number("d"));
    assert_eq!(entries[1].1, number(""));
    assert_eq!(entries[2].1, number("d/f"));
}

#[test]
fn rename_flags_behave() {
    let pod = Pod::new();
    let (one, two) = (pod.guest.join("one"), pod.guest.join("two"));
    fs::write(&one, b"1").unwrap();
    fs::write(&two, b"2").unwrap();
    let rename = |flags| renameat_with(CWD, &one, CWD, &two, flags);
    assert_eq!(rename(RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename(RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(pod.host.join("one")).unwrap(), b"2");
    assert_eq!(fs::read(&two).unwrap(), b"1");
    rename(RenameFlags::empty()).unwrap();
    assert_eq!(fs::read(&two).unwrap(), b"2");
    assert!(!pod.host.join("one").exists());
    // A whiteout, which an overlay in the guest leaves where a file was.
    renameat_with(CWD, &two, CWD, &one, RenameFlags::WHITEOUT).unwrap();
    let whiteout = fs::metadata(pod.host.join("two")).unwrap();
    assert!(whiteout.file_type().is_char_device());
    assert_eq!(whiteout.rdev(), 0);
}

#[test]
fn errors_are_those_of_the_host() {
    let pod = Pod::new();
    fs::create_dir_all(pod.guest.join("full/x")).unwrap();
    let kind = |result: std::io::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(fs::remove_dir(pod.guest.join("full"))), ErrorKind::DirectoryNotEmpty);
    assert_eq!(kind(fs::create_dir(pod.guest.join("full"))), ErrorKind::AlreadyExists);
    assert_eq!(kind(fs::remove_file(pod.guest.join("none"))), ErrorKind::NotFound);
    assert_eq!(kind(fs::remove_file(pod.guest.join("full"))), ErrorKind::IsADirectory);
    let long = "n".repeat(256);
    assert_eq!(kind(fs::create_dir(pod.guest.join(long))), ErrorKind::InvalidFilename);
}

#[test]
fn fifos_and_sockets_connect_processes_of_the_guest() {
    let pod = Pod::new();
    let fifo = pod.guest.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let listener = UnixListener::bind(pod.guest.join("socket")).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| fs::write(&fifo, b"through the fifo").unwrap());
        scope.spawn(|| {
            let mut stream = UnixStream::connect(pod.guest.join("socket")).unwrap();
            stream.write_all(b"through the socket").unwrap();
        });
        assert_eq!(fs::read(&fifo).unwrap(), b"through the fifo");
        let mut text = String::new();
        listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through the socket");
    });
}

#[test]
fn what_a_user_creates_belongs_to_that_user() {
    let pod = Pod::new();
    fs::set_permissions(&pod.guest, PermissionsExt::from_mode(0o1777)).unwrap();
    fs::create_dir(pod.guest.join("team")).unwrap();
    std::os::unix::fs::chown(pod.guest.join("team"), None, Some(3000)).unwrap();
    fs::set_permissions(pod.guest.join("team"), PermissionsExt::from_mode(0o2775)).unwrap();
    as_user(1000, 2000, &[3000], || {
        rustix::process::umask(Mode::from_raw_mode(0o027));
        let guest = &pod.guest;
        fs::write(guest.join("file"), b"").unwrap();
        fs::create_dir(guest.join("directory")).unwrap();
        symlink("x", guest.join("link")).unwrap();
        mknodat(CWD, guest.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        // Allowed by a supplementary group, which only the guest's kernel knows.
        fs::write(guest.join("team/file"), b"").unwrap();
        fs::create_dir(guest.join("team/directory")).unwrap();
    });
    let stat = |name: &str| {
        let stat = fs::symlink_metadata(pod.host.join(name)).unwrap();
        (stat.uid(), stat.gid(), stat.mode() & 0o7777)
    };
    assert_eq!(stat("file"), (1000, 2000, 0o640));
    assert_eq!(stat("directory"), (1000, 2000, 0o750));
    assert_eq!(stat("link"), (1000, 2000, 0o777));
    assert_eq!(stat("fifo"), (1000, 2000, 0o640));
    assert_eq!(stat("team/file"), (1000, 3000, 0o640));
    assert_eq!(stat("team/directory"), (1000, 3000, 0o2750));
    as_user(1001, 1001, &[], || {
        let denied = fs::write(pod.guest.join("team/other"), b"").unwrap_err();
        assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
        let sticky = fs::remove_file(pod.guest.join("file")).unwrap_err();
        assert_eq!(sticky.kind(), ErrorKind::PermissionDenied);
    });
}

#[test]
fn changes_of_the_host_are_seen_within_the_time_that_the_guest_may_cache() {
    let pod = Pod::new();
    let (host, guest) = (pod.host.join("file"), pod.guest.join("file"));
    assert!(!guest.exists());
    fs::write(&host, b"first").unwrap();
    assert_eq!(fs::read(&guest).unwrap(), b"first", "what is not there is not remembered");
    thread::sleep(STALE);
    assert_eq!(fs::read(&guest).unwrap(), b"first");
    fs::write(&host, b"second, longer").unwrap();
    thread::sleep(STALE);
    assert_eq!(fs::read(&guest).unwrap(), b"second, longer");
    fs::write(pod.host.join("new"), b"replaced").unwrap();
    fs::rename(pod.host.join("new"), &host).unwrap();
    thread::sleep(STALE);
    assert_eq!(fs::read(&guest).unwrap(), b"replaced");
    fs::remove_file(&host).unwrap();
    thread::sleep(STALE);
    assert!(!guest.exists());
}

#[test]
fn a_directory_that_the_host_removes_under_the_guest_is_an_error_and_no_more() {
    let pod = Pod::new();
    fs::create_dir(pod.host.join("d")).unwrap();
    let held = File::open(pod.guest.join("d")).unwrap();
    fs::remove_dir(pod.host.join("d")).unwrap();
    assert_eq!(rustix::fs::Dir::read_from(&held).unwrap().count(), 0);
    let created = rustix::fs::mkdirat(&held, "x", Mode::from_raw_mode(0o755));
    assert_eq!(created, Err(Errno::NOENT));
    // The name is free for something else.
    fs::write(pod.host.join("d"), b"now a file").unwrap();
    thread::sleep(STALE);
    assert_eq!(fs::read(pod.guest.join("d")).unwrap(), b"now a file");
}

#[test]
fn what_is_attached_later_is_served_and_kept_apart() {
    let pod = Pod::new();
    let other = pod.other_host();
    fs::create_dir(other.join("d")).unwrap();
    fs::create_dir(pod.host.join("d")).unwrap();
    for root in [&pod.host, &other] {
        fs::write(root.join("d/file"), root.as_os_str().as_encoded_bytes()).unwrap();
    }
    pod.attach(&other, "c/mounts/0");

    let volume = pod.root.join("c/mounts/0");
    assert_eq!(fs::read(volume.join("d/file")).unwrap(), other.as_os_str().as_encoded_bytes());
    let stat = |path: &Path| fs::metadata(path).unwrap();
    // On the host they have the same inode number, on two devices; the guest has one device.
    let (here, there) = (pod.guest.join("d/file"), volume.join("d/file"));
    assert_eq!(stat(&pod.host.join("d/file")).ino(), stat(&other.join("d/file")).ino());
    assert_eq!(stat(&here).dev(), stat(&there).dev());
    assert_ne!(stat(&here).ino(), stat(&there).ino());
    let moved = fs::rename(&here, volume.join("moved")).unwrap_err();
    assert_eq!(moved.kind(), ErrorKind::CrossesDevices);
    let link = fs::hard_link(&here, volume.join("link")).unwrap_err();
    assert_eq!(link.kind(), ErrorKind::CrossesDevices);
}
