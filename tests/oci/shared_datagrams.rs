//! Datagrams to sockets in a directory that host and containers share, beside runc.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{Runtime, comes_true, finish};
use rustix::net::sockopt::set_socket_passcred;

use crate::host_sockets::{IMPORTS, both, open_to_all, received};
use crate::mounts::mapped;
use crate::shared_sockets::{PATIENCE, Room};

/// What programs are made of that send and get datagrams.
const DATAGRAMS: &str = r#"
import select
def unbound(): return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
def told(send, *arguments):
    try: send(*arguments); return "sent"
    except OSError as error: return errno.errorcode[error.errno]
def receiver(path):
    server = bound(path, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return server
def received(server):
    data, control, _, _ = server.recvmsg(1 << 20, 100)
    _, uid, gid = struct.unpack("3i", control[0][2])
    return "%d %d %s %d" % (uid, gid, data[:4].decode(), len(data))
"#;

/// A server of datagrams on the host.
fn server(path: &Path) -> UnixDatagram {
    let server = UnixDatagram::bind(path).unwrap();
    open_to_all(path);
    set_socket_passcred(&server, true).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server
}

/// Sends to servers of the host. Each answer is a line.
const SEND: &str = r#"
log = connected("/s/log", socket.SOCK_DGRAM)
for number in range(200): log.send(b"%d" % (number % 10))
for length in [65536, 0, 204800]: log.send(b"l" * length)
print(told(log.send, b"m" * 300000), log.getpeername())
loose = unbound()
print(told(loose.send, b"x"))
for path in ["/s/loose", "/s/users", "/s/link", "/r/loose", "/s/loose"]: loose.sendto(b"s", path)
for name in ["nobody", "file", "dead", "stream"]:
    print(told(unbound().sendto, b"x", "/s/" + name), tried("/s/" + name, socket.SOCK_DGRAM))
print(tried("/s/log"), tried("/s/log", socket.SOCK_SEQPACKET))
log.connect("/s/users"); log.send(b"again")
for _ in range(300): told(unbound().sendto, b"many", "/s/many")
sys.stdout.flush()
if os.fork() == 0:
    become(1000)
    print(told(unbound().sendto, b"x", "/s/group"), tried("/s/group", socket.SOCK_DGRAM), flush=True)
    unbound().sendto(b"of a user", "/s/users")
    log.send(b"of another"); os._exit(0)
os.wait()
become(1000, [4242])
unbound().sendto(b"group", "/s/group")
"#;
const SENT: &str = "EMSGSIZE /s/log\nENOTCONN\nENOENT ENOENT\nECONNREFUSED ECONNREFUSED\n\
                    ECONNREFUSED ECONNREFUSED\nEPROTOTYPE EPROTOTYPE\nEPROTOTYPE EPROTOTYPE\n\
                    EACCES EACCES\n";

/// So many datagrams, in the order of their senders: between two sockets there is none.
fn sorted(server: &UnixDatagram, count: usize) -> String {
    let mut all: Vec<_> = (0..count).map(|_| received(server)).collect();
    all.sort();
    all.concat()
}

#[test]
fn programs_inside_send_to_servers_of_the_host() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let room = Room::start(runtime, "c", &directory);
        let [log, loose, users, group, many] =
            ["log", "loose", "users", "group", "many"].map(|name| server(&path(name)));
        chown(path("group"), Some(0), Some(4242)).unwrap();
        fs::set_permissions(path("group"), Permissions::from_mode(0o660)).unwrap();
        fs::write(path("file"), "").unwrap();
        drop(UnixDatagram::bind(path("dead")).unwrap());
        let _stream = UnixListener::bind(path("stream")).unwrap();
        std::os::unix::fs::symlink("loose", path("link")).unwrap();
        let (said, heard) = thread::scope(|scope| {
            let counted =
                scope.spawn(|| (0..300).filter(|_| received(&many) == "0 0 m 4\n").count());
            let heard = scope.spawn(|| {
                let in_order: String = (0..203).map(|_| received(&log)).collect();
                let rest = [sorted(&loose, 4), sorted(&users, 4), received(&group)];
                (in_order, rest)
            });
            let said = room.python(&format!("{DATAGRAMS}{SEND}"));
            assert_eq!(counted.join().unwrap(), 300);
            (said, heard.join().unwrap())
        });
        let who = room.who();
        // Under runc it is the name that the server has used.
        let said = said.replace(&path("log").display().to_string(), "/s/log");
        assert_eq!(said, SENT, "{who}");
        let numbers: String = (0..200).map(|number| format!("0 0 {} 1\n", number % 10)).collect();
        let lengths = "0 0 l 65536\n0 0 \0 0\n0 0 l 204800\n";
        assert_eq!(heard.0, [&numbers, lengths].concat(), "{who}");
        let rest = [
            "0 0 s 1\n".repeat(4),
            "0 0 a 5\n0 0 s 1\n1000 1000 o 10\n1000 1000 o 9\n".into(),
            "1000 1000 g 5\n".into(),
        ];
        assert_eq!(heard.1, rest, "{who}");
        room.end();
    }
}

