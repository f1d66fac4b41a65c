//! Debian's Docker with Bulkhead, compared with runc.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use bulkhead_tests::docker::Docker;
use bulkhead_tests::runtime::{expect_output, finish, output, told};

use super::{wait_for_nothing, wait_until};

/// Options of every container under Bulkhead.
const OURS: [&str; 4] = ["--runtime", "bulkhead", "--network", "none"];
/// Prints what a container sees of itself. Mounts of files are left out, because they show where
/// the files come from.
const PROBE: &str = "id; pwd; hostname; echo $A $HOME $PATH; \
    grep -E '^(Cap|Seccomp|NoNew)' /proc/self/status; ulimit -n -c -u -s; \
    cat /proc/self/oom_score_adj; ls /dev; touch /file; \
    mount | grep -vE ' (/|/etc/[a-z.]*|/sbin/docker-init) ' | cut -d' ' -f1-5; df -P /dev/shm | cut -c1-30; \
    cat /proc/1/comm /proc/sys/net/ipv4/ip_unprivileged_port_start /etc/hostname /etc/hosts; \
    cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max; \
    grep -c . /proc/net/dev; exit 7";

/// The arguments of `docker run` for a container under Bulkhead.
fn ours<'a>(options: &[&'a str], rest: &[&'a str]) -> Vec<&'a str> {
    [options, &OURS, rest].concat()
}

/// The arguments of `docker run` with these options, which are split at spaces.
fn run(options: &str, rest: &[&'static str]) -> Vec<String> {
    let options = options.split_whitespace();
    let line = ["run", "--network", "none"].into_iter().chain(options).chain(rest.iter().copied());
    line.map(str::to_owned).collect()
}

fn call(docker: &Docker, runtime: &str, line: &[String]) -> Output {
    let (verb, rest) = line.split_first().unwrap();
    let rest = rest.iter().map(String::as_str);
    let line: Vec<&str> = [verb.as_str(), "--runtime", runtime].into_iter().chain(rest).collect();
    docker.call(&line).unwrap()
}

#[test]
fn a_container_is_as_under_runc() {
    let docker = Docker::shared().unwrap();
    let many = "--rm -e A=1 --user 5:6 -w /tmp --read-only --tmpfs /t:size=1m --cap-drop ALL \
                --cap-add CHOWN --ulimit nofile=100:200 --memory 64m --pids-limit 50 --cpus 0.5 \
                --init --hostname named --security-opt no-new-privileges --shm-size 32m";
    let profile = docker.directory().join("profile.json");
    let rules = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}"#;
    fs::write(&profile, rules).unwrap();
    let filtered = format!("--rm --security-opt seccomp={}", profile.display());
    for line in [
        run("--rm --hostname plain", &["box", "sh", "-c", PROBE]),
        run(many, &["box", "sh", "-c", PROBE]),
        run(&filtered, &["box", "sh", "-c", "touch /file && chmod 7 /file; echo $?; exit 7"]),
    ] {
        let (expected, found) = (call(&docker, "runc", &line), call(&docker, "bulkhead", &line));
        assert_eq!(told(&found), told(&expected), "{line:?}");
        assert_eq!(found.status.code(), Some(7));
    }
    dockers_own_profile(&docker);
    for (program, words) in [
        ("absent", "exec: \"absent\": executable file not found in $PATH"),
        ("/etc/hosts", "exec: \"/etc/hosts\": permission denied"),
    ] {
        let line = run("--rm", &["box", program]);
        let (expected, found) = (call(&docker, "runc", &line), call(&docker, "bulkhead", &line));
        assert_eq!(found.status.code(), expected.status.code(), "{program}");
        assert!(told(&found).2.contains(words), "{found:?}");
    }
    // A privileged container has all privileges in the guest, with the guest's devices and none of
    // the host's.
    let line = run("--rm --privileged", &["box", "sh", "-c", "grep CapEff /proc/self/status"]);
    let (expected, found) = (call(&docker, "runc", &line), call(&docker, "bulkhead", &line));
    assert_eq!(told(&found), told(&expected));
    wait_for_nothing(docker.directory());
}

/// The system calls that Docker's default profile is about: clone(2) and unshare(2) for namespaces,
/// clone3, mount, ptrace, keyctl, a call that does not exist, and one that is always allowed.
fn dockers_own_profile(docker: &Docker) {
    let calls = [
        "x86_64:56:0x10000011",
        "x86_64:272:0x10000000",
        "x86_64:435",
        "x86_64:165",
        "x86_64:101",
        "x86_64:250",
        "x86_64:600",
        "x86_64:39",
    ];
    let program = format!("--rm -v {}:/syscalls:ro", env!("CARGO_BIN_EXE_syscalls"));
    let line = run(&program, &[&["box", "/syscalls"][..], &calls].concat());
    let (expected, found) = (call(docker, "runc", &line), call(docker, "bulkhead", &line));
    assert_eq!(told(&found), told(&expected));
    let (status, answers, _) = told(&found);
    assert_eq!(status, Some(0));
    assert!(answers.starts_with("x86_64:56:0x10000011 errno 1\n"), "{answers}");
}

#[test]
fn a_container_joins_the_machine_of_another() {
    let docker = Docker::shared().unwrap();
    let sleep = ["box", "sleep", "1000"];
    docker.ok(&ours(&["run", "-d", "--name", "one", "--ipc", "shareable"], &sleep)).unwrap();
    let joined = ["--runtime", "bulkhead", "--network", "container:one"];
    let more = ["--ipc", "container:one", "--pid", "container:one", "--name", "two"];
    docker.ok(&[&["run", "-d"][..], &joined, &more, &sleep].concat()).unwrap();
    let machine = |name| docker.ok(&["exec", name, "cat", "/proc/sys/kernel/random/boot_id"]);
    assert_eq!(machine("one").unwrap(), machine("two").unwrap());
    let namespaces =
        |name| docker.ok(&["exec", name, "ls", "-l", "/proc/1/ns/ipc", "/proc/1/ns/pid"]);
    let (one, two) = (namespaces("one").unwrap(), namespaces("two").unwrap());
    let numbers = |text: &str| -> Vec<String> {
        text.lines().filter_map(|line| Some(line.split_once("-> ")?.1.to_owned())).collect()
    };
    assert_eq!(numbers(&one).len(), 2, "{one}");
    assert_eq!(numbers(&one), numbers(&two));
    let run = [&["run", "--rm"][..], &joined, &["box", "sh", "-c", "echo out; exit 7"]].concat();
    let ran = docker.call(&run).unwrap();
    assert_eq!(told(&ran), (Some(7), "out\n".to_owned(), String::new()));
    docker.ok(&["rm", "--force", "two"]).unwrap();
    docker.ok(&["exec", "one", "true"]).unwrap();
    docker.ok(&["rm", "--force", "one"]).unwrap();
    wait_for_nothing(docker.directory());
}

/// `docker update` to less memory than the machine was started with, and to more.
fn limits_that_change(docker: &Docker) {
    docker.ok(&["update", "--memory", "48m", "--memory-swap", "48m", "one"]).unwrap();
    let limit = docker.ok(&["exec", "one", "cat", "/sys/fs/cgroup/memory.max"]).unwrap();
    assert_eq!(limit, (48 << 20).to_string());
    docker.ok(&["update", "--memory", "400m", "--memory-swap", "400m", "one"]).unwrap();
    let total = docker.ok(&["exec", "one", "grep", "MemTotal", "/proc/meminfo"]).unwrap();
    let total: u64 = total.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(total > 400 << 10, "{total} kB");
}

#[test]
fn a_running_container_does_what_docker_asks() {
    let docker = Docker::shared().unwrap();
    let shared = docker.directory().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("from-host"), "host\n").unwrap();
    let script = "trap 'exit 5' TERM; echo data > /volume/file; cat /shared/from-host; \
                  touch /shared/no; while :; do sleep 0.1; done";
    let bind = format!("{}:/shared:ro", shared.display());
    let options = ["run", "-d", "--name", "one", "-v", "vol:/volume", "-v", &bind];
    docker.ok(&ours(&options, &["box", "sh", "-c", script])).unwrap();
    wait_until(|| docker.ok(&["exec", "one", "cat", "/volume/file"]).is_ok_and(|it| it == "data"));

    let logs = docker.call(&["logs", "one"]).unwrap();
    let read_only = "touch: /shared/no: Read-only file system\n";
    assert_eq!(told(&logs), (Some(0), "host\n".to_owned(), read_only.to_owned()));

    let exec = docker.call(&["exec", "one", "sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap();
    assert_eq!(told(&exec), (Some(3), "out\n".to_owned(), "err\n".to_owned()));
    let exec = docker
        .call(&[
            "exec",
            "-u",
            "5",
            "-w",
            "/bin",
            "-e",
            "B=2",
            "one",
            "sh",
            "-c",
            "id -u; pwd; echo $B",
        ])
        .unwrap();
    assert_eq!(told(&exec).1, "5\n/bin\n2\n");
    let mut command = docker.command(&["exec", "-i", "one", "cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    assert_eq!(finish(child).unwrap().stdout, b"typed\n");

    copies_of_files(&docker);

    let stats = docker.ok(&["stats", "--no-stream", "--format", "{{.MemUsage}}", "one"]).unwrap();
    // The guest's memory counts as the pod's: tens of MiB, not a few.
    let used: f64 = stats.split("MiB").next().unwrap().parse().unwrap();
    assert!(used > 16.0, "{stats}");
    limits_that_change(&docker);

    docker.ok(&["pause", "one"]).unwrap();
    assert_eq!(inspect(&docker, "one", "{{.State.Status}}"), "paused");
    let top = docker.ok(&["top", "one"]).unwrap();
    assert!(top.contains(" sh -c ") && !top.contains("stand-in"), "{top}");
    docker.ok(&["unpause", "one"]).unwrap();
    assert_eq!(inspect(&docker, "one", "{{.State.Status}}"), "running");

    docker.ok(&["stop", "--time", "60", "one"]).unwrap();
    assert_eq!(inspect(&docker, "one", "{{.State.ExitCode}}"), "5");
    docker.ok(&["start", "one"]).unwrap();
    docker.ok(&["kill", "--signal", "KILL", "one"]).unwrap();
    assert_eq!(docker.ok(&["wait", "one"]).unwrap(), "137");
    let back = ours(&["run", "--rm"], &["more", "cat", "/back"]);
    assert_eq!(docker.ok(&back).unwrap(), "data");
    docker.ok(&["start", "one"]).unwrap();
    docker.ok(&["rm", "--force", "one"]).unwrap();
    wait_for_nothing(docker.directory());
}

/// Copies files to and from the container `one`, which has a volume with a file.
fn copies_of_files(docker: &Docker) {
    let copied = docker.directory().join("copied");
    let copied = copied.to_str().unwrap();
    docker.ok(&["cp", "one:/volume/file", copied]).unwrap();
    assert_eq!(fs::read_to_string(copied).unwrap(), "data\n");
    docker.ok(&["cp", copied, "one:/back"]).unwrap();
    assert_eq!(docker.ok(&["exec", "one", "cat", "/back"]).unwrap(), "data");
    assert!(docker.ok(&["diff", "one"]).unwrap().contains("A /back"));
    docker.ok(&["commit", "one", "more"]).unwrap();
}

#[test]
fn terminals_and_input_reach_the_container() {
    let docker = Docker::shared().unwrap();
    let mut command = docker.command(&ours(&["run", "--rm", "-i"], &["box", "cat"]));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"through and through\n").unwrap();
    assert_eq!(finish(child).unwrap().stdout, b"through and through\n");

    let socket = docker.directory().join("socket");
    let line = format!(
        "docker --host unix://{} run --rm -it {} box sh -c 'test -t 0 && echo a terminal; exit 4'",
        socket.display(),
        OURS.join(" ")
    );
    // `script` provides the terminal, and exits with the command's status.
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).stdin(Stdio::null());
    let (status, out, _) = told(&output(&mut script).unwrap());
    assert_eq!(status, Some(4), "{out}");
    assert!(out.contains("a terminal\r\n"), "{out}");
    wait_for_nothing(docker.directory());
}

#[test]
fn an_image_is_built_by_the_default_runtime() {
    let docker = Docker::shared().unwrap();
    let context = docker.directory().join("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("copied"), "from the context\n").unwrap();
    let steps = "FROM box\nCOPY copied /copied\nENV WHO=builder\n\
        RUN cat /copied > /made && echo $WHO >> /made && chmod 640 /made\n\
        USER 5\nWORKDIR /work\nRUN id -u > /tmp-of-5 || true\nCMD [\"cat\", \"/made\"]\n";
    fs::write(context.join("Dockerfile"), steps).unwrap();
    let place = context.to_str().unwrap();
    docker.ok(&["build", "--network", "none", "--tag", "built", place]).unwrap();
    let run = ["run", "--rm", "--network", "none", "--user", "0", "built"];
    assert_eq!(docker.ok(&run).unwrap(), "from the context\nbuilder");
    // A step that fails makes the build fail, and its status is reported.
    fs::write(context.join("Dockerfile"), "FROM box\nRUN exit 9\n").unwrap();
    let failed = docker.call(&["build", "--network", "none", place]).unwrap();
    assert!(told(&failed).2.contains("returned a non-zero code: 9"), "{failed:?}");
    docker.ok(&["container", "prune", "--force"]).unwrap();
    wait_for_nothing(docker.directory());
}

#[test]
fn docker_knows_that_memory_ran_out() {
    let docker = Docker::shared().unwrap();
    let holds = "x=a; while :; do x=$x$x; done";
    let told = |runtime: &str, name: &str| {
        let options = ["run", "--runtime", runtime, "--network", "none", "--memory", "32m"];
        let rest = ["--name", name, "box", "sh", "-c", holds];
        let status = docker.call(&[&options[..], &rest].concat()).unwrap().status.code();
        let told = || inspect(&docker, name, "{{.State.OOMKilled}} {{.State.ExitCode}}");
        wait_until(|| told() == "true 137");
        status
    };
    assert_eq!(told("runc", "theirs"), Some(137));
    assert_eq!(told("bulkhead", "ours"), Some(137));
    docker.ok(&["rm", "ours", "theirs"]).unwrap();
    wait_for_nothing(docker.directory());
}

#[test]
fn a_runtime_by_another_name_has_rules_of_its_own() {
    let docker = Docker::shared().unwrap();
    let total_mib = |runtime: &str| {
        let options = ["run", "--rm", "--runtime", runtime, "--network", "none"];
        let line =
            docker.ok(&[&options[..], &["box", "grep", "MemTotal:", "/proc/meminfo"]].concat());
        let line = line.unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
    };
    assert!(total_mib("bulkhead") > 1000);
    for runtime in ["bulkhead-strict", "by-option"] {
        let total = total_mib(runtime);
        assert!((192..340).contains(&total), "{runtime}: {total} MiB");
    }
    wait_for_nothing(docker.directory());
}

#[test]
fn callers_come_and_go_while_it_talks() {
    let docker = Docker::shared().unwrap();
    let script = "while read line; do echo heard $line; done; echo end";
    let options = ["run", "-d", "-i", "--name", "talk"];
    docker.ok(&ours(&options, &["box", "sh", "-c", script])).unwrap();
    let mut follower = docker.command(&["logs", "--follow", "talk"]);
    let mut follower = follower.stdout(Stdio::piped()).spawn().unwrap();
    let say = |words: &str| {
        let mut command = docker.command(&["attach", "--sig-proxy=false", "talk"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(format!("{words}\n").as_bytes()).unwrap();
        expect_output(&mut child, &format!("heard {words}\n")).unwrap();
        // The client ends; the container stays.
        child.kill().unwrap();
        child.wait().unwrap();
    };
    say("one");
    say("two");
    expect_output(&mut follower, "heard one\nheard two\n").unwrap();
    docker.ok(&["restart", "--time", "0", "talk"]).unwrap();
    assert_eq!(inspect(&docker, "talk", "{{.State.Running}}"), "true");
    let mut ended = docker.command(&["attach", "talk"]);
    let mut ended = ended.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = ended.stdin.take().unwrap();
    input.write_all(b"three\n").unwrap();
    expect_output(&mut ended, "heard three\n").unwrap();
    docker.ok(&["rm", "--force", "talk"]).unwrap();
    finish(ended).unwrap();
    finish(follower).unwrap();
    wait_for_nothing(docker.directory());
}

#[test]
fn health_is_checked_and_failures_are_started_again() {
    let docker = Docker::shared().unwrap();
    let options =
        ["run", "-d", "--name", "well", "--health-cmd", "true", "--health-interval", "1s"];
    docker.ok(&ours(&options, &["box", "sleep", "1000"])).unwrap();
    let options = ["run", "-d", "--name", "ill", "--restart", "on-failure:1"];
    docker.ok(&ours(&options, &["box", "sh", "-c", "exit 3"])).unwrap();
    wait_until(|| inspect(&docker, "well", "{{.State.Health.Status}}") == "healthy");
    let over = "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}";
    wait_until(|| inspect(&docker, "ill", over) == "1 exited 3");
    docker.ok(&["rm", "--force", "well", "ill"]).unwrap();
    wait_for_nothing(docker.directory());
}

fn inspect(docker: &Docker, name: &str, what: &str) -> String {
    docker.ok(&["inspect", "--format", what, name]).unwrap()
}
