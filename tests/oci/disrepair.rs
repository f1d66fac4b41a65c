//! Containers whose state is damaged, whose file system is full, whose supervisor hangs, or that
//! several callers delete at once.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::{Runtime, comes_true, finish, signal, told};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a container that sleeps.
fn sleeping(runtime: &Runtime, id: &str) -> Bundle {
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create(id, &bundle).unwrap();
    runtime.ok(&["start", id]).unwrap();
    bundle
}

/// Starts a container that joins the network of another.
fn joined(runtime: &Runtime, id: &str, other: &str) -> Bundle {
    let pid = runtime.state(other).unwrap()["pid"].as_u64().unwrap();
    let bundle =
        Bundle::new(&["/bin/sleep", "1000"]).unwrap().with(|spec| join(spec, pid)).unwrap();
    runtime.create(id, &bundle).unwrap();
    runtime.ok(&["start", id]).unwrap();
    bundle
}

fn join(spec: &mut Value, pid: u64) {
    let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
    list.retain(|entry| entry["type"] != "network");
    list.push(json!({"type": "network", "path": format!("/proc/{pid}/ns/net")}));
}

fn state_file(runtime: &Runtime, id: &str) -> PathBuf {
    runtime.root().join(id).join("state.json")
}

#[test]
fn a_container_whose_state_cannot_be_read_is_ended() {
    let runtime = Runtime::new().unwrap();
    for damage in ["{", "", "[]", "gone"] {
        let _bundle = sleeping(&runtime, "c");
        let path = state_file(&runtime, "c");
        match damage {
            "gone" => fs::remove_file(&path).unwrap(),
            text => fs::write(&path, text).unwrap(),
        }
        let words = runtime.fails(&["delete", "c"]).unwrap();
        assert!(words.contains("state.json") || words.contains("does not exist"), "{words}");
        assert_eq!(runtime.processes("bulkhead-vmm").unwrap().len(), 1, "{damage:?}");
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
    }
}

