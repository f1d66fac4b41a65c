//! Sockets in a directory that host and containers share, beside runc: whoever binds one is reached
//! by all who see its name.

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{Runtime, comes_true, finish};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send, socket,
};
use tempfile::TempDir;

use crate::host_sockets::{EXCHANGES, IMPORTS, both, echo, measure, name, open_to_all};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What servers inside are made of: each says who has connected and sends back what it gets.
const SERVERS: &str = r#"
import struct
def peer(end):
    return "%d %d" % struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, 17, 12))[1:]
def bound(path, kind=socket.SOCK_STREAM):
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind(path)
    return server
def serve(server, answer):
    server.listen(64)
    def each():
        while True:
            end = server.accept()[0]
            threading.Thread(target=answer, args=(end,), daemon=True).start()
    threading.Thread(target=each, daemon=True).start()
def echo(end):
    end.sendall((peer(end) + "\n").encode())
    while part := end.recv(1 << 16): end.sendall(part)
    end.shutdown(socket.SHUT_WR)
def measure(end):
    while packet := end.recv(1 << 20): end.send(b"%d" % len(packet))
def tried(path, kind=socket.SOCK_STREAM):
    try: connected(path, kind); return "connected"
    except OSError as error: return errno.errorcode[error.errno]
def ready(): open("/s/ready", "w").close()
"#;

/// A container with the host's Python that has a directory of the host at `/s`, and read-only at
/// `/r`.
pub(crate) struct Room {
    pub(crate) runtime: Runtime,
    id: &'static str,
    path: PathBuf,
    _bundle: Bundle,
}

impl Room {
    pub(crate) fn start(runtime: Runtime, id: &'static str, directory: &TempDir) -> Self {
        let mut bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        let path = directory.path().to_owned();
        open_to_all(&path);
        for mount in
            [bundle::bind(&path, "/s", &["rbind"]), bundle::bind(&path, "/r", &["rbind", "ro"])]
        {
            bundle = bundle.mount(mount).unwrap();
        }
        bundle = bundle.with_usr_of_the_host().unwrap();
        runtime.create(id, &bundle).unwrap();
        runtime.ok(&["start", id]).unwrap();
        Self { runtime, id, path, _bundle: bundle }
    }

    pub(crate) fn python(&self, program: &str) -> String {
        let program = format!("{IMPORTS}{SERVERS}{program}");
        self.runtime.ok(&["exec", self.id, "/usr/bin/python3", "-c", &program]).unwrap()
    }

    /// Starts a program that makes the file `ready` when it is; waits for it.
    pub(crate) fn serve(&self, program: &str) -> Child {
        let program = format!("{IMPORTS}{SERVERS}{program}");
        let arguments = ["exec", self.id, "/usr/bin/python3", "-c", &program];
        let mut command = self.runtime.command(&arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let child = command.spawn().unwrap();
        let ready = self.path.join("ready");
        assert!(comes_true(PATIENCE, || ready.exists()), "it did not start");
        fs::remove_file(ready).unwrap();
        child
    }

    pub(crate) fn who(&self) -> &'static str {
        if self.runtime.is_runc() { "runc" } else { "ours" }
    }

    pub(crate) fn end(self) {
        self.runtime.ok(&["delete", "--force", self.id]).unwrap();
        self.runtime.assert_clean().unwrap();
    }
}

/// Ends a server that waits for the end of its input.
fn stop(mut server: Child) {
    drop(server.stdin.take());
    assert!(finish(server).unwrap().status.success());
}

/// Talks to servers of the host, after [`EXCHANGES`]. Each answer is a line.
const TALK: &str = r#"
for path in ["/s/below/deep/stream", "/r/stream", "/s/link"]:
    end = connected(path); end.shutdown(socket.SHUT_WR); print(rest(end))
print(tried("/s/packets"), tried("/s/stream", socket.SOCK_SEQPACKET))
print(tried("/s/nobody"), tried("/s/file"), tried("/s/dead"), tried("/s/outside"))
end = socket.socket(socket.AF_UNIX); end.connect("/s/stream"); print(end.getpeername())
end = socket.socket(socket.AF_UNIX); end.setblocking(False); held = [end]; told = ""
while not told and len(held) < 9:
    held.append(socket.socket(socket.AF_UNIX)); held[-1].setblocking(False)
    try: held[-1].connect("/s/full")
    except OSError as error: told = errno.errorcode[error.errno]
print(told, len(held), flush=True)
if os.fork() == 0:
    become(1000)
    print(tried("/s/group"), tried("/s/closed/stream"), flush=True)
    end = connected("/s/stream"); end.shutdown(socket.SHUT_WR); print(rest(end), flush=True)
    end = connected("/s/names"); end.send(b"hello"); print(rest(end), flush=True)
    os._exit(0)
