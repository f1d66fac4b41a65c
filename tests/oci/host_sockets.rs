//! Sockets and FIFOs of the host that a container mounts by name, beside runc: programs inside talk
//! to servers of the host.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::{self, sleep};
use std::time::Duration;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{Runtime, comes_true, finish, kill_9};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::net::sockopt::{set_socket_passcred, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketType, accept, bind, listen, recv, recvmsg, send, socket,
};
use tempfile::TempDir;

use crate::mounts::mapped;

/// What each program of Python begins with.
pub(crate) const IMPORTS: &str = r#"
import errno,os,socket,sys,threading,time
def connected(path, kind=socket.SOCK_STREAM):
    end = socket.socket(socket.AF_UNIX, kind)
    end.connect(path)
    return end
def rest(end):
    parts = []
    while part := end.recv(1 << 16): parts.append(part)
    return b"".join(parts)
def become(user, groups=[]):
    os.setgroups(groups); os.setresgid(user, user, user); os.setresuid(user, user, user)
"#;
const PATIENCE: Duration = Duration::from_secs(60);

/// A container with the host's Python that mounts every file of a directory of the host below `/s`.
struct Container {
    runtime: Runtime,
    directory: TempDir,
    _bundle: Bundle,
}

impl Container {
    fn start(runtime: Runtime, directory: TempDir) -> Self {
        let mut bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        bundle = bundle.with_usr_of_the_host().unwrap();
        for entry in fs::read_dir(directory.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let source = directory.path().join(&name);
            let options: &[&str] = if name == "stream" { &["rbind", "ro"] } else { &["rbind"] };
            bundle = bundle.mount(bundle::bind(&source, &format!("/s/{name}"), options)).unwrap();
        }
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        Self { runtime, directory, _bundle: bundle }
    }

    fn python(&self, program: &str) -> String {
        let program = format!("{IMPORTS}{program}");
        self.runtime.ok(&["exec", "c", "/usr/bin/python3", "-c", &program]).unwrap()
    }

    fn spawn(&self, program: &str) -> std::process::Child {
        let program = format!("{IMPORTS}{program}");
        let mut command = self.runtime.command(&["exec", "c", "/usr/bin/python3", "-c", &program]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn end(self) {
        self.runtime.ok(&["delete", "--force", "c"]).unwrap();
        self.runtime.assert_clean().unwrap();
    }
}

pub(crate) fn both() -> [Runtime; 2] {
    [Runtime::runc().unwrap(), Runtime::new().unwrap()]
}

pub(crate) fn open_to_all(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
}

/// A server that tells each client who it is, and sends back what it gets, until its end.
pub(crate) fn echo(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    open_to_all(path);
    thread::spawn(move || {
        for client in listener.incoming() {
            thread::spawn(move || serve(client.unwrap()));
        }
    });
}

fn serve(mut client: UnixStream) {
    let user = socket_peercred(&client).unwrap();
    let mut answer = client.try_clone().unwrap();
    writeln!(answer, "{} {}", user.uid.as_raw(), user.gid.as_raw()).unwrap();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match client.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            // The client may be gone.
            Ok(count) => drop(answer.write_all(&buffer[..count])),
        }
    }
    let _ = client.shutdown(Shutdown::Both);
}

/// A server of packets: it answers each with its length.
pub(crate) fn measure(path: &Path) {
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 8).unwrap();
    thread::spawn(move || {
        let mut packet = vec![0; 1 << 20];
        while let Ok(client) = accept(&listener) {
            while let Ok((count @ 1.., _)) = recv(&client, &mut packet[..], RecvFlags::empty()) {
                send(&client, count.to_string().as_bytes(), SendFlags::NOSIGNAL).unwrap();
            }
        }
    });
}

/// A server that tells each client whom its bytes are from.
pub(crate) fn name(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    open_to_all(path);
    set_socket_passcred(&listener, true).unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let user = received(&client);
            client.write_all(user.as_bytes()).unwrap();
        }
    });
}

/// Who has sent what comes next, its first byte and its length.
pub(crate) fn received(log: impl AsFd) -> String {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut datagram = vec![0; 1 << 20];
    let mut parts = [IoSliceMut::new(&mut datagram)];
    let count = recvmsg(log, &mut parts, &mut control, RecvFlags::empty()).unwrap().bytes;
    let user = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(user) => Some((user.uid.as_raw(), user.gid.as_raw())),
        _ => None,
    });
    let (uid, gid) = user.unwrap();
    let (first, length) = (char::from(datagram[0]), count);
    format!("{uid} {gid} {first} {length}\n")
}

