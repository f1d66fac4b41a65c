//! Further processes in a container, pausing, and the list of processes, beside runc.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::Result;
use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, comes_true, finish, told};
use serde_json::json;

const LONG: [&str; 2] = ["/bin/sleep", "1000"];

fn started(runtime: &Runtime, id: &str, bundle: &Bundle) {
    runtime.create(id, bundle).unwrap();
    runtime.ok(&["start", id]).unwrap();
}

#[test]
fn a_process_does_what_it_does_under_runc() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let bundles = [Bundle::new(&LONG).unwrap(), Bundle::new(&LONG).unwrap()];
    for (runtime, bundle) in [&ours, &runc].into_iter().zip(&bundles) {
        started(runtime, "peer", bundle);
    }
    let capabilities = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status";
    let limits = "ulimit -n; cat /proc/self/oom_score_adj; umask";
    for line in [
        vec!["peer", "/bin/sh", "-c", "echo out; echo err >&2; exit 7"],
        vec!["peer", "/bin/sh", "-c", "kill -9 $$"],
        vec!["peer", "/bin/sh", "-c", "pwd; id; hostname; test -t 0; echo $?; echo $HOME $PATH"],
        vec!["-e", "A=1", "-e", "A=2", "peer", "/bin/sh", "-c", "echo $A"],
        vec![
            "-u",
            "5:6",
            "-g",
            "9",
            "--cwd",
            "/tmp",
            "peer",
            "/bin/sh",
            "-c",
            "pwd; id; echo $HOME",
        ],
        vec!["peer", "/bin/sh", "-c", capabilities],
        vec!["--no-new-privs", "peer", "/bin/sh", "-c", capabilities],
        vec!["--cap", "CAP_SYS_PTRACE", "peer", "/bin/sh", "-c", capabilities],
        vec!["-u", "5", "--cap", "CAP_SYS_PTRACE", "peer", "/bin/sh", "-c", capabilities],
        vec!["peer", "/bin/sh", "-c", limits],
        vec!["peer", "/bin/sh", "-c", "ls -l /proc/self/fd | wc -l; cat /proc/self/cgroup"],
        vec!["peer", "sh", "-c", "readlink /proc/self/ns/pid /proc/1/ns/pid | sort -u | wc -l"],
    ] {
        let line: Vec<_> = ["exec"].into_iter().chain(line).collect();
        let (expected, found) = (runc.call(&line).unwrap(), ours.call(&line).unwrap());
        assert_eq!(told(&found), told(&expected), "{line:?}");
    }
    // Where the messages differ, the exit status is the same, and the words that callers look for
    // are there.
    for (line, words) in [
        (vec!["exec", "peer", "absent"], "executable file not found in $PATH"),
        (vec!["exec", "peer", "/bin/absent"], "no such file or directory"),
        (vec!["exec", "peer", "/etc"], "unable to start container process"),
        (vec!["exec", "nobody", "/bin/true"], "does not exist"),
        (vec!["exec", "--cwd", "/absent", "peer", "/bin/true"], ""),
    ] {
        let (expected, found) = (runc.call(&line).unwrap(), ours.call(&line).unwrap());
        assert_eq!(found.status.code(), expected.status.code(), "{line:?}");
        for output in [&expected, &found] {
            let (_, out, err) = told(output);
            assert!(err.contains(words) && out.is_empty(), "{line:?}: {err}");
        }
    }
    runc.ok(&["delete", "--force", "peer"]).unwrap();
    ours.ok(&["delete", "--force", "peer"]).unwrap();
    ours.assert_clean().unwrap();
}

