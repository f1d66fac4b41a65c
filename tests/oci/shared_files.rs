//! Files of the host in a container: locks, what its file system can do, and when changes by the
//! host are seen, all as under runc.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::thread::sleep;
use std::time::Duration;

use bulkhead_tests::runtime::comes_true;
use rustix::fs::{FlockOperation, flock, statvfs};

use crate::volume::{Volume, ask, said};

/// Locks between processes of one container, on a file of the volume and on one of the root.
const WITHIN: &str = r#"
F = fcntl
def record(kind, start): return struct.pack("hhqqi", kind, 0, start, 1, 0)
def lock(file, command, start): return F.fcntl(file, command, record(F.F_WRLCK, start))
def child(work):
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try: work(go); os._exit(0)
        except OSError as error: os._exit(error.errno)
    os.close(go)
    os.read(ready, 1)
    return pid
def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
class Late(Exception): pass
def late(number, frame): raise Late()
signal.signal(signal.SIGALRM, late)

for path in ["/v/locked", "/locked"]:
    file = os.open(path, os.O_RDWR | os.O_CREAT)

    # Two processes that wait for each other.
    def other(go):
        mine = os.open(path, os.O_RDWR)
        lock(mine, F.F_SETLKW, 1)
        os.write(go, b"x")
        lock(mine, F.F_SETLKW, 0)
    lock(file, F.F_SETLKW, 0)
    pid = child(other)
    time.sleep(0.5)
    try:
        signal.alarm(20)
        lock(file, F.F_SETLKW, 1)
        print("both got it")
    except OSError as error: print("circle", error.errno == errno.EDEADLK)
    except Late: print("circle: for ever")
    signal.alarm(0)
    F.fcntl(file, F.F_SETLK, record(F.F_UNLCK, 0))
    print("the other", end(pid))

    # Who holds a lock.
    def holder(go):
        lock(os.open(path, os.O_RDWR), F.F_SETLK, 7)
        os.write(go, b"x")
        signal.pause()
    pid = child(holder)
    found = struct.unpack("hhqqi", F.fcntl(file, F.F_GETLK, record(F.F_WRLCK, 7)))
    print("holder", found[0] == F.F_WRLCK, found[4] == pid)
    try: lock(file, F.F_SETLK, 7)
    except OSError as error: print("busy", errno.errorcode[error.errno])
    os.kill(pid, signal.SIGKILL)
    end(pid)
    lock(file, F.F_SETLK, 7)

    # Waiting for a whole file, until a signal, and until the end.
    held = os.open(path, os.O_RDWR)
    F.flock(held, F.LOCK_EX)
    start = time.monotonic()
    signal.alarm(1)
    try: F.flock(os.open(path, os.O_RDWR), F.LOCK_EX)
    except Late: print("interrupted", time.monotonic() - start < 5)
    def waiter(go):
        os.write(go, b"x")
        F.flock(os.open(path, os.O_RDWR), F.LOCK_EX)
    pid = child(waiter)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    print("killed", end(pid))
    pid = child(waiter)
    time.sleep(0.3)
    start = time.monotonic()
    F.flock(held, F.LOCK_SH)
    second = os.open(path, os.O_RDWR)
    F.flock(second, F.LOCK_SH)
    F.flock(held, F.LOCK_UN)
    os.close(second)
    print("handed over", end(pid), time.monotonic() - start < 5)

    # Closing any descriptor of a file releases the process's locks of ranges.
    lock(file, F.F_SETLK, 3)
    os.close(os.open(path, os.O_RDONLY))
    def taker(go):
        os.write(go, b"x")
        lock(os.open(path, os.O_RDWR), F.F_SETLK, 3)
    print("released", end(child(taker)))
"#;

/// What `WITHIN` prints of each file.
const AS_UNDER_RUNC: &str = "circle True\nthe other 0\nholder True True\nbusy EAGAIN\n\
     interrupted True\nkilled -9\nhanded over 0 True\nreleased 0";

#[test]
fn locks_within_a_container() {
    let [runc, ours] = ask(|volume| volume.python(WITHIN));
    assert_eq!(runc, [AS_UNDER_RUNC; 2].join("\n"));
    assert_eq!(ours, runc);
}

/// Waits for a lock of the host until SIGALRM, then until the host releases it; reads what the host
/// wrote meanwhile, through pages that were read before.
const WAITER: &str = r#"
class Late(Exception): pass
def late(number, frame): raise Late()
signal.signal(signal.SIGALRM, late)
file = os.open("/v/shared", os.O_RDWR)
before = os.pread(file, 5, 0).decode()
open("/v/ready", "w").close()
start = time.monotonic()
signal.alarm(1)
try: fcntl.flock(file, fcntl.LOCK_EX); print("not locked")
except Late: print("interrupted", time.monotonic() - start < 5)
fcntl.flock(file, fcntl.LOCK_EX)
print(before, os.pread(file, 5, 0).decode())
fcntl.flock(file, fcntl.LOCK_UN)
"#;

