//! Differences of shared files that `docs/COMPATIBILITY.md` lists: each is asked for under runc and
//! here. Whoever removes one finds the test that has to change with the row.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Child;
use std::thread::sleep;
use std::time::Duration;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{Runtime, comes_true};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// What a program of Python asks for at first.
const IMPORTS: &str = "import ctypes,errno,fcntl,mmap,os,select,socket,struct,sys,time\n";

/// A container with the host's Python, and a file system of the host at `/v`.
struct Shared {
    runtime: Runtime,
    volume: PathBuf,
    _bundle: Bundle,
    _directory: TempDir,
}

impl Shared {
    fn start(runtime: Runtime) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("volume");
        fs::create_dir(&volume).unwrap();
        mount("tmpfs", &volume, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(volume.join("file"), "old").unwrap();
        let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        for name in ["lib", "lib64"] {
            symlink(format!("usr/{name}"), bundle.rootfs().join(name)).unwrap();
        }
        let bundle = bundle.mount(bundle::bind(&volume, "/v", &["rbind"])).unwrap();
        let usr = bundle::bind("/usr".as_ref(), "/usr", &["rbind", "ro"]);
        let bundle = bundle.mount(usr).unwrap();
        let bundle = bundle.with_capability("CAP_SYS_ADMIN").unwrap();
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        Self { runtime, volume, _bundle: bundle, _directory: directory }
    }

    fn python(&self, program: &str) -> String {
        let program = format!("{IMPORTS}{program}");
        let said = self.runtime.ok(&["exec", "c", "/usr/bin/python3", "-c", &program]).unwrap();
        said.trim().to_owned()
    }

    /// Starts a program that makes the file `ready` when it is; waits for it.
    fn python_until_ready(&self, program: &str) -> Child {
        let program = format!("{IMPORTS}{program}");
        let arguments = ["exec", "c", "/usr/bin/python3", "-c", &program];
        let mut command = self.runtime.command(&arguments);
        let child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let ready = self.volume.join("ready");
        assert!(comes_true(Duration::from_secs(30), || ready.exists()), "it did not start");
        fs::remove_file(ready).unwrap();
        child
    }

    fn end(self) {
        self.runtime.ok(&["delete", "--force", "c"]).unwrap();
        unmount(&self.volume, UnmountFlags::empty()).unwrap();
        self.runtime.assert_clean().unwrap();
    }
}

/// What a child prints until its end.
fn said(mut child: Child) -> String {
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    text.trim().to_owned()
}

/// Asks a container of runc and one of ours.
fn ask(question: fn(&Shared) -> String) -> [String; 2] {
    [Runtime::runc(), Runtime::new()].map(|runtime| {
        let shared = Shared::start(runtime.unwrap());
        let answer = question(&shared);
        shared.end();
        answer
    })
}

#[test]
#[ignore = "long: --suite oci_long"]
fn what_a_file_system_of_the_host_can_do() {
    const QUESTIONS: &str = r#"
def tried(what):
    try: what(); return "done"
    except OSError as error: return errno.errorcode[error.errno]
print("device", os.stat("/").st_dev == os.stat("/v").st_dev)
print("flags", tried(lambda: fcntl.ioctl(os.open("/v/file", os.O_RDONLY), 0x80086601, bytearray(8))))
print("socket", tried(lambda: socket.socket(socket.AF_UNIX).connect("/v/socket")))
print("fifo", tried(lambda: os.open("/v/fifo", os.O_WRONLY | os.O_NONBLOCK)))
for name in ["l", "u", "w", "m"]: os.mkdir("/v/" + name)
options = b"lowerdir=/v/l,upperdir=/v/u,workdir=/v/w"
mounted = ctypes.CDLL(None, use_errno=True).mount(b"o", b"/v/m", b"overlay", 0, options)
print("overlay", "done" if mounted == 0 else errno.errorcode[ctypes.get_errno()])
"#;
    let [runc, ours] = ask(|shared| {
        let _listener = UnixListener::bind(shared.volume.join("socket")).unwrap();
        let fifo = shared.volume.join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let _reader = OpenOptions::new().read(true).custom_flags(nonblock).open(fifo).unwrap();
        shared.python(QUESTIONS)
    });
    assert_eq!(runc, "device False\nflags done\nsocket done\nfifo done\noverlay done");
    assert_eq!(ours, "device True\nflags ENOTTY\nsocket ECONNREFUSED\nfifo ENXIO\noverlay EINVAL");
}

#[test]
#[ignore = "long: --suite oci_long"]
fn what_is_seen_of_changes_by_others() {
    const WATCHER: &str = r#"
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
libc.inotify_add_watch(watch, b"/v", 0x100)
open("/v/ready", "w").close()
os.read(watch, 4096)
seen = select.select([watch], [], [], 3)[0]
print("event" if seen else "nothing")
"#;
    const WRITER: &str = r#"
file = os.open("/v/mapped", os.O_RDWR)
pages = mmap.mmap(file, 4096)
pages[0] = 120
open("/v/ready", "w").close()
while not os.path.exists("/v/go"): time.sleep(0.1)
pages.flush()
open("/v/ready", "w").close()
"#;
    let [runc, ours] = ask(|shared| {
        let watcher = shared.python_until_ready(WATCHER);
        sleep(Duration::from_millis(500));
        File::create(shared.volume.join("made")).unwrap();
        let event = said(watcher);

        let mapped = shared.volume.join("mapped");
        fs::write(&mapped, [b'-'; 4096]).unwrap();
        let first = || char::from(fs::read(&mapped).unwrap()[0]);
        let writer = shared.python_until_ready(WRITER);
        let before = first();
        fs::write(shared.volume.join("go"), "").unwrap();
        said(writer);
        let after = first();

        let read = r#"print(open("/v/file").read())"#;
        let old = shared.python(read);
        fs::write(shared.volume.join("new"), "replaced").unwrap();
        fs::rename(shared.volume.join("new"), shared.volume.join("file")).unwrap();
        sleep(Duration::from_millis(1200));
        let new = shared.python(read);
        format!("{event} {before}{after} {old} {new}")
    });
    assert_eq!(runc, "event xx old replaced");
    assert_eq!(ours, "nothing -x old replaced");
}
