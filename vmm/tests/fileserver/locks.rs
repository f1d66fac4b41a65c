//! Locks between processes of the guest, and between guest and host.

// UNSAFETY: locks of open file descriptions and of processes have no safe wrapper.
#![expect(unsafe_code, reason = "fcntl")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::pod::{Pod, THREADS};

fn open(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Locks bytes 10 to 19 for this open file description.
fn range(file: &File, kind: libc::c_int, wait: bool) -> io::Result<()> {
    let command = if wait { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
    control(file, command, kind, (10, 10))
}

/// Locks one byte for this process.
fn byte(file: &File, at: i64, command: libc::c_int) -> io::Result<()> {
    control(file, command, libc::F_WRLCK, (at, 1))
}

/// Whether the host sees a lock of the guest on a byte.
fn is_locked(host: &File, at: i64) -> bool {
    let locked = is_busy(control(host, libc::F_OFD_SETLK, libc::F_WRLCK, (at, 1)));
    control(host, libc::F_OFD_SETLK, libc::F_UNLCK, (at, 1)).unwrap();
    locked
}

fn control(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    (l_start, l_len): (i64, i64),
) -> io::Result<()> {
    let l_type = libc::c_short::try_from(kind).unwrap();
    let lock = libc::flock { l_type, l_whence: 0, l_start, l_len, l_pid: 0 };
    // SAFETY: the lock outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn is_busy(result: io::Result<()>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
}

#[test]
fn whole_files_are_locked_between_guest_and_host() {
    let pod = Pod::new();
    let (guest, other) = (open(&pod.guest.join("file")), open(&pod.guest.join("file")));
    let host = open(&pod.host.join("file"));
    let try_lock = |file: &File| flock(file, FlockOperation::NonBlockingLockExclusive);
    try_lock(&guest).unwrap();
    assert_eq!(try_lock(&other), Err(Errno::AGAIN));
    assert_eq!(try_lock(&host), Err(Errno::AGAIN));
    drop(guest);
    // The guest's kernel reports the last close a moment later.
    let start = Instant::now();
    while try_lock(&host).is_err() {
        assert!(start.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(try_lock(&other), Err(Errno::AGAIN));
    flock(&host, FlockOperation::Unlock).unwrap();
    try_lock(&other).unwrap();
}

#[test]
fn ranges_are_locked_between_guest_and_host() {
    let pod = Pod::new();
    let guest = open(&pod.guest.join("file"));
    let host = open(&pod.host.join("file"));
    range(&guest, libc::F_RDLCK, false).unwrap();
    range(&host, libc::F_RDLCK, false).unwrap();
    assert!(is_busy(range(&host, libc::F_WRLCK, false)), "the guest reads");
    range(&guest, libc::F_UNLCK, false).unwrap();
    range(&host, libc::F_WRLCK, false).unwrap();
    assert!(is_busy(range(&guest, libc::F_RDLCK, false)), "the host writes");
    range(&host, libc::F_UNLCK, false).unwrap();
    range(&guest, libc::F_WRLCK, false).unwrap();
}

#[test]
fn threads_of_one_process_that_take_their_first_locks_at_once_get_both() {
    let pod = Pod::new();
    for round in 0..200 {
        let name = format!("file-{round}");
        let (guest, host) = (open(&pod.guest.join(&name)), open(&pod.host.join(&name)));
        let start = Barrier::new(2);
        thread::scope(|scope| {
            for at in [0, 100] {
                let (guest, start) = (&guest, &start);
                scope.spawn(move || {
                    start.wait();
                    byte(guest, at, libc::F_SETLK).unwrap();
                });
            }
        });
        assert_eq!([0, 100].map(|at| is_locked(&host, at)), [true; 2], "round {round}");
    }
}

#[test]
fn a_lock_that_was_waited_for_joins_those_that_its_process_took_meanwhile() {
    let pod = Pod::new();
    let (guest, host) = (open(&pod.guest.join("file")), open(&pod.host.join("file")));
    byte(&host, 0, libc::F_OFD_SETLK).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| byte(&guest, 0, libc::F_SETLKW).unwrap());
        thread::sleep(Duration::from_millis(200));
        byte(&guest, 100, libc::F_SETLK).unwrap();
        assert!(!waiting.is_finished());
        control(&host, libc::F_OFD_SETLK, libc::F_UNLCK, (0, 1)).unwrap();
        waiting.join().unwrap();
    });
    assert_eq!([0, 100].map(|at| is_locked(&host, at)), [true; 2]);
    // An open file description that holds no lock any more is not used again.
    drop(open(&pod.guest.join("file")));
    assert_eq!([0, 100].map(|at| is_locked(&host, at)), [false; 2]);
}

#[test]
fn a_lock_of_an_open_file_ends_with_its_last_descriptor() {
    let pod = Pod::new();
    let (guest, host) = (open(&pod.guest.join("file")), open(&pod.host.join("file")));
    range(&guest, libc::F_WRLCK, false).unwrap();
    let copy = guest.try_clone().unwrap();
    drop(guest);
    assert!(is_locked(&host, 15));
    drop(copy);
    // The guest's kernel reports the last close a moment later.
    let start = Instant::now();
    while is_locked(&host, 15) {
        assert!(start.elapsed() < Duration::from_secs(5), "never released");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn more_waiters_than_threads_hold_nothing_else_up() {
    let pod = Pod::new();
    let host = open(&pod.host.join("file"));
    range(&host, libc::F_WRLCK, false).unwrap();
    let (done, finished) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..THREADS * 3 {
            let (done, path) = (done.clone(), pod.guest.join("file"));
            scope.spawn(move || {
                let file = open(&path);
                range(&file, libc::F_RDLCK, true).unwrap();
                done.send(()).unwrap();
            });
        }
        thread::sleep(Duration::from_millis(200));
        fs::write(pod.guest.join("other"), b"meanwhile").unwrap();
        assert_eq!(fs::read(pod.host.join("other")).unwrap(), b"meanwhile");
        assert!(finished.try_recv().is_err());
        range(&host, libc::F_UNLCK, false).unwrap();
        for _ in 0..THREADS * 3 {
            finished.recv_timeout(Duration::from_secs(5)).unwrap();
        }
    });
}

#[test]
fn a_waiter_goes_on_when_the_guest_releases() {
    let pod = Pod::new();
    let (holder, waiter) = (open(&pod.guest.join("file")), open(&pod.guest.join("file")));
    let mut pauses = Vec::new();
    for _ in 0..5 {
        flock(&holder, FlockOperation::LockExclusive).unwrap();
        pauses.push(thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                flock(&waiter, FlockOperation::LockExclusive).unwrap();
                let taken = Instant::now();
                flock(&waiter, FlockOperation::Unlock).unwrap();
                taken
            });
            thread::sleep(Duration::from_millis(200));
            let released = Instant::now();
            flock(&holder, FlockOperation::Unlock).unwrap();
            waiting.join().unwrap() - released
        }));
    }
    // Most continue at once, however busy the machine is: a retry without a wake-up comes about 50
    // ms later here.
    pauses.sort_unstable();
    eprintln!("a waiter went on after {pauses:?}");
    assert!(pauses[1] < Duration::from_millis(40), "{pauses:?}");
}