os.wait()
become(1000, [4242])
end = connected("/s/group"); end.shutdown(socket.SHUT_WR); print(rest(end))
"#;
const TALKED: &str = "echo 2097156 True\nfifty 50\npackets [1, 5000, 100000, 7]\nb'0 0\\n'\n\
                      b'0 0\\n'\nb'0 0\\n'\nEPROTOTYPE EPROTOTYPE\n\
                      ENOENT ECONNREFUSED ECONNREFUSED ENOENT\n";

#[test]
fn programs_inside_reach_servers_of_the_host_in_a_directory() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let room = Room::start(runtime, "c", &directory);
        // All of them appear after the container's start.
        echo(&path("stream"));
        fs::create_dir_all(path("below/deep")).unwrap();
        echo(&path("below/deep/stream"));
        fs::create_dir(path("closed")).unwrap();
        echo(&path("closed/stream"));
        fs::set_permissions(path("closed"), Permissions::from_mode(0o700)).unwrap();
        echo(&path("group"));
        chown(path("group"), Some(0), Some(4242)).unwrap();
        fs::set_permissions(path("group"), Permissions::from_mode(0o660)).unwrap();
        measure(&path("packets"));
        name(&path("names"));
        fs::write(path("file"), "").unwrap();
        drop(UnixListener::bind(path("dead")).unwrap());
        symlink("stream", path("link")).unwrap();
        symlink(path("stream"), path("outside")).unwrap();
        let full = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&full, &SocketAddrUnix::new(path("full")).unwrap()).unwrap();
        rustix::net::listen(&full, 1).unwrap();
        let rest =
            "EAGAIN 4\nEACCES EACCES\nb'1000 1000\\n'\nb'1000 1000 h 5\\n'\nb'1000 1000\\n'\n";
        let expected = format!("{TALKED}{}\n{rest}", "/s/stream");
        let said = room.python(&format!("{EXCHANGES}{TALK}"));
        // A server of runc's sees its own name, one of ours the name that the program used.
        let said = said.replace(&format!("{}", path("stream").display()), "/s/stream");
        assert_eq!(said, expected, "{}", room.who());
        room.end();
    }
}

#[test]
fn a_server_of_the_host_dies_and_another_takes_its_name() {
    const CLIENT: &str = r#"
end = connected("/s/dies")
ready()
print(rest(end), tried("/s/dies"), flush=True)
sys.stdin.read()
end = connected("/s/dies"); end.shutdown(socket.SHUT_WR); print(rest(end))
"#;
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dies");
        let room = Room::start(runtime, "c", &directory);
        let server = UnixListener::bind(&path).unwrap();
        let mut client = room.serve(CLIENT);
        let (mut served, _) = server.accept().unwrap();
        drop(server);
        served.write_all(b"bye").unwrap();
        drop(served);
        let mut line = [0; 64];
        let count = client.stdout.as_mut().unwrap().read(&mut line).unwrap();
        fs::remove_file(&path).unwrap();
        echo(&path);
        drop(client.stdin.take());
        let said = finish(client).unwrap();
        let all = [&line[..count], &said.stdout].concat();
        let all = String::from_utf8_lossy(&all).into_owned();
        assert_eq!(all, "b'bye' ECONNREFUSED\nb'0 0\\n'\n", "{}", room.who());
        room.end();
    }
}

/// Servers inside, until the end of the input.
const SERVE: &str = r#"
os.umask(0o027)
server = bound("/s/inside"); before = tried("/s/inside")
serve(server, echo)
try: bound("/s/inside"); again = "bound"
except OSError as error: again = errno.errorcode[error.errno]
os.chmod("/s/inside", 0o777)
packets = bound("/s/packets", socket.SOCK_SEQPACKET); serve(packets, measure)
private = bound("/s/private"); serve(private, echo)
moves = bound("/s/moves"); serve(moves, echo); os.rename("/s/moves", "/s/moved")
closes = bound("/s/closes"); serve(closes, echo)
silent = bound("/s/silent")
end = connected("/s/inside"); end.shutdown(socket.SHUT_WR); mine = rest(end)
end = connected("/r/inside"); end.shutdown(socket.SHUT_WR); other = rest(end)
print(before, again, mine, other, tried("/s/silent"), flush=True)
ready()
sys.stdin.read()
"#;

