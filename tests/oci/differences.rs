//! Differences of shared files that `docs/COMPATIBILITY.md` lists: each is asked for under runc and
//! here. Whoever removes one finds the test that has to change with the row.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::volume::{ask, said};

#[test]
#[ignore = "long: --suite oci_long"]
fn sockets_and_fifos_of_a_directory() {
    const QUESTIONS: &str = r#"
def tried(what):
    try: what(); return "done"
    except OSError as error: return errno.errorcode[error.errno]
print("socket", tried(lambda: socket.socket(socket.AF_UNIX).connect("/v/socket")))
fifo = os.open("/v/fifo", os.O_WRONLY | os.O_NONBLOCK)
size = tried(lambda: fcntl.fcntl(fifo, fcntl.F_SETPIPE_SZ, 4096))
to, source = os.open("/v/fifo", os.O_RDONLY), os.open("/v/file", os.O_RDWR)
os.write(fifo, b"x")
print("fifo", size, tried(lambda: os.splice(to, source, 1)))
"#;
    let [runc, ours] = ask(|volume| {
        let _listener = UnixListener::bind(volume.path.join("socket")).unwrap();
        let fifo = volume.path.join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let _reader = OpenOptions::new().read(true).custom_flags(nonblock).open(fifo).unwrap();
        volume.python(QUESTIONS)
    });
    assert_eq!(runc, "socket done\nfifo done done");
    assert_eq!(ours, "socket done\nfifo EBADF EINVAL");
}

#[test]
#[ignore = "long: --suite oci_long"]
fn what_is_seen_of_changes_by_others() {
    const WATCHER: &str = r#"
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
os.mkdir("/v/removed")
libc.inotify_add_watch(watch, b"/v/removed", 0x400)
open("/v/ready", "w").close()
seen = select.select([watch], [], [], 3)[0]
print("event" if seen else "nothing")
"#;
    // What a process of the host writes to a mapping of its own has no event.
    const READER: &str = r#"
pages = mmap.mmap(os.open("/v/mapped", os.O_RDWR), 4096)
before = pages[0]
open("/v/ready", "w").close()
while not os.path.exists("/v/go"): time.sleep(0.1)
time.sleep(1)
print(chr(before) + chr(pages[0]))
"#;
    const WRITER: &str = r#"
import mmap, os, sys
pages = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
pages[0] = 120
"#;
    let [runc, ours] = ask(|volume| {
        let watcher = volume.python_until_ready(WATCHER);
        fs::remove_dir(volume.path.join("removed")).unwrap();
        let event = said(watcher);

        let mapped = volume.path.join("mapped");
        fs::write(&mapped, [b'-'; 4096]).unwrap();
        let reader = volume.python_until_ready(READER);
        let mut writer = Command::new("python3");
        assert!(writer.args(["-c", WRITER]).arg(&mapped).status().unwrap().success());
        fs::write(volume.path.join("go"), "").unwrap();
        format!("{event} {}", said(reader))
    });
    assert_eq!(runc, "event -x");
    assert_eq!(ours, "nothing --");
}