/// A process that takes a lock on byte 0 for itself, not for an open file description.
fn process_lock(path: &Path, then: &str) -> Child {
    let program = format!(
        "import fcntl,sys,time\nf=open({path:?},'r+')\nfcntl.lockf(f,fcntl.LOCK_EX,1)\n\
         print('locked',flush=True)\n{then}"
    );
    let mut command = Command::new("python3");
    command.args(["-c", &program]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn wait_until_locked(child: &mut Child) {
    let mut line = [0; 7];
    io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_eq!(&line, b"locked\n");
}

#[test]
fn a_process_loses_its_locks_when_it_closes_or_ends() {
    let pod = Pod::new();
    let (guest, host) = (pod.guest.join("file"), open(&pod.host.join("file")));
    let whole = |kind| {
        let lock = libc::flock { l_type: kind, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        // SAFETY: the lock outlives the call.
        unsafe { libc::fcntl(host.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }
    };
    let write = libc::c_short::try_from(libc::F_WRLCK).unwrap();
    let unlock = libc::c_short::try_from(libc::F_UNLCK).unwrap();
    // Closing any descriptor of the file releases the lock, as in POSIX; so does the process's end.
    for then in [format!("open({guest:?}).close()\nsys.stdin.read()"), "sys.stdin.read()".into()] {
        let mut child = process_lock(&guest, &then);
        wait_until_locked(&mut child);
        if then.starts_with("sys") {
            assert_eq!(whole(write), -1, "locked by the process");
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let start = Instant::now();
        while whole(write) == -1 {
            assert!(start.elapsed() < Duration::from_secs(5), "never released");
            thread::sleep(Duration::from_millis(1));
        }
        whole(unlock);
        let _ = child.kill();
        child.wait().unwrap();
    }
}

#[test]
fn a_waiter_that_is_killed_goes_away() {
    let pod = Pod::new();
    let host = open(&pod.host.join("file"));
    flock(&host, FlockOperation::LockExclusive).unwrap();
    let guest = pod.guest.join("file");
    let lock = libc::flock {
        l_type: libc::c_short::try_from(libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the lock outlives the call.
    assert_eq!(unsafe { libc::fcntl(host.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }, 0);
    let mut child = process_lock(&guest, "");
    thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    child.kill().unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(5), "cannot be killed");
        thread::sleep(Duration::from_millis(5));
    }
}