/// Sends all and reads all.
fn exchange(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut end = UnixStream::connect(path)?;
    let mut sender = end.try_clone()?;
    thread::scope(|scope| {
        scope.spawn(move || {
            sender.write_all(bytes).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut all = Vec::new();
        end.read_to_end(&mut all).map(|_| all)
    })
}

fn refusal(path: &std::path::Path) -> Option<i32> {
    UnixStream::connect(path).unwrap_err().raw_os_error()
}

#[test]
fn programs_of_the_host_reach_servers_inside() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let room = Room::start(runtime, "c", &directory);
        let who = room.who();
        let mut server = room.serve(SERVE);
        let big: Vec<u8> = (0..=255).cycle().take(2 << 20).collect();
        let answer = exchange(&path("inside"), &big).unwrap();
        assert!(answer == [b"0 0\n", &*big].concat(), "{who}: {} bytes", answer.len());
        let ends: Vec<_> = (0..50).map(|_| UnixStream::connect(path("inside")).unwrap()).collect();
        for (number, mut end) in ends.iter().enumerate() {
            write!(end, "{number}").unwrap();
            end.shutdown(Shutdown::Write).unwrap();
        }
        for (number, mut end) in ends.into_iter().enumerate() {
            let mut said = String::new();
            end.read_to_string(&mut said).unwrap();
            assert_eq!(said, format!("0 0\n{number}"), "{who}");
        }
        let packets = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        connect(&packets, &SocketAddrUnix::new(path("packets")).unwrap()).unwrap();
        for length in [1, 5000, 100_000] {
            send(&packets, &vec![b'p'; length], SendFlags::NOSIGNAL).unwrap();
            let mut told = [0; 16];
            let (count, _) = recv(&packets, &mut told[..], RecvFlags::empty()).unwrap();
            assert_eq!(String::from_utf8_lossy(&told[..count]), length.to_string(), "{who}");
        }
        let status = fs::metadata(path("private")).unwrap();
        assert_eq!((status.mode(), status.uid(), status.gid()), (0o140_750, 0, 0), "{who}");
        assert_eq!(exchange(&path("moved"), b"x").unwrap(), b"0 0\nx", "{who}");
        assert_eq!(refusal(&path("moves")), Some(libc::ENOENT), "{who}");
        assert_eq!(refusal(&path("silent")), Some(libc::ECONNREFUSED), "{who}");
        assert_eq!(refusal(&path("packets")), Some(libc::EPROTOTYPE), "{who}");
        let mut end = UnixStream::connect(path("inside")).unwrap();
        assert_eq!(socket_peercred(&end).unwrap().uid.as_raw(), 0, "{who}");
        let mut greeting = [0; 4];
        end.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"0 0\n", "{who}");
        drop(server.stdin.take());
        let said = finish(server).unwrap().stdout;
        assert_eq!(
            String::from_utf8_lossy(&said),
            "ECONNREFUSED EADDRINUSE b'0 0\\n' b'0 0\\n' ECONNREFUSED\n",
            "{who}"
        );
        // Its end: the names stay, and nobody is there.
        assert_eq!(end.read_to_end(&mut Vec::new()).unwrap(), 0, "{who}");
        let refused = || refusal(&path("inside")) == Some(libc::ECONNREFUSED);
        assert!(comes_true(Duration::from_secs(5), refused), "{who}");
        let killed = room.serve("serve(bound('/s/killed'), echo); ready(); time.sleep(1000)");
        assert_eq!(exchange(&path("killed"), b"x").unwrap(), b"0 0\nx", "{who}");
        room.runtime.ok(&["kill", "c", "KILL"]).unwrap();
        finish(killed).unwrap();
        let refused = || refusal(&path("killed")) == Some(libc::ECONNREFUSED);
        assert!(comes_true(PATIENCE, refused), "{who}");
        room.end();
    }
}

#[test]
fn pods_reach_each_other_through_a_directory() {
    const SERVE: &str = r#"
become(1234)
serve(bound("/s/sock"), echo)
os.chmod("/s/sock", 0o777)
ready()
sys.stdin.read()
"#;
    const CLIENT: &str = r#"
become(77)
end = connected("/s/sock")
print(peer(end).split()[0] == "1234" or peer(end))
sent = bytes(range(256)) * 4096
threading.Thread(target=lambda: (end.sendall(sent), end.shutdown(socket.SHUT_WR))).start()
said = rest(end)
print(len(said), said == b"77 77\n" + sent)
"#;
    for [one, other] in [[Runtime::runc(), Runtime::runc()], [Runtime::new(), Runtime::new()]] {
        let directory = tempfile::tempdir().unwrap();
        let server = Room::start(one.unwrap(), "server", &directory);
        let client = Room::start(other.unwrap(), "client", &directory);
        let serving = server.serve(SERVE);
        let said = client.python(CLIENT);
        println!("{}: {said}", server.who());
        assert!(said.ends_with("1048582 True\n"), "{}: {said}", server.who());
        stop(serving);
        assert_eq!(client.python("print(tried('/s/sock'))"), "ECONNREFUSED\n");
        client.runtime.ok(&["delete", "--force", "client"]).unwrap();
        server.end();
    }
}