/// Counts up in one file under a lock of another, while a thread reads so often that what the kernel
/// has asked for is always recent.
const COUNTER: &str = r#"
import threading
lock = os.open("/v/lock", os.O_RDWR)
number = os.open("/v/number", os.O_RDWR)
def watch():
    while True: os.pread(number, 8, 0); time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
open("/v/ready", "w").close()
for turn in range(100):
    fcntl.flock(lock, fcntl.LOCK_EX)
    value = int(os.pread(number, 8, 0)) + 1
    os.pwrite(number, b"%08d" % value, 0)
    fcntl.flock(lock, fcntl.LOCK_UN)
"#;

/// What a file system of the host can do.
const ABILITIES: &str = r#"
def tried(what):
    try: what(); return "done"
    except OSError as error: return errno.errorcode[error.errno]
print(f'device {os.stat("/").st_dev == os.stat("/v").st_dev}, a mount {os.path.ismount("/v")}')
flags = bytearray(8)
fcntl.ioctl(os.open("/v/file", os.O_RDONLY), 0x80086601, flags)
print("flags", struct.unpack("q", flags)[0])
nodump = bytearray(struct.pack("q", 0x40))
file = os.open("/v/file", os.O_RDONLY)
print("nodump", tried(lambda: fcntl.ioctl(file, 0x40086602, nodump)))
fcntl.ioctl(file, 0x80086601, flags)
print("flags", struct.unpack("q", flags)[0])
print("ioctl", tried(lambda: fcntl.ioctl(file, 0x5401, bytearray(64))))
# User 33 may read and write, others nothing; what is created below gets the same.
entries = [(1, 7, -1), (2, 6, 33), (4, 5, -1), (16, 7, -1), (32, 0, -1)]
lists = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
def listed(where):
    os.mkdir(where)
    for kind in ["access", "default"]: os.setxattr(where, "system.posix_acl_" + kind, lists)
    os.close(os.open(where + "/new", os.O_CREAT | os.O_WRONLY, 0o666))
    print(oct(os.stat(where + "/new").st_mode), len(os.getxattr(where + "/new", "system.posix_acl_access")))
os.umask(0o077)
print("lists", tried(lambda: listed("/v/lists")))
os.umask(0o022)
print("trusted", tried(lambda: os.setxattr("/v/file", "trusted.x", b"1")), os.listxattr("/v/file"))
for name in ["l", "l/d", "l/d/old", "u", "w", "m"]: os.mkdir("/v/" + name)
open("/v/l/file", "w").write("lower")
options = b"lowerdir=/v/l,upperdir=/v/u,workdir=/v/w"
libc = ctypes.CDLL(None, use_errno=True)
mounted = libc.mount(b"o", b"/v/m", b"overlay", 0, options)
print("overlay", "done" if mounted == 0 else errno.errorcode[ctypes.get_errno()])
os.rmdir("/v/m/d/old"); os.rmdir("/v/m/d"); os.mkdir("/v/m/d"); open("/v/m/d/new", "w").close()
os.symlink("new", "/v/m/d/link"); os.rename("/v/m/file", "/v/m/moved")
open("/v/m/moved", "a").write(" and upper")
print(sorted(os.listdir("/v/m")), sorted(os.listdir("/v/m/d")), open("/v/m/moved").read())
libc.umount(b"/v/m")
libc.mount(b"o", b"/v/m", b"overlay", 0, options)
print(sorted(os.listdir("/v/m")), sorted(os.listdir("/v/m/d")), os.listdir("/v/l/d"))
libc.umount(b"/v/m")
"#;

#[test]
fn what_the_host_has_and_does() {
    let [runc, ours] = ask(|volume| {
        [
            volume.python(ABILITIES),
            locked_by_the_host(volume),
            counted_by_both(volume),
            mapped(volume),
            changed(volume),
        ]
        .join("\n")
    });
    assert_eq!(
        runc,
        "device False, a mount True\nflags 0\nnodump done\nflags 64\nioctl ENOTTY\n\
         0o100660 44\nlists done\n\
         trusted done ['trusted.x']\noverlay done\n\
         ['d', 'moved'] ['link', 'new'] lower and upper\n\
         ['d', 'moved'] ['link', 'new'] ['old']\n\
         interrupted True\nfirst later\ncounted 200\nmapped true True True x y - +\n\
         replaced, longer\noverwritten\nremoved: gone\nmode 640"
    );
    assert_eq!(ours, runc);
}

