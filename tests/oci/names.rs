//! The process of the host that stands for a container's process has that one's name and command
//! line, beside runc.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, finish, kill_9};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

/// What the host shows of a process: its name, its command line, and what ps(1) makes of both.
fn shown(pid: u32) -> (String, String, String) {
    let read = |name| {
        String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{name}")).unwrap()).into_owned()
    };
    let ps = Command::new("ps").args(["-o", "comm=,args=", "-q", &pid.to_string()]).output();
    let ps = String::from_utf8_lossy(&ps.unwrap().stdout).into_owned();
    (read("comm"), read("cmdline"), ps)
}

fn pid(runtime: &Runtime, id: &str) -> u32 {
    u32::try_from(runtime.state(id).unwrap()["pid"].as_u64().unwrap()).unwrap()
}

/// Starts a process in a container and returns its number on the host.
fn exec(runtime: &Runtime, id: &str, arguments: &[&str]) -> u32 {
    let directory = tempfile::tempdir().unwrap();
    let (file, errors) = (directory.path().join("pid"), directory.path().join("errors"));
    let mut command =
        runtime.command(&["exec", "--detach", "--pid-file", file.to_str().unwrap(), id]);
    command.args(arguments).stdout(Stdio::null()).stderr(File::create(&errors).unwrap());
    let status = finish(command.spawn().unwrap()).unwrap().status;
    assert!(status.success(), "{}", fs::read_to_string(errors).unwrap());
    fs::read_to_string(file).unwrap().parse().unwrap()
}

/// Names that could mean something to the host's programs, or to the runtime itself.
const HOSTILE: [&str; 9] = [
    "-sh",
    "--root",
    "/run/bulkhead",
    "--terminal",
    "supervise",
    "a\nb",
    "\u{1b}[31m",
    "LD_PRELOAD=/tmp/x",
    "",
];

#[test]
fn a_process_on_the_host_is_called_as_the_one_that_it_stands_for() {
    let of_both = [Runtime::runc(), Runtime::new()].map(|runtime| {
        let runtime = runtime.unwrap();
        let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        let init = pid(&runtime, "c");
        // runc's child has its name once it has executed its program.
        assert!(comes_true(PATIENCE, || shown(init).1.contains("sleep")), "{:?}", shown(init));
        let mut found = vec![shown(init)];
        // The name of a program is cut; the arguments are not.
        let long = "/bin/busybox-of-a-long-name";
        fs::copy(bundle.rootfs().join("bin/busybox"), bundle.rootfs().join(&long[1..])).unwrap();
        let script = "while :; do sleep 1; done";
        let hostile: Vec<_> = [long, "sh", "-c", script].into_iter().chain(HOSTILE).collect();
        for arguments in [&["/bin/sleep", "2000"][..], &["sleep", "3000"], &hostile] {
            let process = exec(&runtime, "c", arguments);
            let line = arguments.join("\0") + "\0";
            assert!(comes_true(PATIENCE, || shown(process).1 == line), "{:?}", shown(process));
            found.push(shown(process));
        }
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        runtime.assert_clean().unwrap();
        found
    });
    let [runc, ours] = of_both;
    assert_eq!(ours, runc);
    assert_eq!(ours[0].0, "sleep\n");
    assert_eq!(ours[3].0, "busybox-of-a-lo\n");
}

#[test]
fn what_a_container_is_called_has_no_effect_on_the_host() {
    let runtime = Runtime::new().unwrap();
    let preload = "LD_PRELOAD=/tmp/no-such-library.so";
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    let bundle = bundle
        .with(|spec| spec["process"]["env"] = json!(["PATH=/bin", preload, "BULKHEAD_TRACE=/x"]))
        .unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    // A process of another container is called as if it belonged to the first.
    let root = runtime.root().to_str().unwrap().to_owned();
    let other = Bundle::new(&["/bin/sh", "-c", "sleep 1000; :", "--root", &root, "c"]).unwrap();
    runtime.create("other", &other).unwrap();
    runtime.ok(&["start", "other"]).unwrap();
    let (first, second) = (pid(&runtime, "c"), pid(&runtime, "other"));
    let further = exec(&runtime, "c", &["/bin/sleep", "1000"]);
    for process in [first, second, further] {
        assert_eq!(fs::read(format!("/proc/{process}/environ")).unwrap(), b"");
    }
    // Its state is lost: the processes are found by what they have open.
    fs::write(runtime.root().join("c/state.json"), "{").unwrap();
    kill_9(runtime.processes("bulkhead-vmm").unwrap()[0]).unwrap();
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    for gone in [first, further] {
        assert!(!fs::exists(format!("/proc/{gone}")).unwrap(), "{gone} is left");
    }
    assert_eq!(pid(&runtime, "other"), second);
    assert_eq!(runtime.state("other").unwrap()["status"], "running");
    assert!(fs::exists(format!("/proc/{second}")).unwrap(), "another container's was ended");
    runtime.ok(&["delete", "--force", "other"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// Everything is killed, and the state is lost: what is left is found by what it has open.
#[test]
fn a_stand_in_without_anything_else_is_found() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    let stand_in = pid(&runtime, "c");
    let further = exec(&runtime, "c", &["/bin/sleep", "2000"]);
    // They cannot end by themselves.
    for process in [stand_in, further] {
        bulkhead_tests::runtime::signal(process, rustix::process::Signal::STOP).unwrap();
    }
    for name in [" supervise", "bulkhead-vmm", "bulkhead-fs"] {
        for process in runtime.processes(name).unwrap() {
            kill_9(process).unwrap();
        }
    }
    fs::write(runtime.root().join("c/state.json"), "{").unwrap();
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

/// The container's own limit lets its program have them.
#[test]
fn arguments_that_the_caller_has_no_room_for_are_not_shown() {
    let runtime = Runtime::new().unwrap();
    let (long, script) = ("y".repeat(100_000), "echo $# > /root/count; sleep 1000");
    let bundle = Bundle::new(&["/bin/sh", "-c", script, "x", &long, &long]).unwrap();
    let limit = json!([{"type": "RLIMIT_STACK", "soft": 8 << 20, "hard": 8 << 20}]);
    let bundle = bundle.with(|spec| spec["process"]["rlimits"] = limit).unwrap();
    let create = runtime.command(&["create", "--bundle"]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -S -s 512; exec \"$@\"", "sh"]);
    shell.arg(create.get_program()).args(create.get_args()).arg(bundle.path()).arg("c");
    let errors = bundle.path().join("errors");
    shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&errors).unwrap());
    let created = finish(shell.spawn().unwrap()).unwrap().status.success();
    assert!(created, "{}", fs::read_to_string(errors).unwrap());
    let (name, line, _) = shown(pid(&runtime, "c"));
    assert_eq!((name.as_str(), line.as_str()), ("sh\n", "/bin/sh\0"));
    runtime.ok(&["start", "c"]).unwrap();
    let count = || fs::read_to_string(bundle.rootfs().join("root/count"));
    assert!(comes_true(PATIENCE, || count().is_ok_and(|it| it == "2\n")), "{:?}", count());
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}