/// Sends to a server that ends, and to the one that takes its name.
const OUTLIVE: &str = r#"
log = connected("/s/dies", socket.SOCK_DGRAM)
loose = unbound()
print(told(log.send, b"one"), told(loose.sendto, b"two", "/s/dies"))
ready()
while not os.path.exists("/s/gone"): time.sleep(0.05)
def last(send, *arguments):
    for _ in range(100):
        said = told(send, *arguments)
        if said != "sent": return said
        time.sleep(0.1)
print(last(log.send, b"x"), told(log.send, b"x"), last(loose.sendto, b"x", "/s/dies"), flush=True)
sys.stdin.read()
print(told(loose.sendto, b"three", "/s/dies"), told(log.connect, "/s/dies"), told(log.send, b"four"))
"#;

#[test]
fn a_server_of_the_host_ends_and_another_takes_its_name() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let room = Room::start(runtime, "c", &directory);
        let first = server(&path("dies"));
        let mut client = room.serve(&format!("{DATAGRAMS}{OUTLIVE}"));
        assert_eq!(sorted(&first, 2), "0 0 o 3\n0 0 t 3\n", "{}", room.who());
        drop(first);
        fs::write(path("gone"), "").unwrap();
        let mut lines = [0; 128];
        let mut count = 0;
        while lines[..count].iter().filter(|byte| **byte == b'\n').count() < 2 {
            count += client.stdout.as_mut().unwrap().read(&mut lines[count..]).unwrap();
        }
        fs::remove_file(path("dies")).unwrap();
        let second = server(&path("dies"));
        drop(client.stdin.take());
        assert_eq!(sorted(&second, 2), "0 0 f 4\n0 0 t 5\n", "{}", room.who());
        let all = [&lines[..count], &finish(client).unwrap().stdout].concat();
        let expected = "sent sent\nECONNREFUSED ENOTCONN ECONNREFUSED\nsent sent sent\n";
        assert_eq!(String::from_utf8_lossy(&all), expected, "{}", room.who());
        room.end();
    }
}

/// Sends until nothing is taken for a second, then one that waits.
const PRESS: &str = r#"
log = connected("/s/slow", socket.SOCK_DGRAM)
log.setblocking(False)
taken, still = 0, time.time()
while time.time() - still < 1:
    try: log.send(b"%06d" % taken + b"x" * 2000); taken += 1; still = time.time()
    except BlockingIOError: time.sleep(0.01)
print(taken, select.select([], [log], [], 0)[1], flush=True)
ready()
log.setblocking(True)
log.send(b"last")
"#;

#[test]
fn a_server_of_the_host_that_does_not_read_blocks_its_senders() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let room = Room::start(runtime, "c", &directory);
        let slow = server(&directory.path().join("slow"));
        let mut client = room.serve(&format!("{DATAGRAMS}{PRESS}"));
        let mut line = [0; 32];
        let count = client.stdout.as_mut().unwrap().read(&mut line).unwrap();
        let line = String::from_utf8_lossy(&line[..count]).into_owned();
        println!("{}: {line}", room.who());
        let taken: usize = line.strip_suffix(" []\n").unwrap().parse().unwrap();
        assert!((1..2000).contains(&taken), "{taken}");
        thread::sleep(Duration::from_millis(300));
        assert!(client.try_wait().unwrap().is_none(), "{}", room.who());
        let mut datagram = [0; 4096];
        for number in 0..taken {
            let count = slow.recv(&mut datagram).unwrap();
            let number = format!("{number:06}");
            assert_eq!((count, &datagram[..6]), (2006, number.as_bytes()), "{}", room.who());
        }
        let count = slow.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..count], b"last", "{}", room.who());
        assert!(finish(client).unwrap().status.success());
        room.end();
    }
}

