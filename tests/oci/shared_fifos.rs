//! FIFOs in a directory that others use too, `fifo(7)`, beside runc: one end in a container, and the
//! other on the host, in another pod, or in the same container.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{comes_true, finish, told};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use crate::volume::{Volume, ask, said};

/// Long enough for a process to wait where it has to.
const A_WHILE: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(30);

fn make(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

/// Whether somebody has a FIFO open for reading, or waits to.
fn has_reader(path: &Path) -> bool {
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().write(true).custom_flags(nonblock).open(path).is_ok()
}

const WHOLE: &str = r#"
data = b"".join(b"%07d\n" % number for number in range(1 << 18))
os.mkfifo("/v/out")
os.mkfifo("/v/back")
open("/v/ready", "w").close()
out = os.open("/v/out", os.O_WRONLY)
print(os.write(out, data))
os.close(out)
with open("/v/back", "rb") as back: print(back.read() == data)
with open("/v/made", "rb") as made: print(made.read())
"#;

#[test]
fn everything_arrives_in_order_both_ways() {
    let [runc, ours] = ask(|volume| {
        make(&volume.path.join("made"));
        let program = volume.python_until_ready(WHOLE);
        let data = fs::read(volume.path.join("out")).unwrap();
        fs::write(volume.path.join("back"), &data).unwrap();
        fs::write(volume.path.join("made"), "by the host").unwrap();
        format!("{}\n{}", data.len(), said(program))
    });
    assert_eq!(runc, "2097152\n2097152\nTrue\nb'by the host'");
    assert_eq!(ours, runc);
}

/// Both ends are inside.
const RULES: &str = r#"
def tried(what):
    try: return what()
    except OSError as error: return errno.errorcode[error.errno]
def ready(end):
    poll = select.poll()
    poll.register(end, select.POLLIN | select.POLLOUT)
    return [events for _, events in poll.poll(0)]
def held(end): return struct.unpack("i", fcntl.ioctl(end, 0x541b, bytes(4)))[0]
def rules(path):
    os.mkfifo(path)
    print(tried(lambda: os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    print(ready(reader), os.read(reader, 1), held(reader))
    writer = os.open(path, os.O_WRONLY)
    print(ready(reader), ready(writer), tried(lambda: os.read(reader, 1)))
    os.write(writer, b"abc")
    print(ready(reader), held(reader), os.read(reader, 2), held(reader), os.read(reader, 9))
    os.set_blocking(writer, False)
    print(os.write(writer, bytes(1 << 20)), ready(writer))
    print(tried(lambda: os.write(writer, b"x")), held(reader))
    print(len(os.read(reader, 4096)), ready(writer), os.write(writer, bytes(4096)))
    print(tried(lambda: os.write(writer, bytes(4096))))
    print(sum(len(os.read(reader, 1 << 16)) for _ in range(2) if held(reader)))
    print(tried(lambda: os.lseek(reader, 0, 0)), tried(lambda: os.pread(reader, 1, 0)))
    print(stat.S_ISFIFO(os.fstat(reader).st_mode), tried(lambda: os.read(writer, 1)))
    print(tried(lambda: fcntl.ioctl(reader, 0x5421 + 77)), os.write(writer, b""))
    os.close(writer)
    print(ready(reader), os.read(reader, 1))
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.writev(writer, [b"one ", b"two ", b"three"])
    print(os.read(reader, 99))
    os.close(reader)
    signals = []
    signal.signal(signal.SIGPIPE, lambda number, frame: signals.append(number))
    print(ready(writer), tried(lambda: os.write(writer, b"x")), signals)
    both = os.open(path, os.O_RDWR)
    os.write(both, b"itself")
    print(os.read(both, 9), os.listdir(os.path.dirname(path)).count(os.path.basename(path)))
    os.close(both)
    os.unlink(path)
rules("/v/fifo")
rules("/fifo")
"#;

#[test]
fn the_rules_are_those_of_a_pipe() {
    let [runc, ours] = ask(|volume| volume.python(RULES));
    let lines: Vec<_> = runc.lines().collect();
    assert_eq!(lines[0], "ENXIO", "{runc}");
    assert_eq!(lines[1..3], ["[] b'' 0", "[] [4] EAGAIN"], "{runc}");
    assert!(lines.contains(&"65536 []") && lines.contains(&"[12] EPIPE [13]"), "{runc}");
    assert_eq!(ours, runc);
}

/// Waits in each way that there is. The host does what ends the waiting.
const WAITERS: &str = r#"
import threading
reader = os.open("/v/in", os.O_RDONLY | os.O_NONBLOCK)
epoll = select.epoll()
epoll.register(reader, select.EPOLLIN | select.EPOLLET)
open("/v/ready", "w").close()
print(epoll.poll(30)[0][1], epoll.poll(0), os.read(reader, 1))
print(epoll.poll(30)[0][1], os.read(reader, 9))
print([len(ends) for ends in select.select([reader], [], [], 30)], os.read(reader, 9))
os.set_blocking(reader, True)
print(os.read(reader, 9))
print(os.read(reader, 9))
epoll.close()
writer = os.open("/v/out", os.O_WRONLY)
os.write(writer, bytes(65536))
open("/v/full", "w").close()
print([len(ends) for ends in select.select([], [writer], [], 30)], os.write(writer, bytes(65536)))
print(os.write(writer, bytes(65536)))
"#;

#[test]
fn who_waits_for_the_other_side_is_woken_up() {
    let [runc, ours] = ask(|volume| {
        let [to, from] = ["in", "out"].map(|name| volume.path.join(name));
        make(&to);
        make(&from);
        let program = volume.python_until_ready(WAITERS);
        let mut writer = OpenOptions::new().write(true).open(&to).unwrap();
        for text in ["ab", "c", "d", "e"] {
            sleep(A_WHILE);
            writer.write_all(text.as_bytes()).unwrap();
        }
        sleep(A_WHILE);
        drop(writer);
        let mut reader = OpenOptions::new().read(true).open(&from).unwrap();
        assert!(comes_true(PATIENCE, || volume.path.join("full").exists()));
        sleep(A_WHILE);
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        format!("{}\n{}", said(program), data.len())
    });
    assert!(runc.contains("b'e'\nb''\n[0, 1, 0] 65536\n65536\n196608"), "{runc}");
    assert_eq!(ours, runc);
}

/// Opens, and is interrupted or killed meanwhile.
const OPENERS: &str = r#"
def waits(path, flags):
    child = os.fork()
    if not child:
        os.open(path, flags)
        os._exit(0)
    time.sleep(0.5)
    return child
class Late(Exception): pass
def late(number, frame): raise Late
signal.signal(signal.SIGALRM, late)
for name, flags in ("reader", os.O_RDONLY), ("writer", os.O_WRONLY):
    path = "/v/" + name
    os.mkfifo(path)
    child = waits(path, flags)
    print(name, os.waitpid(child, os.WNOHANG)[0])
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try: os.open(path, flags)
    except Late: print("interrupted")
    child = waits(path, flags)
    other = os.O_WRONLY if flags == os.O_RDONLY else os.O_RDONLY
    os.close(os.open(path, other))
    print(os.waitpid(child, 0)[1])
child = waits("/v/reader", os.O_RDONLY)
open("/v/ready", "w").close()
print(os.waitpid(child, 0)[1])
child = waits("/v/writer", os.O_WRONLY)
open("/v/ready2", "w").close()
print(os.waitpid(child, 0)[1])
"#;

#[test]
fn an_open_waits_for_the_other_end_and_can_be_ended() {
    let [runc, ours] = ask(|volume| {
        let program = volume.python_until_ready(OPENERS);
        // The host's end writes nothing, and is gone at once.
        drop(OpenOptions::new().write(true).open(volume.path.join("reader")).unwrap());
        assert!(comes_true(PATIENCE, || volume.path.join("ready2").exists()));
        drop(OpenOptions::new().read(true).open(volume.path.join("writer")).unwrap());
        let text = said(program);
        format!("{text}\n{}", has_reader(&volume.path.join("reader")))
    });
    let of = |name| format!("{name} 0\n9\ninterrupted\n0\n");
    assert_eq!(runc, format!("{}{}0\n0\nfalse", of("reader"), of("writer")));
    assert_eq!(ours, runc);
}

const TWO_WRITERS: &str = r#"
open("/v/ready", "w").close()
for name in "ab":
    if not os.fork():
        end = os.open("/v/fifo", os.O_WRONLY)
        for _ in range(400): os.write(end, name.encode() * 3000 + b"\n")
        os._exit(0)
print(os.wait()[1], os.wait()[1])
"#;

#[test]
fn what_several_write_is_not_mixed() {
    let [runc, ours] = ask(|volume| {
        let fifo = volume.path.join("fifo");
        make(&fifo);
        let program = volume.python_until_ready(TWO_WRITERS);
        // A third writer, of another pod.
        let bind = bundle::bind(&volume.path, "/v", &["rbind"]);
        let script = "i=0; while [ $i -lt 50 ]; do echo other; i=$((i + 1)); done > /v/fifo";
        let other = Bundle::script(script).unwrap().mount(bind).unwrap();
        let run = volume.runtime.spawn_run("other", &other).unwrap();
        let mut reader = OpenOptions::new().read(true).open(&fifo).unwrap();
        // Stays open until the last writer has come.
        let keep = OpenOptions::new().write(true).open(&fifo).unwrap();
        let waits = std::thread::spawn(move || {
            let told = told(&finish(run).unwrap());
            let text = said(program);
            drop(keep);
            format!("{told:?} {text}")
        });
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let count = |line: &str| text.lines().filter(|read| *read == line).count();
        let [a, b] = ["a", "b"].map(|name| count(&name.repeat(3000)));
        let (other, lines) = (count("other"), text.lines().count());
        format!("{a} {b} {other} {lines} {}", waits.join().unwrap())
    });
    assert_eq!(runc, "400 400 50 850 (Some(0), \"\", \"\") 0 0");
    assert_eq!(ours, runc);
}

/// Waits in an open, then in a read, until the host says that it may go on.
const PATIENT: &str = r#"
open("/v/ready", "w").close()
end = os.open("/v/fifo", os.O_RDONLY)
open("/v/opened", "w").close()
print(os.read(end, 99), os.read(end, 99))
"#;

fn pause(volume: &Volume) {
    volume.runtime.ok(&["pause", "c"]).unwrap();
    sleep(A_WHILE);
    volume.runtime.ok(&["resume", "c"]).unwrap();
}

#[test]
fn a_container_is_paused_and_removed_while_it_waits() {
    let [runc, ours] = ask(|volume| {
        let fifo = volume.path.join("fifo");
        make(&fifo);
        let program = volume.python_until_ready(PATIENT);
        sleep(A_WHILE);
        pause(volume);
        let mut writer = OpenOptions::new().write(true).open(&fifo).unwrap();
        assert!(comes_true(PATIENCE, || volume.path.join("opened").exists()));
        sleep(A_WHILE);
        pause(volume);
        writer.write_all(b"at last").unwrap();
        sleep(A_WHILE);
        drop(writer);
        let text = said(program);

        let bind = bundle::bind(&volume.path, "/v", &["rbind"]);
        let waits = Bundle::script("cat /v/fifo").unwrap().mount(bind).unwrap();
        volume.runtime.create("waits", &waits).unwrap();
        volume.runtime.ok(&["start", "waits"]).unwrap();
        assert!(comes_true(PATIENCE, || has_reader(&fifo)));
        volume.runtime.ok(&["delete", "--force", "waits"]).unwrap();
        assert!(comes_true(PATIENCE, || !has_reader(&fifo)));
        text
    });
    assert_eq!(runc, "b'at last' b''");
    assert_eq!(ours, runc);
}

/// The shell's ways to use one.
#[test]
fn a_shell_of_the_host_talks_to_one_inside() {
    let [runc, ours] = ask(|volume| {
        make(&volume.path.join("ask"));
        make(&volume.path.join("tell"));
        let bind = bundle::bind(&volume.path, "/v", &["rbind"]);
        let script = "while read line < /v/ask; do
                echo \"got $line\" > /v/tell
                [ $line = end ] && exit 3
            done";
        let server = Bundle::script(script).unwrap().mount(bind).unwrap();
        let run = volume.runtime.spawn_run("server", &server).unwrap();
        let client = "for word in a b c end; do echo $word > ask; cat tell; done";
        let output = Command::new("sh").current_dir(&volume.path).args(["-c", client]).output();
        let (_, text, _) = told(&output.unwrap());
        let (status, _, errors) = told(&finish(run).unwrap());
        format!("{text}{status:?}{errors}")
    });
    assert_eq!(runc, "got a\ngot b\ngot c\ngot end\nSome(3)");
    assert_eq!(ours, runc);
}