/// Talks to servers of streams and of packets: much, many at once, and packet by packet.
pub(crate) const EXCHANGES: &str = r#"
end = connected("/s/stream")
sent = bytes(range(256)) * 8192
threading.Thread(target=lambda: (end.sendall(sent), end.shutdown(socket.SHUT_WR))).start()
said = rest(end)
print("echo", len(said), said == b"0 0\n" + sent)
ends = [connected("/s/stream") for _ in range(50)]
for number, end in enumerate(ends): end.sendall(b"%d" % number)
for end in ends: end.shutdown(socket.SHUT_WR)
said = [rest(end) for end in ends]
print("fifty", sum(said[number] == b"0 0\n%d" % number for number in range(50)))
end = connected("/s/packets", socket.SOCK_SEQPACKET)
lengths = []
for length in [1, 5000, 100000, 7]:
    end.send(b"p" * length)
    lengths.append(int(end.recv(100)))
print("packets", lengths)
"#;

/// Talks to the servers, after [`EXCHANGES`]. Each answer is a line.
const TALK: &str = r#"
for kind in [socket.SOCK_STREAM, socket.SOCK_DGRAM]:
    try: connected("/s/packets", kind)
    except OSError as error: print(errno.errorcode[error.errno])
log = connected("/s/log", socket.SOCK_DGRAM)
log.send(b"a first"); log.send(b"b" * 50000)
status = os.stat("/s/group")
print(oct(status.st_mode), status.st_uid, status.st_gid)
sys.stdout.flush()
if os.fork() == 0:
    become(1000)
    try: connected("/s/group")
    except OSError as error: print(errno.errorcode[error.errno], flush=True)
    end = connected("/s/stream"); end.shutdown(socket.SHUT_WR); print(rest(end), flush=True)
    end = connected("/s/names"); end.send(b"hello"); print(rest(end), flush=True)
    connected("/s/log", socket.SOCK_DGRAM).send(b"c of a user")
    os._exit(0)
os.wait()
become(1000, [4242])
end = connected("/s/group"); end.shutdown(socket.SHUT_WR); print(rest(end))
"#;
const TALKED: &str = "echo 2097156 True\nfifty 50\npackets [1, 5000, 100000, 7]\nEPROTOTYPE\n\
                      EPROTOTYPE\n0o140660 0 4242\nEACCES\nb'1000 1000\\n'\nb'1000 1000 h 5\\n'\nb'1000 1000\\n'\n";

#[test]
fn programs_talk_to_servers_of_the_host_as_who_they_are() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        echo(&path("stream"));
        echo(&path("group"));
        chown(path("group"), Some(0), Some(4242)).unwrap();
        fs::set_permissions(path("group"), Permissions::from_mode(0o660)).unwrap();
        measure(&path("packets"));
        name(&path("names"));
        let log = UnixDatagram::bind(path("log")).unwrap();
        open_to_all(&path("log"));
        set_socket_passcred(&log, true).unwrap();
        log.set_read_timeout(Some(PATIENCE)).unwrap();
        let container = Container::start(runtime, directory);
        let talking = thread::scope(|scope| {
            let heard = scope.spawn(|| [(); 3].map(|()| received(&log)).concat());
            let said = container.python(&format!("{EXCHANGES}{TALK}"));
            (said, heard.join().unwrap())
        });
        let who = if container.runtime.is_runc() { "runc" } else { "ours" };
        assert_eq!(talking.0, TALKED, "{who}");
        assert_eq!(talking.1, "0 0 a 7\n0 0 b 50000\n1000 1000 c 11\n", "{who}");
        container.end();
    }
}

#[test]
fn a_server_that_dies_refuses_and_one_that_is_slow_blocks_its_clients() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let slow = UnixListener::bind(directory.path().join("slow")).unwrap();
        let dies = UnixListener::bind(directory.path().join("dies")).unwrap();
        let container = Container::start(runtime, directory);
        die(&container, dies);
        be_slow(&container, &slow);
        if !container.runtime.is_runc() {
            be_besieged(&container, &slow);
        }
        container.end();
    }
}

/// A client of a server that closes sees the end; from then on clients are refused.
fn die(container: &Container, server: UnixListener) {
    const CONNECT: &str = r#"
told = []
for _ in range(100):
    try: end = connected("/s/dies")
    except OSError as error: told.append(errno.errorcode[error.errno]); break
    try: told.append(rest(end))
    except OSError as error: told.append(errno.errorcode[error.errno])
    time.sleep(0.1)
print(told[-1], len(told) < 3)
"#;
    let client = container.spawn(r#"end = connected("/s/dies"); print(rest(end))"#);
    let (mut served, _) = server.accept().unwrap();
    served.write_all(b"bye").unwrap();
    drop((served, server));
    let ended = finish(client).unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stdout), "b'bye'\n");
    // As under runc, another server with the same name is not the one that was mounted.
    fs::remove_file(container.path("dies")).unwrap();
    echo(&container.path("dies"));
    assert_eq!(container.python(CONNECT), "ECONNREFUSED True\n");
}