/// A server inside, until it has got so many; then it is closed, and waits for the end of its input.
const RECEIVE: &str = r#"
os.umask(0o027)
private = receiver("/s/private")
inside = receiver("/s/inside"); os.chmod("/s/inside", 0o777)
loose = unbound(); loose.sendto(b"own", "/s/inside"); loose.sendto(b"own", "/r/inside")
print(received(inside), received(inside), tried("/s/inside"))
ready()
for _ in range(203): print(received(inside))
inside.close()
print(tried("/s/inside", socket.SOCK_DGRAM), flush=True)
sys.stdin.read()
"#;

#[test]
fn programs_of_the_host_send_to_servers_inside() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let room = Room::start(runtime, "c", &directory);
        let who = room.who();
        let mut server = room.serve(&format!("{DATAGRAMS}{RECEIVE}"));
        let status = fs::metadata(path("private")).unwrap();
        assert_eq!((status.mode(), status.uid(), status.gid()), (0o140_750, 0, 0), "{who}");
        let client = UnixDatagram::unbound().unwrap();
        client.connect(path("inside")).unwrap();
        for number in 0..200 {
            client.send((number % 10).to_string().as_bytes()).unwrap();
        }
        client.send(&[b'l'; 65536]).unwrap();
        client.send(&[]).unwrap();
        let program = format!(
            "{IMPORTS}\nsocket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'user', {:?})",
            path("inside"),
        );
        let mut user = Command::new("/usr/bin/python3");
        user.args(["-c", &program]).uid(1000).gid(1000);
        assert!(user.status().unwrap().success(), "{who}");
        // Closed: the name stays, and nobody is there.
        let refused = |name| {
            let sent = UnixDatagram::unbound().unwrap().send_to(b"x", path(name));
            sent.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        };
        assert!(comes_true(PATIENCE, || refused("inside")), "{who}");
        let error = client.send(b"x").unwrap_err().kind();
        assert_eq!(error, ErrorKind::ConnectionRefused, "{who}");
        drop(server.stdin.take());
        let said = finish(server).unwrap().stdout;
        let numbers: String = (0..200).map(|number| format!("0 0 {} 1\n", number % 10)).collect();
        let expected = format!(
            "0 0 own 3 0 0 own 3 EPROTOTYPE\n{numbers}0 0 llll 65536\n0 0  0\n1000 1000 user 4\n\
             ECONNREFUSED\n"
        );
        assert_eq!(String::from_utf8_lossy(&said), expected, "{who}");
        let killed =
            room.serve(&format!("{DATAGRAMS}one = receiver('/s/one'); ready(); time.sleep(1000)"));
        assert!(!refused("one"), "{who}");
        room.runtime.ok(&["kill", "c", "KILL"]).unwrap();
        finish(killed).unwrap();
        assert!(comes_true(PATIENCE, || refused("one")), "{who}");
        room.end();
    }
}

#[test]
fn pods_send_to_each_other_through_a_directory() {
    const RECEIVE: &str = r#"
become(1234)
server = receiver("/s/sock")
os.chmod("/s/sock", 0o777)
ready()
for _ in range(101): print(received(server))
"#;
    const SEND: &str = r#"
become(77)
loose = unbound()
for number in range(100): loose.sendto(b"%d" % (number % 10), "/s/sock")
loose.sendto(b"l" * 65536, "/s/sock")
"#;
    for [one, other] in [[Runtime::runc(), Runtime::runc()], [Runtime::new(), Runtime::new()]] {
        let directory = tempfile::tempdir().unwrap();
        let server = Room::start(one.unwrap(), "server", &directory);
        let client = Room::start(other.unwrap(), "client", &directory);
        let receiving = server.serve(&format!("{DATAGRAMS}{RECEIVE}"));
        client.python(&format!("{DATAGRAMS}{SEND}"));
        let said = finish(receiving).unwrap().stdout;
        let numbers: String = (0..100).map(|number| format!("77 77 {} 1\n", number % 10)).collect();
        let expected = [&numbers, "77 77 llll 65536\n"].concat();
        assert_eq!(String::from_utf8_lossy(&said), expected, "{}", server.who());
        let refused = "print(tried('/s/sock', socket.SOCK_DGRAM))";
        assert!(comes_true(PATIENCE, || client.python(refused) == "ECONNREFUSED\n"));
        client.runtime.ok(&["delete", "--force", "client"]).unwrap();
        server.end();
    }
}

