//! Reporting the end of a process, beside runc: it is reported when the process ends, even if
//! others still hold its streams or nobody reads them. And a killed container ends, whatever its
//! processes wait for.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::bundle::{Bundle, bind, install};
use bulkhead_tests::runtime::{Runtime, comes_true, finish, told};
use serde_json::{Value, json};

/// An end that is not reported within this time, on an emulated host, is not reported at all.
const SOON: Duration = Duration::from_secs(20);

/// Runs a check for runc first, and then for Bulkhead: what runc does is right.
fn each(check: impl Fn(&Runtime)) {
    for runtime in [Runtime::runc().unwrap(), Runtime::new().unwrap()] {
        check(&runtime);
    }
}

/// Starts `c`, a container that sleeps.
fn sleeping(runtime: &Runtime) -> Bundle {
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    bundle
}

fn exec(runtime: &Runtime, options: &[&str], script: &str) -> Command {
    let words = [&["exec"], options, &["c", "sh", "-c", script]].concat();
    runtime.command(&words)
}

/// The command `run --detach` of `c`.
fn detached(runtime: &Runtime, bundle: &Bundle) -> Command {
    let mut command = runtime.command(&["run", "--detach", "--bundle"]);
    command.arg(bundle.path()).arg("c");
    command
}

#[test]
fn a_detached_process_ends_while_others_write_to_its_streams() {
    each(|runtime| {
        let bundle = sleeping(runtime);
        let file = bundle.path().join("pid");
        let script = "echo before; (read go < /tmp/go; echo after) &";
        runtime.ok(&["exec", "c", "mkfifo", "/tmp/go"]).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let mut command = exec(runtime, &["-d", "--pid-file", file.to_str().unwrap()], script);
        finish(command.stdout(writer).spawn().unwrap()).unwrap();
        drop(command);
        let pid = fs::read_to_string(&file).unwrap();
        assert!(comes_true(SOON, || !is_running(pid.trim())), "{pid} still runs");
        let mut first = [0; 7];
        reader.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"before\n");
        runtime.ok(&["exec", "c", "sh", "-c", "echo go > /tmp/go"]).unwrap();
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "after\n");
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    });
}

#[test]
fn a_process_in_the_foreground_waits_for_others_that_hold_its_streams() {
    each(|runtime| {
        let _bundle = sleeping(runtime);
        let output =
            runtime.call(&["exec", "c", "sh", "-c", "(sleep 2; echo late) & exit 3"]).unwrap();
        assert_eq!(told(&output), (Some(3), "late\n".to_owned(), String::new()));
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    });
}

#[test]
fn all_that_a_detached_process_wrote_is_there_when_it_has_ended() {
    each(|runtime| {
        let bundle = sleeping(runtime);
        let [file, output, errors] = ["pid", "output", "errors"].map(|it| bundle.path().join(it));
        let script = "head -c 5000000 /dev/zero; head -c 3 /dev/zero >&2; sleep 1000 &";
        let mut command = exec(runtime, &["-d", "--pid-file", file.to_str().unwrap()], script);
        command.stdout(File::create(&output).unwrap()).stderr(File::create(&errors).unwrap());
        finish(command.spawn().unwrap()).unwrap();
        let pid = fs::read_to_string(&file).unwrap();
        assert!(comes_true(SOON * 3, || !is_running(pid.trim())), "{pid} still runs");
        assert_eq!(fs::metadata(&output).unwrap().len(), 5_000_000);
        assert_eq!(fs::metadata(&errors).unwrap().len(), 3);
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    });
}

#[test]
fn a_detached_process_ends_while_others_hold_its_streams() {
    each(|runtime| {
        let bundle = sleeping(runtime);
        let file = bundle.path().join("pid");
        let options = ["-d", "--pid-file", file.to_str().unwrap()];
        let mut command = exec(runtime, &options, "sleep 1000 & sleep 1");
        let (_reader, writer) = io::pipe().unwrap();
        finish(command.stdout(writer).spawn().unwrap()).unwrap();
        let pid = fs::read_to_string(&file).unwrap();
        assert!(comes_true(SOON, || !is_running(pid.trim())), "{pid} still runs");
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    });
}