#[test]
#[ignore = "long: --suite oci_long"]
fn what_the_host_removes_does_not_keep_its_room() {
    const SIZE: usize = 64 << 20;
    let [runc, ours] = ask(|volume| {
        let big = volume.path.join("big");
        fs::write(&big, vec![1; SIZE]).unwrap();
        let used = || {
            let room = statvfs(&volume.path).unwrap();
            (room.f_blocks - room.f_bfree) * room.f_frsize
        };
        let length = volume.python("print(len(open('/v/big', 'rb').read()))");
        let before = used();
        fs::remove_file(&big).unwrap();
        let freed = || before - used() >= SIZE as u64;
        // The guest forgets a file 20 to 40 seconds after its last use.
        format!("{length} {}", comes_true(Duration::from_secs(90), freed))
    });
    assert_eq!(runc, format!("{SIZE} true"));
    assert_eq!(ours, runc);
}

/// The host holds a lock; the container is paused and continued while it waits for it.
fn locked_by_the_host(volume: &Volume) -> String {
    let path = volume.path.join("shared");
    fs::write(&path, "first").unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    let waiter = volume.python_until_ready(WAITER);
    sleep(Duration::from_millis(1500));
    volume.runtime.ok(&["pause", "c"]).unwrap();
    volume.runtime.ok(&["resume", "c"]).unwrap();
    file.write_all_at(b"later", 0).unwrap();
    flock(&file, FlockOperation::Unlock).unwrap();
    said(waiter)
}

/// The host and the container count up the same number, each with the lock.
fn counted_by_both(volume: &Volume) -> String {
    let number = volume.path.join("number");
    fs::write(volume.path.join("lock"), "").unwrap();
    fs::write(&number, "00000000").unwrap();
    let counter = volume.python_until_ready(COUNTER);
    let lock = File::open(volume.path.join("lock")).unwrap();
    let file = File::options().write(true).open(&number).unwrap();
    let value = || fs::read_to_string(&number).unwrap().parse::<u32>().unwrap();
    for _ in 0..100 {
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        // Meanwhile the container's thread asks once more.
        sleep(Duration::from_millis(20));
        file.write_all_at(format!("{:08}", value() + 1).as_bytes(), 0).unwrap();
        flock(&lock, FlockOperation::Unlock).unwrap();
        sleep(Duration::from_millis(5));
    }
    said(counter);
    format!("counted {}", value())
}

/// Answers the host's changes one by one: each as soon as it sees the next request.
const WITNESS: &str = r#"
def look():
    try: os.stat("/v/file"); return open("/v/file").read()
    except FileNotFoundError: return "gone"
def wait(name):
    while not os.path.exists("/v/" + name): time.sleep(0.01)
look()
open("/v/ready", "w").close()
wait("1"); print(look())
wait("2"); print(look())
wait("3"); print("removed:", look())
wait("4"); print("mode", oct(os.stat("/v/other").st_mode & 0o777)[2:])
"#;

/// Writes to a mapping, and does not write it back; then looks there for what the host writes.
const MAPPER: &str = r#"
file = os.open("/v/mapped", os.O_RDWR)
pages, whole = mmap.mmap(file, 4096), mmap.mmap(file, 8192, prot=mmap.PROT_READ)
before = whole[4096]
pages[0] = 120
open("/v/ready", "w").close()
def comes(place, byte):
    end = time.monotonic() + 5
    while pages[place] != byte and time.monotonic() < end: time.sleep(0.01)
    return pages[place] == byte
print(comes(1, 121), comes(2, 122), chr(pages[0]), chr(whole[1]), chr(before), chr(whole[4096]))
"#;

fn mapped(volume: &Volume) -> String {
    let path = volume.path.join("mapped");
    fs::write(&path, [b'-'; 8192]).unwrap();
    let mapper = volume.python_until_ready(MAPPER);
    let file = File::options().write(true).open(&path).unwrap();
    let written = || fs::read(&path).unwrap()[0] == b'x';
    let seen = comes_true(Duration::from_secs(3), written);
    file.write_all_at(b"y", 1).unwrap();
    file.write_all_at(b"+", 4096).unwrap();
    sleep(Duration::from_secs(1));
    file.write_all_at(b"z", 2).unwrap();
    format!("mapped {seen} {}", said(mapper))
}

fn changed(volume: &Volume) -> String {
    let file = volume.path.join("file");
    fs::write(volume.path.join("other"), "").unwrap();
    let witness = volume.python_until_ready(WITNESS);
    let go = |name: &str| {
        File::create(volume.path.join(name)).unwrap();
        sleep(Duration::from_millis(300));
    };
    fs::write(volume.path.join("new"), "replaced, longer").unwrap();
    fs::rename(volume.path.join("new"), &file).unwrap();
    go("1");
    fs::write(&file, "overwritten").unwrap();
    go("2");
    fs::remove_file(&file).unwrap();
    go("3");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    fs::set_permissions(volume.path.join("other"), mode).unwrap();
    go("4");
    said(witness)
}