/// A server that does not read blocks its client, and gets all of it in the end.
fn be_slow(container: &Container, server: &UnixListener) {
    // Writes until nothing is taken for a second, then to the end.
    const WRITE: &str = r#"
end = connected("/s/slow")
end.setblocking(False)
total, still = 0, time.time()
while time.time() - still < 1:
    try: total += end.send(b"x" * 65536); still = time.time()
    except BlockingIOError: time.sleep(0.01)
print(total, flush=True)
end.setblocking(True)
end.sendall(b"y" * 100000)
end.shutdown(socket.SHUT_WR)
print(rest(end))
"#;
    let mut client = container.spawn(WRITE);
    let (mut served, _) = server.accept().unwrap();
    let mut line = [0; 16];
    let count = client.stdout.as_mut().unwrap().read(&mut line).unwrap();
    let taken: usize = String::from_utf8_lossy(&line[..count]).trim().parse().unwrap();
    println!("{taken} bytes were taken before the writer blocked");
    assert!((64 << 10..4 << 20).contains(&taken), "{taken}");
    let mut all = Vec::new();
    served.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), taken + 100_000);
    served.write_all(b"all").unwrap();
    drop(served);
    assert_eq!(String::from_utf8_lossy(&finish(client).unwrap().stdout), "b'all'\n");
}

/// A program that opens and never closes uses up its pod's connections, and no more. They are closed
/// when the supervisor is killed.
fn be_besieged(container: &Container, server: &UnixListener) {
    const CONNECT: &str = r#"
ends = [connected("/s/slow") for _ in range(300)]
time.sleep(1000)
"#;
    let mut client = container.spawn(CONNECT);
    let mut served = vec![server.accept().unwrap().0];
    server.set_nonblocking(true).unwrap();
    while comes_true(Duration::from_secs(2), || match server.accept() {
        Ok((more, _)) => {
            served.push(more);
            true
        }
        Err(_) => false,
    }) {}
    assert_eq!(served.len(), 256);
    container.runtime.ok(&["exec", "c", "true"]).unwrap();
    kill_9(container.runtime.supervisor().unwrap()).unwrap();
    for mut end in served {
        assert_eq!(end.read(&mut [0]).unwrap_or(0), 0);
    }
    client.wait().unwrap();
}

#[test]
fn what_a_container_with_other_users_has_sent_at_its_end_arrives() {
    const LAST: &str = r#"
connected("/s/log", socket.SOCK_DGRAM).send(b"last words")
end = connected("/s/stream"); end.sendall(b"z" * 150000)
"#;
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let stream = UnixListener::bind(directory.path().join("stream")).unwrap();
        let log = UnixDatagram::bind(directory.path().join("log")).unwrap();
        set_socket_passcred(&log, true).unwrap();
        log.set_read_timeout(Some(PATIENCE)).unwrap();
        for name in ["", "stream", "log"] {
            open_to_all(&directory.path().join(name));
        }
        let read = thread::spawn(move || {
            let mut all = Vec::new();
            let mut client = stream.accept().unwrap().0;
            let user = socket_peercred(&client).unwrap();
            client.read_to_end(&mut all).unwrap();
            (all.len(), user.uid.as_raw(), user.gid.as_raw())
        });
        let mut bundle =
            Bundle::new(&["/usr/bin/python3", "-c", &format!("{IMPORTS}{LAST}")]).unwrap();
        bundle = bundle.with_usr_of_the_host().unwrap();
        for name in ["stream", "log"] {
            let source = directory.path().join(name);
            bundle = bundle.mount(bundle::bind(&source, &format!("/s/{name}"), &[])).unwrap();
        }
        let output = runtime.run("last", &mapped(bundle)).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(received(&log), "100000 100000 l 10\n");
        assert_eq!(read.join().unwrap(), (150_000, 100_000, 100_000));
        runtime.assert_clean().unwrap();
    }
}

#[test]
fn bytes_flow_through_a_fifo_of_the_host_either_way() {
    const WRITE: &str = r#"open("/s/out", "wb").write(b"w" * 300000)"#;
    const READ: &str = r#"
for _ in range(2):
    said = open("/s/in", "rb").read()
    print(len(said), said == b"r" * len(said), flush=True)
"#;
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["in", "out"] {
            let mode = Mode::RUSR | Mode::WUSR;
            mknodat(CWD, directory.path().join(name), FileType::Fifo, mode, 0).unwrap();
        }
        let container = Container::start(runtime, directory);
        let writer = container.spawn(WRITE);
        let mut all = Vec::new();
        File::open(container.path("out")).unwrap().read_to_end(&mut all).unwrap();
        assert_eq!((all.len(), all.iter().all(|byte| *byte == b'w')), (300_000, true));
        assert!(finish(writer).unwrap().status.success());

        let reader = container.spawn(READ);
        for count in [300_000, 5] {
            let mut pipe = OpenOptions::new().write(true).open(container.path("in")).unwrap();
            pipe.write_all(&vec![b'r'; count]).unwrap();
            drop(pipe);
            // So that the next writer is not one of the first ones'.
            sleep(Duration::from_millis(500));
        }
        let read = finish(reader).unwrap();
        assert_eq!(String::from_utf8_lossy(&read.stdout), "300000 True\n5 True\n");
        container.end();
    }
}
