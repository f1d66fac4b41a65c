//! Descriptors that a caller passes in addition to the standard streams (`--preserve-fds`), beside
//! runc: the same call with the same descriptors must have the same result. A shell opens them at
//! their numbers.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, finish, message, output, told};
use rustix::event::{EventfdFlags, eventfd};

const LONG: [&str; 2] = ["/bin/sleep", "1000"];
/// A timeout for hangs; generous because of emulation.
const PATIENCE: Duration = Duration::from_secs(120);

/// A command of a runtime, which a shell starts after these redirections.
fn passing(runtime: &Runtime, redirections: &str, args: &[&str]) -> Command {
    let inner = runtime.command(args);
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(format!("{redirections}; exec \"$0\" \"$@\"")).arg(inner.get_program());
    command.args(inner.get_args()).stdin(Stdio::null());
    command
}

fn both() -> [Runtime; 2] {
    [Runtime::runc().unwrap(), Runtime::new().unwrap()]
}

/// A container that only sleeps, for further processes.
fn waiting(runtime: &Runtime, id: &str) -> Bundle {
    let bundle = Bundle::new(&LONG).unwrap();
    runtime.create(id, &bundle).unwrap();
    runtime.ok(&["start", id]).unwrap();
    bundle
}

fn gone(runtime: &Runtime, id: &str) {
    runtime.ok(&["delete", "--force", id]).unwrap();
}

