//! The test host as its callers see it: exit statuses, streams, the share, and that nothing is
//! left. Each test boots it once.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";

fn host(options: &[&str], script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_test-host"));
    command.args(["--memory", "1024", "--timeout", "120"]).args(options);
    command.args(["--", "sh", "-c", script]).stdin(Stdio::null());
    command
}

fn run(options: &[&str], script: &str) -> io::Result<Output> {
    host(options, script).output()
}

#[test]
fn status_and_streams_are_the_commands() {
    let output = run(&[], "echo out; echo err >&2; read line || echo no input; exit 42").unwrap();
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\nno input\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");
}

#[test]
fn signal_is_128_and_its_number() {
    assert_eq!(run(&[], "kill -9 $$").unwrap().status.code(), Some(137));
}

#[test]
fn missing_program_is_127_and_named() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_test-host"));
    let output = command.args(["--memory", "1024", "--", "/no/such/program"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such/program"));
}

#[test]
fn ten_mebibytes_of_output_arrive_unharmed() {
    let output = run(&[], "seq 1 1450000 | head -c 10485760").unwrap();
    let expected: String = (1..=1_450_000).map(|number| format!("{number}\n")).collect();
    assert_eq!(output.stdout.len(), 10 << 20);
    assert!(output.stdout == expected.as_bytes()[..10 << 20]);
}

#[test]
fn host_is_whole_for_containers_and_machines() {
    let script = "set -e
        test -c /dev/kvm; test -c /dev/net/tun; test \"$(id -u)\" = 0
        for c in cpuset cpu io memory pids; do grep -qw $c /sys/fs/cgroup/cgroup.subtree_control; done
        ip addr show lo | grep -q 127.0.0.1; test $(stat -f -c %T /tmp) = tmpfs
        unshare -Urmpf --mount-proc true; test \"$BULKHEAD_TEST_HOST\" = 1";
    let output = run(&[], script).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn debians_kernel_is_whole_for_machines_too() {
    let script = "set -e
        uname -r; case $(uname -r) in *-testhost) exit 9;; esac
        test -c /dev/kvm; test -c /dev/net/tun; test -c /dev/vhost-net
        for c in cpuset cpu io memory pids; do grep -qw $c /sys/fs/cgroup/cgroup.subtree_control; done
        ip link add one type veth peer name two; nft add table inet one
        unshare -Urmpf --mount-proc true; test $(stat -f -c %T /tmp) = tmpfs; exit 7";
    let output = run(&["--kernel", "debian"], script).unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
}

#[test]
fn the_built_kernel_stands_in_for_debians_where_that_cannot_be_had() {
    let directory = tempfile::tempdir().unwrap();
    let tool = directory.path().join("apt-cache");
    program(&tool, "#!/bin/sh\necho no packages here\n").unwrap();
    let mut command = host(&["--kernel", "debian"], "uname -r");
    let output = command.env("PATH", before_path(directory.path())).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("-testhost\n"), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("cannot get Debian's kernel: apt knows no package"), "{told}");
}

#[test]
fn cgroup_v1_is_there_instead_of_v2() {
    let script = "set -e
        for c in blkio cpu cpuset devices freezer memory net_cls pids; do
            mkdir /sys/fs/cgroup/$c/suite; echo $$ > /sys/fs/cgroup/$c/suite/tasks || test $c = cpuset
        done
        test $(stat -f -c %T /sys/fs/cgroup) = tmpfs; grep :memory:/suite /proc/self/cgroup";
    let output = run(&["--cgroup-v1"], script).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn systemd_is_the_first_process_and_answers_over_its_bus() {
    let script = "set -e
        test $(cat /proc/1/comm) = systemd; test $(systemctl is-system-running) = running
        systemd-run --scope --quiet grep system.slice /proc/self/cgroup
        busctl status org.freedesktop.systemd1 | grep PID=1; exit 7";
    let output = run(&["--systemd"], script).unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn only_the_share_brings_files_out() {
    let directory = tempfile::tempdir().unwrap();
    let share = directory.path().to_str().unwrap();
    let mark = "/var/lib/bulkhead-test-mark";
    let script = format!("echo inside > {mark} && cp {mark} /run/share-out/result");
    assert!(run(&["--share", share], &script).unwrap().status.success());
    assert_eq!(fs::read_to_string(directory.path().join("result")).unwrap(), "inside\n");
    assert!(!Path::new(mark).exists());
}

#[test]
fn time_out_is_124() {
    let output = run(&["--timeout", "15"], "sleep 600").unwrap();
    assert_eq!(output.status.code(), Some(124));
}

#[test]
fn host_that_ends_by_itself_is_125_with_its_last_messages() {
    let output = run(&[], "busybox reboot -f; sleep 60").unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Restarting system"));
}

#[test]
fn host_that_ends_before_the_command_is_started_again() {
    let (output, starts) = with_qemu_that_fails(1, "exit 7").unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("QEMU exit status: 9"));
    assert_eq!(starts, 2);
}

#[test]
fn host_that_never_comes_up_is_125_and_says_how_qemu_ended() {
    let (output, starts) = with_qemu_that_fails(9, "exit 7").unwrap();
    assert_eq!(output.status.code(), Some(125));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("did not come up in 3 starts: QEMU exit status: 9"), "{told}");
    assert_eq!(starts, 3);
}

/// Runs a script while the first starts of QEMU fail; also returns the number of starts.
fn with_qemu_that_fails(times: usize, script: &str) -> io::Result<(Output, usize)> {
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("starts");
    let (log_path, path) = (log.display(), std::env::var("PATH").unwrap_or_default());
    let fails = format!(
        "#!/bin/sh\necho start >> {log_path}\ntest $(wc -l < {log_path}) -gt {times} || exit 9\n\
         PATH='{path}' exec {QEMU} \"$@\"\n"
    );
    program(&directory.path().join(QEMU), &fails)?;
    let output = host(&[], script).env("PATH", before_path(directory.path())).output()?;
    Ok((output, fs::read_to_string(&log)?.lines().count()))
}

/// Writes an executable script.
fn program(path: &Path, script: &str) -> io::Result<()> {
    fs::write(path, script)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// The search path with this directory first.
fn before_path(directory: &Path) -> String {
    format!("{}:{}", directory.display(), std::env::var("PATH").unwrap_or_default())
}

#[test]
fn killed_session_leaves_no_qemu() {
    let mut session = host(&[], "sleep 600").spawn().unwrap();
    let qemu = wait_for(|| child_of(&session));
    session.kill().unwrap();
    session.wait().unwrap();
    wait_for(|| gone(&qemu).then_some(()));
}

fn wait_for<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = what() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "it does not happen");
        thread::sleep(Duration::from_millis(50));
    }
}

fn child_of(process: &Child) -> Option<String> {
    let path = format!("/proc/{0}/task/{0}/children", process.id());
    let children = fs::read_to_string(path).ok()?;
    let child = children.split_whitespace().next()?.to_owned();
    let name = fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
    name.starts_with("qemu").then_some(child)
}

/// Whether a process has ended; it may be a zombie.
fn gone(pid: &str) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.contains(") Z "),
        Err(_) => true,
    }
}
