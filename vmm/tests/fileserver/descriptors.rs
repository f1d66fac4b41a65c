//! A file server without a free descriptor refuses new files, and keeps those that are known.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, openat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::pod::Pod;

/// The limit of the process, far lower than [`FILES`].
const DESCRIPTORS: u64 = 64;
const FILES: usize = 200;
/// Longer than the guest caches a name.
const EXPIRY: Duration = Duration::from_millis(1200);

fn is_full<T>(result: io::Result<T>) -> bool {
    match result.map_err(|error| error.raw_os_error()) {
        Ok(_) => false,
        Err(Some(libc::ENFILE)) => true,
        Err(other) => panic!("errno {other:?}"),
    }
}

/// A pod whose guest remembers as many files as there can be.
fn full() -> Pod {
    let pod = Pod::with_descriptors(DESCRIPTORS);
    for number in 0..FILES {
        fs::write(pod.host.join(format!("file-{number}")), number.to_string()).unwrap();
    }
    let look = |number| fs::metadata(pod.guest.join(format!("file-{number}")));
    let refused = (0..FILES).filter(|number| is_full(look(*number))).count();
    assert!((1..FILES).contains(&refused), "{refused} were refused");
    pod
}

#[test]
fn what_the_guest_knows_stays_and_so_does_what_is_mounted_there() {
    let pod = Pod::with_descriptors(DESCRIPTORS);
    let directory = pod.guest.join("directory");
    fs::create_dir(&directory).unwrap();
    mount("tmpfs", &directory, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(directory.join("inside"), b"still here").unwrap();
    for number in 0..FILES {
        fs::write(pod.host.join(format!("file-{number}")), b"").unwrap();
    }
    let look = |number| fs::metadata(pod.guest.join(format!("file-{number}")));
    let refused = (0..FILES).filter(|number| look(*number).is_err()).count();
    assert!(refused > 0);
    thread::sleep(EXPIRY);
    // The guest's kernel looks the name up again; an error would make it detach the mount.
    let inside = fs::read(directory.join("inside"));
    let known = look(0);
    // Fails if the mount is gone already.
    let _ = unmount(&directory, UnmountFlags::DETACH);
    assert_eq!(inside.unwrap(), b"still here");
    assert!(known.unwrap().is_file());
}

#[test]
fn what_is_new_is_refused_and_leaves_nothing_behind() {
    let pod = full();
    let new = pod.guest.join("new");
    assert!(is_full(File::create(&new)));
    assert!(is_full(fs::create_dir(&new)));
    assert!(is_full(symlink("target", &new)));
    let mode = Mode::from_raw_mode(0o600);
    assert!(is_full(mknodat(CWD, &new, FileType::Fifo, mode, 0).map_err(io::Error::from)));
    let unnamed = openat(CWD, &pod.guest, OFlags::TMPFILE | OFlags::RDWR, mode);
    assert!(is_full(unnamed.map_err(io::Error::from)));
    assert!(!pod.host.join("new").exists());
}

/// Tries again for some seconds: the guest's kernel says a moment later what it has closed and
/// forgotten.
fn soon<T>(what: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let start = Instant::now();
    loop {
        match what() {
            Err(_) if start.elapsed() < Duration::from_secs(5) => {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
}

#[test]
fn there_is_room_again_when_the_guest_lets_go() {
    let pod = full();
    let listed = |pod: &Pod| fs::read_dir(&pod.guest).map(Iterator::count);
    assert!(is_full(listed(&pod)));
    for number in 0..10 {
        fs::remove_file(pod.guest.join(format!("file-{number}"))).unwrap();
    }
    soon(|| File::create(pod.guest.join("new"))).expect("nothing was let go of");
    // A listing has every name; those that cannot be remembered are not looked up with it.
    assert_eq!(soon(|| listed(&pod)).unwrap(), FILES - 10 + 1);
    // Open files need room as well, and give it back.
    let mut open = vec![soon(|| File::open(pod.guest.join("file-20"))).unwrap()];
    loop {
        match File::open(pod.guest.join("file-20")) {
            Ok(file) => open.push(file),
            refused => break assert!(is_full(refused)),
        }
    }
    drop(open);
    assert_eq!(soon(|| fs::read(pod.guest.join("file-20"))).unwrap(), b"20");
}