#[test]
fn ends_of_pipes_are_at_their_numbers() {
    let [theirs, ours] = both().map(|runtime| {
        let script = "cat <&3 >&4; echo $?; ls /proc/$$/fd; \
                      readlink /proc/$$/fd/3 | sed 's/[0-9]*//g'";
        let bundle = Bundle::script(script).unwrap();
        let path = bundle.path().to_str().unwrap();
        let args = ["run", "--preserve-fds", "2", "--bundle", path, "pipes"];
        let mut command = passing(&runtime, "exec 3<&0 4>&2 0</dev/null", &args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = "one line\n".repeat(20_000);
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = finish(child).unwrap();
        writer.join().unwrap().unwrap();
        runtime.assert_clean().unwrap();
        told(&output)
    });
    assert_eq!(ours.1, "0\n0\n1\n2\n3\n4\npipe:[]\n", "{}", ours.2);
    assert!(ours == theirs, "{} and {} bytes", ours.2.len(), theirs.2.len());
    assert_eq!(ours.2.len(), 180_000);
}

#[test]
fn who_reads_no_more_is_missed_on_both_sides() {
    for runtime in both() {
        // The container stops reading one pipe, then the host stops reading another.
        let script = "head -c 2 <&3; exec 3<&-; (while echo x >&4; do :; done) 2>/dev/null; \
                      echo $? > /root/status";
        let bundle = Bundle::script(script).unwrap();
        let path = bundle.path().to_str().unwrap();
        let args = ["create", "--preserve-fds", "2", "--bundle", path, "readers"];
        let redirections = "exec 3<&0 4>&1 0</dev/null 1>/dev/null";
        let mut command = passing(&runtime, redirections, &args);
        let (input, mut writer) = std::io::pipe().unwrap();
        let (mut reader, outcome) = std::io::pipe().unwrap();
        command.stdin(input).stdout(outcome).stderr(Stdio::null());
        let status = command.status().unwrap();
        drop(command);
        assert!(status.success(), "{status}");
        runtime.ok(&["start", "readers"]).unwrap();
        let error = loop {
            if let Err(error) = writer.write_all(&[b'x'; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        let mut first = [0; 4];
        reader.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"x\nx\n");
        drop(reader);
        runtime.wait_for_status("readers", "stopped").unwrap();
        // The shell's status for a process that was killed by SIGPIPE.
        assert_eq!(fs::read_to_string(bundle.rootfs().join("root/status")).unwrap(), "141\n");
        gone(&runtime, "readers");
        runtime.assert_clean().unwrap();
    }
}

/// Talks to a process that echoes on descriptor 3 until end-of-file.
fn conversation(mut peer: impl Read + Write, end: impl Fn()) -> String {
    peer.write_all(b"first ").unwrap();
    let mut answer = [0; 6];
    peer.read_exact(&mut answer).unwrap();
    peer.write_all(b"second").unwrap();
    end();
    let mut rest = String::new();
    peer.read_to_string(&mut rest).unwrap();
    String::from_utf8_lossy(&answer).into_owned() + &rest
}

#[test]
fn a_socket_is_echoed_both_ways_to_the_end_of_each() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for runtime in both() {
        let _bundle = waiting(&runtime, "echo");
        let call = |end: OwnedFd, script: &str| {
            let args = ["exec", "--preserve-fds", "1", "echo", "/bin/sh", "-c", script];
            let mut command = passing(&runtime, "exec 3<&0 0</dev/null", &args);
            command.stdin(end).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        let script = "cat <&3 >&3; readlink /proc/$$/fd/3 | sed 's/[0-9]*//g'";
        let (peer, end) = UnixStream::pair().unwrap();
        let child = call(end.into(), script);
        let said = conversation(&peer, || peer.shutdown(Shutdown::Write).unwrap());
        assert_eq!(said, "first second");
        assert_eq!(told(&finish(child).unwrap()), (Some(0), "socket:[]\n".into(), String::new()));
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let child = call(listener.accept().unwrap().0.into(), script);
        let said = conversation(&peer, || peer.shutdown(Shutdown::Write).unwrap());
        assert_eq!(said, "first second");
        assert_eq!(finish(child).unwrap().status.code(), Some(0));
        // When the process ends, the socket is closed.
        let (mut peer, end) = UnixStream::pair().unwrap();
        let child = call(end.into(), "head -c 3 <&3 >&3");
        peer.write_all(b"abcdef").unwrap();
        let mut text = Vec::new();
        // Unread data turns the end into a reset.
        let ended = peer.read_to_end(&mut text).map_err(|error| error.kind());
        assert!(matches!(ended, Ok(3) | Err(ErrorKind::ConnectionReset)), "{ended:?}");
        assert_eq!(text, b"abc");
        assert_eq!(finish(child).unwrap().status.code(), Some(0));
        gone(&runtime, "echo");
        runtime.assert_clean().unwrap();
    }
}

#[test]
fn a_socket_that_its_caller_keeps_serves_one_process_after_the_other() {
    for runtime in both() {
        let _bundle = waiting(&runtime, "kept");
        let (mut peer, end) = UnixStream::pair().unwrap();
        for line in ["one\n", "two\n"] {
            let script = format!("printf '{}' >&3", line.trim_end().to_owned() + "\\n");
            let args = ["exec", "--preserve-fds", "1", "kept", "/bin/sh", "-c", &script];
            let mut command = passing(&runtime, "exec 3<&0 0</dev/null", &args);
            let called = output(command.stdin(OwnedFd::from(end.try_clone().unwrap()))).unwrap();
            assert_eq!(told(&called), (Some(0), String::new(), String::new()));
            let mut answer = [0; 4];
            peer.read_exact(&mut answer).unwrap();
            assert_eq!(String::from_utf8_lossy(&answer), line);
        }
        drop(end);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        gone(&runtime, "kept");
        runtime.assert_clean().unwrap();
    }
}

/// The names and contents of the files in a directory.
fn contents(directory: &Path) -> Vec<(String, String)> {
    let mut found: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect();
    found.sort();
    found
}

#[test]
fn files_are_open_as_their_caller_has_them_open() {
    // A file that is read from the caller's position, one that is appended to, one that is changed
    // in place, and a directory.
    let redirections = "exec 3<read; read line <&3; exec 4>>log 5<>both 6<. 7</dev/zero \
                        8>/dev/null; read line <&5";
    let script = "cat <&3; echo more >&4; echo more >&4; printf XYZ >&5; \
                  cat /proc/$$/fd/6/read; (echo no > /proc/$$/fd/6/new) 2>/dev/null; \
                  head -c 5 <&7 | wc -c; echo x >&8; echo $?; ls /proc/$$/fd";
    let outcomes = both().map(|runtime| {
        let _bundle = waiting(&runtime, "files");
        let run = Bundle::script(script).unwrap();
        let bundle = run.path().to_str().unwrap();
        let calls = [
            vec!["run", "--preserve-fds", "6", "--bundle", bundle, "other"],
            vec!["exec", "--preserve-fds", "6", "files", "/bin/sh", "-c", script],
        ];
        let outcomes = calls.map(|args| {
            let directory = tempfile::tempdir().unwrap();
            let write = |name: &str, text: &str| {
                fs::write(directory.path().join(name), text).unwrap();
            };
            write("read", "first\nsecond\nthird\n");
            write("log", "old\n");
            write("both", "head\nabcdef\n");
            let mut command = passing(&runtime, redirections, &args);
            let called = output(command.current_dir(directory.path())).unwrap();
            (told(&called), contents(directory.path()))
        });
        gone(&runtime, "files");
        runtime.assert_clean().unwrap();
        outcomes
    });
    let [theirs, ours] = outcomes;
    for (mut theirs, ours) in theirs.into_iter().zip(ours) {
        assert_eq!(ours.0.1, theirs.0.1, "{ours:?}");
        // A difference from runc: a directory that was opened for reading cannot be written to
        // through its descriptor.
        let made = theirs.1.iter().position(|(name, _)| name == "new");
        assert_eq!(made.map(|at| theirs.1.remove(at).1).as_deref(), Some("no\n"));
        assert_eq!(ours, theirs);
        assert!(ours.1.contains(&("log".to_owned(), "old\nmore\nmore\n".to_owned())));
        assert!(ours.1.contains(&("both".to_owned(), "head\nXYZdef\n".to_owned())));
    }
}

#[test]
fn a_directory_leads_to_nothing_that_is_above_it() {
    let runtime = Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("inside"), "").unwrap();
    let script = "cd /proc/self/fd/3 && ls ../../.. && ls . && cat ../inside";
    let bundle = Bundle::script(script).unwrap();
    let path = bundle.path().to_str().unwrap();
    let args = ["run", "--preserve-fds", "1", "--bundle", path, "above"];
    let mut command = passing(&runtime, "exec 3<.", &args);
    let called = output(command.current_dir(directory.path())).unwrap();
    let expected = "inside\ninside\n".to_owned();
    let (status, out, err) = told(&called);
    assert_eq!((status, out), (Some(0), expected), "{err}");
    runtime.assert_clean().unwrap();
}

#[test]
fn further_processes_of_two_containers_have_each_their_own() {
    for runtime in both() {
        let _bundles = ["left", "right"].map(|id| waiting(&runtime, id));
        let children = ["left", "right", "left", "right"].iter().zip(0..).map(|(id, number)| {
            let script = "cat <&3 >&4; printf ' seen' >&4";
            let args = ["exec", "--preserve-fds", "2", id, "/bin/sh", "-c", script];
            let mut command = passing(&runtime, "exec 3<&0 4>&1 0</dev/null 1>/dev/null", &args);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            (command.spawn().unwrap(), format!("{id} {number}"))
        });
        let mut children: Vec<_> = children.collect();
        for (child, text) in &mut children {
            child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        }
        for (child, text) in children {
            let expected = (Some(0), text + " seen", String::new());
            assert_eq!(told(&finish(child).unwrap()), expected);
        }
        for id in ["left", "right"] {
            gone(&runtime, id);
        }
        runtime.assert_clean().unwrap();
    }
}

#[test]
fn a_detached_process_keeps_what_it_was_given() {
    for runtime in both() {
        let bundle = Bundle::script("read a <&3; echo $a >&4; read b <&3; echo $b >&4").unwrap();
        let path = bundle.path().to_str().unwrap();
        let args = ["run", "--detach", "--preserve-fds", "2", "--bundle", path, "detached"];
        let redirections = "exec 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null";
        let mut command = passing(&runtime, redirections, &args);
        let (input, mut writer) = std::io::pipe().unwrap();
        let (mut reader, outcome) = std::io::pipe().unwrap();
        let status = command.stdin(input).stdout(outcome).status().unwrap();
        drop(command);
        assert!(status.success(), "{status}");
        for line in ["one\n", "two\n"] {
            writer.write_all(line.as_bytes()).unwrap();
            let mut answer = [0; 4];
            reader.read_exact(&mut answer).unwrap();
            assert_eq!(String::from_utf8_lossy(&answer), line);
        }
        // No other process holds an end of the pipe.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        runtime.wait_for_status("detached", "stopped").unwrap();
        gone(&runtime, "detached");
        runtime.assert_clean().unwrap();
    }
}

#[test]
fn what_cannot_be_passed_is_refused_by_its_name_and_nothing_is_left() {
    let runtime = Runtime::new().unwrap();
    let _bundle = waiting(&runtime, "refused");
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let gone_file = tempfile::tempfile().unwrap();
    let cases: [(OwnedFd, &str); 5] = [
        (gone_file.into(), "descriptor 4 is a file without a name, which cannot be shared; keep"),
        (listener.into(), "descriptor 4 is a listening socket, which belongs to the host's"),
        (datagram.into(), "descriptor 4 is a socket that is no stream, whose messages"),
        (
            eventfd(0, EventfdFlags::empty()).unwrap(),
            "descriptor 4 is anon_inode:[eventfd], which only the host's kernel knows; close it",
        ),
        (
            fs::File::open("/proc/self/status").unwrap().into(),
            "descriptor 4 is of the proc file system, which shows the host's kernel; use",
        ),
    ];
    let run = Bundle::new(&["/bin/true"]).unwrap();
    let bundle = run.path().to_str().unwrap();
    let calls = [
        (vec!["run", "--preserve-fds", "2", "--bundle", bundle, "other"], 1),
        (vec!["create", "--preserve-fds", "2", "--bundle", bundle, "other"], 1),
        (vec!["exec", "--preserve-fds", "2", "refused", "/bin/true"], 255),
    ];
    for (descriptor, words) in cases {
        for (args, status) in &calls {
            let mut command = passing(&runtime, "exec 3</dev/null 4<&0 0</dev/null", args);
            let called = output(command.stdin(descriptor.try_clone().unwrap())).unwrap();
            let (code, _, err) = told(&called);
            assert_eq!(code, Some(*status), "{err}");
            assert!(message(&err).starts_with(words), "{err}");
        }
    }
    gone(&runtime, "refused");
    runtime.assert_clean().unwrap();
}

#[test]
fn a_number_that_is_not_open_is_an_error() {
    for runtime in both() {
        let bundle = Bundle::new(&["/bin/true"]).unwrap();
        let path = bundle.path().to_str().unwrap();
        let args = ["run", "--preserve-fds", "40", "--bundle", path, "closed"];
        let called = output(&mut passing(&runtime, "exec 3</dev/null", &args)).unwrap();
        let (code, _, err) = told(&called);
        assert_eq!(code, Some(1), "{err}");
        runtime.assert_clean().unwrap();
    }
    let runtime = Runtime::new().unwrap();
    let words = [
        ("2", "--preserve-fds 2: descriptor 4 is not open; open it or pass fewer"),
        ("62", "--preserve-fds 62: at most 61 descriptors are passed"),
    ];
    for (count, words) in words {
        let args = ["run", "--preserve-fds", count, "none"];
        let called = output(&mut passing(&runtime, "exec 3</dev/null", &args)).unwrap();
        let (code, out, err) = told(&called);
        assert_eq!((code, out.as_str(), message(&err).as_str()), (Some(1), "", words));
    }
}

#[test]
fn no_descriptor_is_left_in_the_processes_of_a_pod() {
    let runtime = Runtime::new().unwrap();
    let _bundle = waiting(&runtime, "left");
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "text").unwrap();
    let open = |name: &str| -> usize {
        let processes = runtime.processes(name).unwrap();
        assert!(!processes.is_empty(), "{name}");
        let of = |pid: &u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        processes.iter().map(of).sum()
    };
    let call = |program: &str| {
        let args = ["exec", "--preserve-fds", "4", "left", "/bin/sh", "-c", program];
        let mut command = passing(&runtime, "exec 3<&0 4>&1 5<file 6<.; exec 0</dev/null", &args);
        let (peer, end) = UnixStream::pair().unwrap();
        let child = command.stdin(OwnedFd::from(end)).current_dir(directory.path());
        let child = child.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        drop(command);
        drop(finish(child).unwrap());
        drop(peer);
    };
    // The guest caches files of programs that it has run: each is a descriptor of the file server.
    runtime.ok(&["exec", "left", "/bin/sh", "-c", "cat /dev/null"]).unwrap();
    // The monitor holds a descriptor for every stream that is open in the guest.
    let names = ["supervise", "bulkhead-vmm", "bulkhead-fs"];
    let before = names.map(open);
    for program in ["cat <&5", "exec 3<&- 4>&-; cat <&5", "kill -9 $$", "/bin/absent"] {
        call(program);
    }
    let mut after = before;
    let none_left = comes_true(PATIENCE, || {
        after = names.map(open);
        after.iter().zip(&before).all(|(after, before)| after <= before)
    });
    assert!(none_left, "{before:?} became {after:?} of {names:?}");
    gone(&runtime, "left");
    runtime.assert_clean().unwrap();
}