#[test]
fn datagrams_that_a_container_has_sent_at_its_end_arrive() {
    const LAST: &str = r#"
for _ in range(20): connected("/s/log", socket.SOCK_DGRAM).send(b"last words")
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"the last", "/s/log")
"#;
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        open_to_all(directory.path());
        let log = server(&directory.path().join("log"));
        let mut bundle =
            Bundle::new(&["/usr/bin/python3", "-c", &format!("{IMPORTS}{LAST}")]).unwrap();
        bundle = bundle.with_usr_of_the_host().unwrap();
        bundle = bundle.mount(bundle::bind(directory.path(), "/s", &["rbind"])).unwrap();
        let heard = thread::spawn(move || sorted(&log, 21));
        let output = runtime.run("last", &mapped(bundle)).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected = ["100000 100000 l 10\n".repeat(20), "100000 100000 t 8\n".into()].concat();
        assert_eq!(heard.join().unwrap(), expected);
        runtime.assert_clean().unwrap();
    }
}

/// Threads that send through one socket to two names in turn, and that connect one in turn.
const SHARE: &str = r#"
loose, turning, failed = unbound(), unbound(), []
turning.connect("/s/one")
def press(number):
    for _ in range(25):
        said = told(loose.sendto, b"press", ["/s/one", "/s/other"][number % 2])
        if said != "sent": failed.append(said)
def turn(number):
    for _ in range(25):
        turning.connect(["/s/one", "/s/other"][number % 2])
        said = told(turning.send, b"turn")
        if said != "sent": failed.append(said)
threads = [threading.Thread(target=way, args=(number,)) for way in [press, turn] for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"#;

#[test]
fn threads_share_a_socket_and_nothing_is_lost() {
    for runtime in both() {
        let directory = tempfile::tempdir().unwrap();
        let room = Room::start(runtime, "c", &directory);
        let servers = ["one", "other"].map(|name| server(&directory.path().join(name)));
        for server in &servers {
            server.set_nonblocking(true).unwrap();
        }
        let said = thread::scope(|scope| {
            let said = scope.spawn(|| room.python(&format!("{DATAGRAMS}{SHARE}")));
            let (mut pressed, mut turned) = (0, 0);
            let all = comes_true(PATIENCE, || {
                for server in &servers {
                    while let Ok(length) = server.recv(&mut [0; 16]) {
                        if length == 5 { pressed += 1 } else { turned += 1 }
                    }
                }
                (pressed, turned) == (100, 100)
            });
            assert!(all, "{}: {pressed} {turned}", room.who());
            said.join().unwrap()
        });
        assert_eq!(said, "[]\n", "{}", room.who());
        room.end();
    }
}

/// Sends from more sockets than may have an end on the host, and more than a frame has.
const BESIEGE: &str = r#"
held = [unbound() for _ in range(300)]
for end in held: end.setblocking(False)
said = [told(end.sendto, b"x", "/s/log") for end in held]
print(said.count("sent"), said.count("EAGAIN"), told(held[-1].connect, "/s/log"))
held[-1].settimeout(None)
waiting = threading.Thread(target=held[-1].connect, args=("/s/log",)); waiting.start()
time.sleep(0.5); print(waiting.is_alive())
for end in held[:10]: end.close()
waiting.join()
held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400000)
print(told(held[-1].send, b"l" * ((256 << 10) - 7)), told(held[-1].send, b"l" * ((256 << 10) - 8)))
"#;

#[test]
fn a_pod_has_so_many_ends_on_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let room = Room::start(Runtime::new().unwrap(), "c", &directory);
    let log = server(&directory.path().join("log"));
    let said = thread::scope(|scope| {
        let heard = scope.spawn(|| {
            assert_eq!(sorted(&log, 256), "0 0 x 1\n".repeat(256));
            received(&log)
        });
        let said = room.python(&format!("{DATAGRAMS}{BESIEGE}"));
        assert_eq!(heard.join().unwrap(), "0 0 l 262136\n");
        said
    });
    assert_eq!(said, "256 44 EAGAIN\nTrue\nEMSGSIZE sent\n");
    room.end();
}