#[test]
fn input_reaches_the_process_and_its_end() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&LONG).unwrap();
    started(&runtime, "input", &bundle);
    let mut command = runtime.command(&["exec", "input", "/bin/sh", "-c", "cat; echo end"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = vec![b'x'; 1 << 20];
    let sent = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let output = finish(child).unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(output.stdout.len(), input.len() + 4);
    assert!(output.stdout.starts_with(&input) && output.stdout.ends_with(b"end\n"));
    runtime.ok(&["delete", "--force", "input"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_detached_process_has_a_file_for_a_process_that_stands_for_it() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&LONG).unwrap();
    started(&runtime, "detached", &bundle);
    let process = json!({
        "args": ["/bin/sh", "-c", "trap 'echo got > /root/got; exit 3' TERM; \
                                   echo up > /root/up; while :; do sleep 0.1; done"],
        "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}
    });
    let directory = tempfile::tempdir().unwrap();
    let (file, pid) = (directory.path().join("process.json"), directory.path().join("pid"));
    fs::write(&file, process.to_string()).unwrap();
    let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let (file, pid_file) = (path(&file), path(&pid));
    let mut command = runtime.command(&[
        "exec",
        "--process",
        &file,
        "--detach",
        "--pid-file",
        &pid_file,
        "detached",
    ]);
    let status = finish(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    assert!(status.unwrap().status.success());
    let pid: u32 = fs::read_to_string(&pid).unwrap().parse().unwrap();
    assert!(runtime.processes("bulkhead-stand-in").unwrap().contains(&pid));
    wait_until(|| bundle.rootfs().join("root/up").exists(), "the process did not come up");
    // A signal to the stand-in reaches the process, and the stand-in ends with the process.
    std::process::Command::new("kill").arg(pid.to_string()).status().unwrap();
    wait_until(|| bundle.rootfs().join("root/got").exists(), "the signal did not arrive");
    wait_until(|| !fs::exists(format!("/proc/{pid}")).unwrap(), "the stand-in stayed");
    runtime.ok(&["delete", "--force", "detached"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_process_dies_with_whoever_stands_for_it_and_with_its_container() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&LONG).unwrap();
    started(&runtime, "ends", &bundle);
    let count = || processes(&runtime, "ends").unwrap();
    let exec = || runtime.command(&["exec", "ends", "/bin/sleep", "500"]).spawn().unwrap();
    let mut killed = exec();
    wait_until(|| count() == 2, "the process did not come up");
    killed.kill().unwrap();
    killed.wait().unwrap();
    wait_until(|| count() == 1, "the process outlived whoever stood for it");
    // The caller is killed at any point of the start.
    for delay in [50, 150, 250, 350, 450, 600] {
        let mut killed = exec();
        std::thread::sleep(Duration::from_millis(delay));
        killed.kill().unwrap();
        killed.wait().unwrap();
        std::thread::sleep(Duration::from_millis(600));
        wait_until(|| count() == 1, "a process outlived whoever was about to stand for it");
    }
    let with_container = exec();
    wait_until(|| count() == 2, "the process did not come up");
    runtime.ok(&["kill", "ends", "KILL"]).unwrap();
    let status = finish(with_container).unwrap().status;
    assert_eq!((status.code(), status.signal()), (Some(137), None));
    let refusal = runtime.fails(&["exec", "ends", "/bin/true"]).unwrap();
    assert!(refusal.contains("stopped"), "{refusal}");
    runtime.ok(&["delete", "ends"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_paused_container_stands_still() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    for runtime in [&ours, &runc] {
        let bundle = Bundle::script("while :; do echo x >> /root/count; sleep 0.05; done").unwrap();
        started(runtime, "still", &bundle);
        let length = || fs::metadata(bundle.rootfs().join("root/count")).map_or(0, |it| it.len());
        wait_until(|| length() > 0, "the container did not come up");
        assert!(!runtime.call(&["resume", "still"]).unwrap().status.success());
        assert_eq!(runtime.ok(&["pause", "still"]).unwrap(), "");
        assert_eq!(runtime.state("still").unwrap()["status"], "paused");
        let stood = length();
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(length(), stood);
        assert!(!runtime.call(&["pause", "still"]).unwrap().status.success());
        let exec = runtime.call(&["exec", "still", "/bin/true"]).unwrap();
        let words = String::from_utf8_lossy(&exec.stderr).into_owned();
        let expected = "cannot exec in a paused container (use --ignore-paused to override)";
        assert!(words.contains(expected), "{words}");
        assert_eq!(runtime.ok(&["resume", "still"]).unwrap(), "");
        assert_eq!(runtime.state("still").unwrap()["status"], "running");
        wait_until(|| length() > stood, "the container did not go on");
        // A paused container can be deleted with `--force`.
        runtime.ok(&["pause", "still"]).unwrap();
        runtime.ok(&["delete", "--force", "still"]).unwrap();
    }
    ours.assert_clean().unwrap();
}

#[test]
fn a_process_that_ignores_the_pause_runs_after_it() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    for runtime in [&ours, &runc] {
        let bundle = Bundle::new(&LONG).unwrap();
        started(runtime, "later", &bundle);
        runtime.ok(&["pause", "later"]).unwrap();
        let mut child = exec_in_paused(runtime, "echo ran; exit 7");
        std::thread::sleep(Duration::from_millis(1500));
        assert!(child.try_wait().unwrap().is_none(), "it did not wait");
        // Other commands do not have to wait.
        assert_eq!(runtime.state("later").unwrap()["status"], "paused");
        runtime.ok(&["resume", "later"]).unwrap();
        let (status, output, _) = told(&finish(child).unwrap());
        assert_eq!((status, output.as_str()), (Some(7), "ran\n"));
        runtime.ok(&["delete", "--force", "later"]).unwrap();
    }
    ours.assert_clean().unwrap();
}

#[test]
fn whoever_waits_for_the_end_of_a_pause_may_go_away_or_be_sent_away() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&LONG).unwrap();
    started(&runtime, "later", &bundle);
    runtime.ok(&["pause", "later"]).unwrap();
    let supervisor = runtime.processes("supervise").unwrap()[0];
    let descriptors = || fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().count();
    let before = descriptors();
    for signal in ["-KILL", "-TERM"] {
        let waiting = exec_in_paused(&runtime, "echo ran > /root/ran");
        wait_until(|| descriptors() > before, "nobody waits");
        let pid = waiting.id().to_string();
        std::process::Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(!finish(waiting).unwrap().status.success());
        wait_until(|| descriptors() == before, "a process that nobody waits for is kept");
    }
    // The stand-in of a detached process that waits ends with its caller.
    let count = || runtime.processes("bulkhead-stand-in").unwrap().len();
    let line = ["exec", "--detach", "--ignore-paused", "later", "/bin/touch", "/root/ran"];
    let mut detached = runtime.command(&line);
    let mut detached = detached.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until(|| count() == 2, "nobody was about to stand for it");
    std::thread::sleep(Duration::from_millis(500));
    detached.kill().unwrap();
    detached.wait().unwrap();
    wait_until(|| count() == 1, "whoever was about to stand for it stays");
    runtime.ok(&["resume", "later"]).unwrap();
    assert_eq!(processes(&runtime, "later").unwrap(), 1);
    assert!(!bundle.rootfs().join("root/ran").exists());
    // A caller that waits when the container ends gets an error.
    runtime.ok(&["pause", "later"]).unwrap();
    let waiting = exec_in_paused(&runtime, "true");
    wait_until(|| descriptors() > before, "nobody waits");
    runtime.ok(&["kill", "later", "KILL"]).unwrap();
    let (status, _, errors) = told(&finish(waiting).unwrap());
    assert!(status == Some(255) && errors.contains("stopped"), "{status:?} {errors}");
    runtime.ok(&["delete", "--force", "later"]).unwrap();
    runtime.assert_clean().unwrap();
}

fn exec_in_paused(runtime: &Runtime, script: &str) -> Child {
    let arguments = ["exec", "--ignore-paused", "later", "/bin/sh", "-c", script];
    runtime.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn the_list_of_processes_has_those_of_the_container() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("sleep 400 & sleep 500; true").unwrap();
    started(&runtime, "listed", &bundle);
    wait_until(|| processes(&runtime, "listed").unwrap() == 3, "not all came up");
    let table = runtime.ok(&["ps", "listed"]).unwrap();
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
    assert_eq!(lines[2][7..], ["sleep", "400"], "{table}");
    // Both are children of the shell.
    assert_eq!((lines[2][2], lines[3][2]), (lines[1][1], lines[1][1]), "{table}");
    // On the host, the list has the stand-in.
    let pids = runtime.ok(&["ps", "--format", "json", "listed"]).unwrap();
    assert_eq!(pids, format!("[{}]\n", runtime.state("listed").unwrap()["pid"]));
    let refusal = runtime.fails(&["ps", "listed", "-o", "pid"]).unwrap();
    assert!(refusal.contains("-o pid"), "{refusal}");
    runtime.ok(&["delete", "--force", "listed"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn many_processes_leave_nothing_behind() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&LONG).unwrap();
    started(&runtime, "many", &bundle);
    let supervisor = runtime.processes("supervise").unwrap()[0];
    let descriptors = || fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().count();
    let exec = || {
        let arguments = ["exec", "many", "/bin/true"];
        runtime.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    assert!(finish(exec()).unwrap().status.success());
    wait_until(|| processes(&runtime, "many").unwrap() == 1, "the first process stayed");
    let before = descriptors();
    for _ in 0..4 {
        let at_once: Vec<_> = (0..5).map(|_| exec()).collect();
        for child in at_once {
            let output = finish(child).unwrap();
            assert!(output.status.success(), "{:?}", told(&output));
        }
    }
    wait_until(|| descriptors() <= before, "descriptors of the supervisor stayed");
    assert_eq!(processes(&runtime, "many").unwrap(), 1);
    runtime.ok(&["delete", "--force", "many"]).unwrap();
    runtime.assert_clean().unwrap();
}

fn processes(runtime: &Runtime, id: &str) -> Result<usize> {
    // Without the heading.
    Ok(runtime.ok(&["ps", id])?.lines().count() - 1)
}

fn wait_until(reached: impl FnMut() -> bool, otherwise: &str) {
    assert!(comes_true(Duration::from_secs(60), reached), "{otherwise}");
}