#[test]
#[ignore = "long: --suite oci_long"]
fn it_is_ended_although_its_supervisor_does_not_answer() {
    let runtime = Runtime::new().unwrap();
    let _bundle = sleeping(&runtime, "c");
    fs::write(state_file(&runtime, "c"), "{").unwrap();
    signal(runtime.supervisor().unwrap(), Signal::STOP).unwrap();
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn one_of_a_pod_is_ended_alone_although_its_state_cannot_be_read() {
    let runtime = Runtime::new().unwrap();
    let (_a, _b) = (sleeping(&runtime, "a"), joined(&runtime, "b", "a"));
    fs::write(state_file(&runtime, "b"), "no state").unwrap();
    runtime.ok(&["delete", "--force", "b"]).unwrap();
    assert!(!runtime.root().join("b").exists());
    assert_eq!(runtime.ok(&["exec", "a", "echo", "alive"]).unwrap(), "alive\n");
    runtime.ok(&["delete", "--force", "a"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_state_that_another_version_wrote_is_read() {
    let runtime = Runtime::new().unwrap();
    let _bundle = sleeping(&runtime, "c");
    let path = state_file(&runtime, "c");
    let mut state: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let fields = state.as_object_mut().unwrap();
    for later in ["boot", "joined", "outlived", "network", "annotations", "owner"] {
        fields.remove(later);
    }
    fields.insert("cgroup2".to_owned(), json!({"more": 1}));
    fields.insert("exit".to_owned(), json!("of another shape"));
    fs::write(&path, state.to_string()).unwrap();
    assert_eq!(runtime.state("c").unwrap()["status"], "running");
    assert_eq!(runtime.ok(&["exec", "c", "echo", "alive"]).unwrap(), "alive\n");
    runtime.ok(&["kill", "c", "KILL"]).unwrap();
    runtime.wait_for_status("c", "stopped").unwrap();
    runtime.ok(&["delete", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// The host has booted since: the process IDs in the state belong to other processes now.
#[test]
fn processes_of_another_boot_are_left_alone() {
    let runtime = Runtime::new().unwrap();
    let mut innocent = Command::new("sleep").arg("1000").spawn().unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", innocent.id())).unwrap();
    let ticks: u64 =
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
    let process = json!({"pid": innocent.id(), "start_ticks": ticks});
    let directory = runtime.root().join("c");
    fs::create_dir(&directory).unwrap();
    let state = json!({
        "id": "c", "boot": "before", "status": "running", "keeper": process, "stand_in": process,
        "helpers": [process], "bundle": "/nowhere", "created": "1970-01-01T00:00:00Z"
    });
    fs::write(directory.join("state.json"), state.to_string()).unwrap();
    assert_eq!(runtime.state("c").unwrap()["status"], "stopped");
    runtime.ok(&["delete", "c"]).unwrap();
    assert!(innocent.try_wait().unwrap().is_none(), "somebody else's process was killed");
    innocent.kill().unwrap();
    innocent.wait().unwrap();
    runtime.assert_clean().unwrap();
}

/// A slow supervisor is not killed, because it serves another container too.
#[test]
#[ignore = "long: --suite oci_long"]
fn a_supervisor_that_stands_still_for_a_while_keeps_its_pod() {
    let runtime = Runtime::new().unwrap();
    let (_a, _b) = (sleeping(&runtime, "a"), joined(&runtime, "b", "a"));
    let keeper = runtime.supervisor().unwrap();
    signal(keeper, Signal::STOP).unwrap();
    let mut delete = runtime.command(&["delete", "--force", "b"]).spawn().unwrap();
    thread::sleep(Duration::from_secs(25));
    assert!(delete.try_wait().unwrap().is_none(), "it was not waited for");
    signal(keeper, Signal::CONT).unwrap();
    assert!(finish(delete).unwrap().status.success());
    assert!(!runtime.root().join("b").exists());
    assert_eq!(runtime.ok(&["exec", "a", "echo", "alive"]).unwrap(), "alive\n");
    runtime.ok(&["delete", "--force", "a"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// A supervisor that never answers again is ended, with all of its containers.
#[test]
#[ignore = "long: --suite oci_long"]
fn a_supervisor_that_stands_still_for_ever_does_not_keep_its_pod() {
    let runtime = Runtime::new().unwrap();
    let (_a, _b) = (sleeping(&runtime, "a"), joined(&runtime, "b", "a"));
    signal(runtime.supervisor().unwrap(), Signal::STOP).unwrap();
    runtime.ok(&["delete", "--force", "b"]).unwrap();
    assert_eq!(runtime.state("a").unwrap()["status"], "stopped");
    runtime.ok(&["delete", "a"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// A container whose poststop hook writes a line after some seconds.
fn with_poststop(file: &Path, seconds: u32) -> Bundle {
    let script = format!("sleep {seconds}; echo ended >> {}", file.display());
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    let bundle = Bundle::new(&["/bin/true"]).unwrap();
    bundle.with(|spec| spec["hooks"] = json!({"poststop": hook})).unwrap()
}

#[test]
fn a_container_that_several_delete_ends_once() {
    for runtime in [Runtime::runc().unwrap(), Runtime::new().unwrap()] {
        let directory = tempfile::tempdir().unwrap();
        let lines = directory.path().join("lines");
        let bundle = with_poststop(&lines, 0);
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        runtime.wait_for_status("c", "stopped").unwrap();
        let delete = |_| {
            let mut command = runtime.command(&["delete", "c"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let all: Vec<Child> = (0..6).map(delete).collect();
        let ended: Vec<_> = all.into_iter().map(|child| told(&finish(child).unwrap())).collect();
        assert!(ended.iter().any(|(code, ..)| *code == Some(0)), "{ended:?}");
        if runtime.root().join("c").exists() {
            runtime.ok(&["delete", "--force", "c"]).unwrap();
        }
        // runc has no lock: several of its processes may run the hook.
        let count = fs::read_to_string(&lines).unwrap().lines().count();
        let is_runc = runtime.is_runc();
        assert!(count == 1 || is_runc, "the hook ran {count} times");
        for (code, _, error) in ended.iter().filter(|(code, ..)| *code != Some(0)) {
            assert!(is_runc || error.contains("does not exist"), "{code:?}: {error}");
        }
        runtime.assert_clean().unwrap();
    }
}

#[test]
fn a_slow_delete_leaves_a_later_container_of_the_same_name_alone() {
    let runtime = Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let lines = directory.path().join("lines");
    let bundle = with_poststop(&lines, 8);
    runtime.create("c", &bundle).unwrap();
    let mut delete = runtime.command(&["delete", "--force", "c"]).spawn().unwrap();
    assert!(comes_true(PATIENCE, || !runtime.root().join("c").exists()));
    let _later = sleeping(&runtime, "c");
    assert!(delete.try_wait().unwrap().is_none(), "the hook is over already");
    assert!(finish(delete).unwrap().status.success());
    assert_eq!(fs::read_to_string(&lines).unwrap(), "ended\n");
    assert_eq!(runtime.state("c").unwrap()["status"], "running");
    assert_eq!(runtime.ok(&["exec", "c", "echo", "alive"]).unwrap(), "alive\n");
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// A state directory on a small file system of its own, which can be filled.
struct Small<'a>(&'a Runtime);

impl<'a> Small<'a> {
    fn new(runtime: &'a Runtime) -> Self {
        mount("tmpfs", runtime.root(), "tmpfs", MountFlags::empty(), c"size=256k").unwrap();
        Self(runtime)
    }

    /// Fills the file system and leaves `but` bytes free.
    fn fill(&self, but: u64) {
        let mut file = File::create(self.0.root().join(".full")).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        let length = file.metadata().unwrap().size();
        file.set_len(length.saturating_sub(but)).unwrap();
    }

    fn empty(&self) {
        fs::remove_file(self.0.root().join(".full")).unwrap();
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        unmount(self.0.root(), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_state_directory_is_an_error_and_never_a_hang() {
    let runtime = Runtime::new().unwrap();
    let small = Small::new(&runtime);
    let bundle = Bundle::script("echo ran > /root/ran; exec sleep 1000").unwrap();
    for room in [0, 4096, 12288, 20480, 28672] {
        small.fill(room);
        let begin = Instant::now();
        // Not a pipe: the container would keep it open.
        let words = bundle.path().join("words");
        let mut create = runtime.command(&["create", "--bundle"]);
        create.arg(bundle.path()).arg("c").stdout(Stdio::null());
        create.stderr(File::create(&words).unwrap());
        let created = finish(create.spawn().unwrap()).unwrap().status.success();
        let words = fs::read_to_string(words).unwrap();
        if created {
            assert_eq!(runtime.state("c").unwrap()["status"], "created");
            runtime.ok(&["delete", "--force", "c"]).unwrap();
        } else {
            assert!(words.contains("No space left on device"), "room for {room}: {words}");
        }
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "room for {room}: {:?}",
            begin.elapsed()
        );
        assert!(!runtime.root().join("c").exists(), "room for {room}: it is still there");
        assert!(runtime.processes("").unwrap().is_empty(), "room for {room}");
        small.empty();
    }
    // When the file system is full after `create`, the container can still be started, ended and
    // deleted.
    runtime.create("c", &bundle).unwrap();
    small.fill(0);
    runtime.ok(&["start", "c"]).unwrap();
    assert_eq!(runtime.state("c").unwrap()["status"], "running");
    assert!(comes_true(PATIENCE, || bundle.rootfs().join("root/ran").exists()));
    assert_eq!(runtime.ok(&["exec", "c", "echo", "alive"]).unwrap(), "alive\n");
    runtime.ok(&["kill", "c", "KILL"]).unwrap();
    runtime.wait_for_status("c", "stopped").unwrap();
    runtime.ok(&["delete", "c"]).unwrap();
    drop(small);
    runtime.assert_clean().unwrap();
}

/// A file system whose server never answers, like a network file system that is gone.
struct Dead {
    directory: tempfile::TempDir,
    _device: File,
}

impl Dead {
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&device);
        let options = format!("fd={number},rootmode=40000,user_id=0,group_id=0");
        let options = std::ffi::CString::new(options).unwrap();
        mount("dead", directory.path(), "fuse", MountFlags::empty(), options.as_c_str()).unwrap();
        Self { directory, _device: device }
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        // Closing the device releases processes that wait for the file system.
        unmount(self.directory.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_source_that_never_answers_keeps_nobody_else() {
    let runtime = Runtime::new().unwrap();
    let _a = sleeping(&runtime, "a");
    let pid = runtime.state("a").unwrap()["pid"].as_u64().unwrap();
    let dead = Dead::mount();
    let bundle = Bundle::new(&["/bin/true"]).unwrap().with(|spec| join(spec, pid)).unwrap();
    let bundle = bundle.mount(bind(dead.directory.path(), "/mnt", &["ro"])).unwrap();
    let mut create = runtime.command(&["create", "--bundle"]);
    create.arg(bundle.path()).arg("b").stdout(Stdio::null()).stderr(Stdio::null());
    let create = create.spawn().unwrap();
    thread::sleep(Duration::from_secs(3));
    let begin = Instant::now();
    assert_eq!(runtime.ok(&["exec", "a", "echo", "alive"]).unwrap(), "alive\n");
    runtime.ok(&["delete", "--force", "b"]).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    assert!(!finish(create).unwrap().status.success());
    assert!(!runtime.root().join("b").exists());
    assert_eq!(runtime.ok(&["exec", "a", "echo", "alive"]).unwrap(), "alive\n");
    runtime.ok(&["delete", "--force", "a"]).unwrap();
    drop(dead);
    runtime.assert_clean().unwrap();
}

/// Resource limits that are not specified are inherited from the caller that creates a container,
/// or a process in it.
#[test]
fn limits_are_those_of_the_caller_whoever_keeps_the_pod() {
    let with_limits = |command: &Command| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -n 555; ulimit -c 7; exec \"$@\"", "sh"]);
        shell.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
        shell
    };
    let script = "ulimit -n; ulimit -c";
    for runtime in [Runtime::runc().unwrap(), Runtime::new().unwrap()] {
        let _a = sleeping(&runtime, "a");
        let pid = runtime.state("a").unwrap()["pid"].as_u64().unwrap();
        let change = |spec: &mut Value| {
            spec["process"].as_object_mut().unwrap().remove("rlimits");
            join(spec, pid);
        };
        let bundle = Bundle::script(script).unwrap().with(change).unwrap();
        let run = runtime.run_command("b", &bundle);
        let output = bulkhead_tests::runtime::output(&mut with_limits(&run)).unwrap();
        assert_eq!(told(&output), (Some(0), "555\n7\n".to_owned(), String::new()));
        // The specification of `a` sets the limit of open files.
        let exec = runtime.command(&["exec", "a", "sh", "-c", script]);
        let output = bulkhead_tests::runtime::output(&mut with_limits(&exec)).unwrap();
        assert_eq!(told(&output), (Some(0), "1024\n7\n".to_owned(), String::new()));
        runtime.ok(&["delete", "--force", "a"]).unwrap();
        runtime.assert_clean().unwrap();
    }
}