/// Whether a process runs; a zombie does not.
fn is_running(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}

#[test]
fn a_container_that_shares_its_process_namespace_ends_alone() {
    each(|runtime| {
        let _a = sleeping(runtime);
        let pid = runtime.state("c").unwrap()["pid"].as_u64().unwrap();
        let join = |spec: &mut Value| {
            let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
            for (kind, file) in [("pid", "pid"), ("network", "net")] {
                list.retain(|entry| entry["type"] != kind);
                list.push(json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
            }
        };
        let bundle = Bundle::script("sleep 1000 & exec sleep 2000").unwrap().with(join).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut create = runtime.command(&["create", "--bundle"]);
        create.arg(bundle.path()).arg("b").stdout(writer).stderr(Stdio::null());
        assert!(finish(create.spawn().unwrap()).unwrap().status.success());
        drop(create);
        runtime.ok(&["start", "b"]).unwrap();
        thread::sleep(Duration::from_millis(300));
        runtime.ok(&["kill", "b", "KILL"]).unwrap();
        let stopped = || runtime.state("b").unwrap()["status"] == "stopped";
        assert!(comes_true(SOON, stopped), "the child of b hides its end");
        runtime.ok(&["delete", "b"]).unwrap();
        let left = || runtime.ok(&["exec", "c", "ps"]).unwrap().contains("sleep 1000\n");
        assert!(comes_true(SOON, || ends_with_reader(&reader)), "somebody holds the streams of b");
        assert!(left(), "the container that was joined is gone");
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        if runtime.is_runc() {
            // runc does not always wait for the child before it removes the cgroup, and then the
            // cgroup stays.
            let _ = fs::remove_dir("/sys/fs/cgroup/b");
        }
        runtime.assert_clean().unwrap();
    });
}

/// Whether the reader gets end-of-file: no writer is left.
fn ends_with_reader(mut reader: &io::PipeReader) -> bool {
    rustix::io::ioctl_fionbio(reader, true).unwrap();
    matches!(reader.read(&mut [0; 64]), Ok(0))
}

#[test]
fn a_reader_that_stands_still_does_not_hide_an_end() {
    each(|runtime| {
        let bundle = Bundle::new(&["/bin/yes"]).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let mut run = detached(runtime, &bundle);
        run.stdout(writer).stderr(Stdio::null());
        assert!(finish(run.spawn().unwrap()).unwrap().status.success());
        drop(run);
        let pid = runtime.state("c").unwrap()["pid"].to_string();
        // By now it has filled all buffers between the two.
        thread::sleep(Duration::from_secs(2));
        runtime.ok(&["kill", "c", "KILL"]).unwrap();
        assert!(comes_true(SOON, || !is_running(&pid)), "the process that stands for it runs on");
        assert_eq!(runtime.state("c").unwrap()["status"], "stopped");
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        assert!(text.len() >= 64 << 10, "{} bytes were kept", text.len());
        assert!(text.chunks(2).all(|line| line == b"y\n" || line == b"y"));
        runtime.ok(&["delete", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    });
}

#[test]
fn a_reader_that_never_reads_on_does_not_keep_a_container() {
    each(|runtime| {
        let bundle = Bundle::new(&["/bin/yes"]).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut run = detached(runtime, &bundle);
        run.stdout(writer).stderr(Stdio::null());
        assert!(finish(run.spawn().unwrap()).unwrap().status.success());
        thread::sleep(Duration::from_secs(1));
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
        drop(reader);
    });
}

#[test]
fn streams_that_a_container_closes_are_closed() {
    each(|runtime| {
        let bundle = Bundle::script("exec < /dev/null > /dev/null 2>&1; exec sleep 1000").unwrap();
        let ((reader, writer), (input, mut output)) = (io::pipe().unwrap(), io::pipe().unwrap());
        let mut run = detached(runtime, &bundle);
        run.stdin(input).stdout(writer.try_clone().unwrap()).stderr(writer);
        assert!(finish(run.spawn().unwrap()).unwrap().status.success());
        drop(run);
        assert!(comes_true(SOON, || ends_with_reader(&reader)), "its output does not end");
        let refused = || output.write(b"x").is_err_and(|it| it.kind() == io::ErrorKind::BrokenPipe);
        assert!(comes_true(SOON, refused), "its input is still open");
        assert_eq!(runtime.state("c").unwrap()["status"], "running");
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    });
}

/// Two processes in a deadlock: each waits for the other's file lock, in a directory of the host.
const CIRCLE: &str = "cd /mnt; touch a b; \
     flock a sh -c 'echo a > /mnt/ready-a; sleep 1; flock b true' & \
     flock b sh -c 'echo b > /mnt/ready-b; sleep 1; flock a true' & \
     while :; do sleep 1; done";

fn circle(runtime: &Runtime) -> (Bundle, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let bundle = Bundle::script(CIRCLE).unwrap();
    install(&bundle.rootfs(), Path::new("/usr/bin/flock")).unwrap();
    let bundle = bundle.mount(bind(directory.path(), "/mnt", &["rw"])).unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    let ready = || ["ready-a", "ready-b"].iter().all(|it| directory.path().join(it).exists());
    assert!(comes_true(SOON, ready));
    // By now each waits for the other.
    thread::sleep(Duration::from_secs(3));
    (bundle, directory)
}

#[test]
fn a_container_is_killed_whatever_its_processes_wait_for() {
    each(|runtime| {
        let _circle = circle(runtime);
        runtime.ok(&["kill", "c", "KILL"]).unwrap();
        let stopped = || runtime.state("c").unwrap()["status"] == "stopped";
        // Docker gives up after ten seconds.
        assert!(comes_true(Duration::from_secs(10), stopped));
        runtime.ok(&["delete", "c"]).unwrap();
        runtime.assert_clean().unwrap();
        let _circle = circle(runtime);
        let begin = Instant::now();
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
        runtime.assert_clean().unwrap();
    });
}

/// With a stopped monitor, the guest does not answer any more.
#[test]
#[ignore = "long: --suite oci_long"]
fn a_container_is_killed_whatever_its_guest_does() {
    let runtime = Runtime::new().unwrap();
    let _bundle = sleeping(&runtime);
    let monitor = runtime.processes("bulkhead-vmm").unwrap();
    let status = Command::new("kill").args(["-STOP", &monitor[0].to_string()]).status().unwrap();
    assert!(status.success());
    let begin = Instant::now();
    runtime.ok(&["kill", "c", "KILL"]).unwrap();
    let stopped = || runtime.state("c").unwrap()["status"] == "stopped";
    assert!(comes_true(Duration::from_secs(10), stopped));
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    runtime.ok(&["delete", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// Callers look for these words to distinguish a container that has ended from a failure:
/// containerd's shim and Docker look for "container not running".
#[test]
fn kill_of_what_has_ended_says_so() {
    each(|runtime| {
        let bundle = Bundle::new(&["/bin/true"]).unwrap();
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        let stopped = || runtime.state("c").unwrap()["status"] == "stopped";
        let mut words = String::new();
        // Until it has ended, `kill` may succeed.
        comes_true(SOON, || {
            let (code, _, error) = told(&runtime.call(&["kill", "c", "TERM"]).unwrap());
            if code != Some(0) {
                words = error;
            }
            stopped()
        });
        let (code, _, error) = told(&runtime.call(&["kill", "c", "KILL"]).unwrap());
        assert_eq!(code, Some(1));
        for error in [error, words].iter().filter(|it| !it.is_empty()) {
            let known = ["container not running", "process already finished"];
            assert!(known.iter().any(|words| error.contains(words)), "{error}");
        }
        runtime.ok(&["delete", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    });
}
