//! Further processes in a container, and a container that is frozen.

use std::time::Duration;

use bulkhead_protocol::agent::{
    ExecRequest, KillRequest, PauseRequest, ProcessesRequest, ResizeRequest, ResumeRequest,
    Streams, Terminal, WaitReply, WaitRequest,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_vsock::VsockStream;
use tonic::{Code, Status};

use crate::guest::{Guest, header, open};

/// The process of a container that runs a shell command line instead.
fn shell(spec: &Value, line: &str) -> Value {
    let mut process = spec["process"].clone();
    process["args"] = json!(["sh", "-c", line]);
    process
}

async fn exec(guest: &mut Guest, exec_id: &str, process: &Value, out: u8) -> Result<u32, Status> {
    let request = ExecRequest {
        container_id: "one".to_owned(),
        exec_id: exec_id.to_owned(),
        process_json: serde_json::to_vec(process).unwrap(),
        streams: Some(Streams {
            stdout: if out == 0 { Vec::new() } else { header(out).to_vec() },
            ..Streams::default()
        }),
        descriptors: Vec::new(),
    };
    guest.agent.exec(request).await.map(|reply| reply.into_inner().pid)
}

async fn wait(guest: &mut Guest, exec_id: &str) -> Result<WaitReply, Status> {
    let request = WaitRequest { container_id: "one".to_owned(), exec_id: exec_id.to_owned() };
    guest.agent.wait(request).await.map(tonic::Response::into_inner)
}

/// Runs a process to its end; returns its status and what it wrote.
async fn output(guest: &mut Guest, process: &Value) -> (u32, String) {
    let mut stdout = open(2).await;
    exec(guest, "process", process, 2).await.unwrap();
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.unwrap();
    (wait(guest, "process").await.unwrap().exit_status, text)
}

async fn start(guest: &mut Guest, spec: &Value) {
    guest.create("one", spec).await.unwrap();
    guest.start_container("one").await.unwrap();
}

#[test]
#[ignore = "needs the test host"]
fn a_process_joins_the_container_with_its_status_and_its_output() {
    Guest::run(async |mut guest| {
        let spec = guest.program(&["sleep", "1000"]);
        start(&mut guest, &spec).await;
        let mut process = shell(&spec, "hostname; pwd; id -u; echo $HOME $EXTRA; exit 5");
        process["env"] = json!(["PATH=/bin", "EXTRA=more"]);
        process["cwd"] = json!("/tmp");
        process["user"] = json!({"uid": 5, "gid": 5});
        let expected = "box\n/tmp\n5\n/home/five more\n".to_owned();
        assert_eq!(output(&mut guest, &process).await, (5, expected));
        // In the container's process namespace and cgroup.
        let line = "readlink /proc/1/exe; cat /proc/1/comm; cat /proc/self/cgroup";
        let (status, text) = output(&mut guest, &shell(&spec, line)).await;
        assert_eq!((status, text.as_str()), (0, "/bin/busybox\nsleep\n0::/\n"));
        // It is forgotten once its end was reported, and its id may be used again.
        let error = wait(&mut guest, "process").await.unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (Code::NotFound, "process process does not exist")
        );
        assert!(!std::path::Path::new("/run/bulkhead/bundles/one/execs/process").exists());
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_joining_process_has_the_containers_filter_and_its_own_capabilities() {
    Guest::run(async |mut guest| {
        let mut spec = guest.program(&["sleep", "1000"]);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
        });
        // Without this, loading a filter needs a capability; with it, the filter comes last.
        for no_new_privileges in [false, true] {
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            start(&mut guest, &spec).await;
            let line = "mkdir /tmp/made; grep -E '^(Seccomp|NoNewPrivs|Cap(Prm|Eff|Bnd|Inh)):' \
                        /proc/self/status | tr -s '\\t\\n' ' '";
            let (_, text) = output(&mut guest, &shell(&spec, line)).await;
            // CAP_CHOWN and CAP_KILL.
            let expected = format!(
                "CapInh: 0000000000000000 CapPrm: 0000000000000021 CapEff: 0000000000000021 \
                 CapBnd: 0000000000000021 NoNewPrivs: {} Seccomp: 2 ",
                u8::from(no_new_privileges)
            );
            assert_eq!(text, expected);
            assert!(!guest.root().join("tmp/made").exists());
            let mut process = shell(&spec, "grep CapEff /proc/self/status");
            process["capabilities"] = json!({});
            process["user"] = json!({"uid": 5, "gid": 5});
            let (_, text) = output(&mut guest, &process).await;
            assert_eq!(text, "CapEff:\t0000000000000000\n");
            kill(&mut guest, "", 9).await.unwrap();
            guest.wait("one").await;
            guest.delete("one").await.unwrap();
        }
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_process_that_cannot_be_started_says_why_and_leaves_nothing() {
    Guest::run(async |mut guest| {
        let spec = guest.program(&["sleep", "1000"]);
        start(&mut guest, &spec).await;
        for (program, code, words) in [
            ("absent", Code::NotFound, "exec: \"absent\": executable file not found in $PATH"),
            ("/etc/data", Code::PermissionDenied, "exec: \"/etc/data\": permission denied"),
        ] {
            let mut process = spec["process"].clone();
            process["args"] = json!([program]);
            let error = exec(&mut guest, "same", &process, 0).await.unwrap_err();
            assert_eq!((error.code(), error.message()), (code, words));
        }
        let mut process = spec["process"].clone();
        process["cwd"] = json!("/nowhere");
        let error = exec(&mut guest, "same", &process, 0).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        exec(&mut guest, "same", &spec["process"].clone(), 0).await.unwrap();
        let error = exec(&mut guest, "same", &spec["process"].clone(), 0).await.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists);
        assert_eq!(processes(&mut guest).await.len(), 2);
        let nobody = wait(&mut guest, "nobody").await.unwrap_err();
        assert_eq!(nobody.code(), Code::NotFound);
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_process_is_signalled_alone_and_ends_with_its_container() {
    Guest::run(async |mut guest| {
        let spec = guest.program(&["sleep", "1000"]);
        start(&mut guest, &spec).await;
        for exec_id in ["first", "second"] {
            exec(&mut guest, exec_id, &spec["process"].clone(), 0).await.unwrap();
        }
        kill(&mut guest, "first", 15).await.unwrap();
        assert_eq!(wait(&mut guest, "first").await.unwrap().exit_status, 143);
        assert_eq!(processes(&mut guest).await.len(), 2);
        kill(&mut guest, "", 9).await.unwrap();
        assert_eq!(wait(&mut guest, "second").await.unwrap().exit_status, 137);
        let error = exec(&mut guest, "third", &spec["process"].clone(), 0).await.unwrap_err();
        assert_eq!(error.message(), "container one has ended");
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_frozen_container_stands_still_takes_no_process_and_can_be_killed() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("while :; do echo x >> /tmp/count; sleep 0.01; done");
        start(&mut guest, &spec).await;
        let count = guest.root().join("tmp/count");
        let length = || std::fs::metadata(&count).map_or(0, |metadata| metadata.len());
        pause(&mut guest).await.unwrap();
        let stood = length();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(length(), stood);
        let error = exec(&mut guest, "late", &shell(&spec, "true"), 0).await.unwrap_err();
        let expected = (Code::FailedPrecondition, "container one is frozen");
        assert_eq!((error.code(), error.message()), expected);
        let request = ResumeRequest { container_id: "one".to_owned() };
        guest.agent.resume(request).await.unwrap();
        while length() == stood {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        pause(&mut guest).await.unwrap();
        kill(&mut guest, "", 9).await.unwrap();
        assert_eq!(guest.wait("one").await.exit_status, 137);
        assert_eq!(pause(&mut guest).await.unwrap_err().message(), "container one has ended");
        // The cgroup is the test host's, and the next test's container would be frozen.
        guest.delete("one").await.unwrap();
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_terminal_is_one_and_takes_keys_and_sizes() {
    Guest::run(async |mut guest| {
        let terminal = |number, rows| Streams {
            terminal: Some(Terminal {
                stream: header(number).to_vec(),
                rows,
                columns: 80,
                plain: false,
            }),
            ..Streams::default()
        };
        let line = "stty size; test -t 0 && test -t 2 && tty; read line; echo \"got $line\"; \
                    stty size; trap 'echo hung up; exit 3' INT; while :; do sleep 0.1; done";
        let mut spec = guest.shell(line);
        spec["process"]["terminal"] = json!(true);
        let mut screen = open(7).await;
        let error = guest.create_with("one", &spec, Streams::default()).await.unwrap_err();
        assert_eq!(error.message(), "process.terminal and the stream of a terminal go together");
        guest.create_with("one", &spec, terminal(7, 33)).await.unwrap();
        guest.start_container("one").await.unwrap();
        see(&mut screen, "33 80\r\n/dev/pts/0\r\n").await;
        let size = |rows| ResizeRequest {
            container_id: "one".to_owned(),
            exec_id: String::new(),
            rows,
            columns: 99,
        };
        guest.agent.resize(size(44)).await.unwrap();
        screen.write_all(b"word\r").await.unwrap();
        see(&mut screen, "word\r\ngot word\r\n44 99\r\n").await;
        // A further process has a terminal of its own.
        let mut process = shell(&spec, "tty; exit 4");
        process["terminal"] = json!(true);
        let mut second = open(8).await;
        let request = ExecRequest {
            container_id: "one".to_owned(),
            exec_id: "second".to_owned(),
            process_json: serde_json::to_vec(&process).unwrap(),
            streams: Some(terminal(8, 0)),
            descriptors: Vec::new(),
        };
        guest.agent.exec(request).await.unwrap();
        let mut text = String::new();
        second.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "/dev/pts/1\r\n");
        assert_eq!(wait(&mut guest, "second").await.unwrap().exit_status, 4);
        // Ctrl-C.
        screen.write_all(b"\x03").await.unwrap();
        let mut text = String::new();
        screen.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "^Chung up\r\n");
        assert_eq!(guest.wait("one").await.exit_status, 3);
        guest.delete("one").await.unwrap();
    });
}

/// Reads exactly this.
async fn see(screen: &mut VsockStream, expected: &str) {
    let mut text = vec![0; expected.len()];
    screen.read_exact(&mut text).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&text), expected);
}

async fn pause(guest: &mut Guest) -> Result<(), Status> {
    guest.agent.pause(PauseRequest { container_id: "one".to_owned() }).await.map(drop)
}

async fn kill(guest: &mut Guest, exec_id: &str, signal: u32) -> Result<(), Status> {
    let (container_id, exec_id) = ("one".to_owned(), exec_id.to_owned());
    guest.agent.kill(KillRequest { container_id, exec_id, signal, all: false }).await.map(drop)
}

async fn processes(guest: &mut Guest) -> Vec<String> {
    let request = ProcessesRequest { container_id: "one".to_owned() };
    let reply = guest.agent.processes(request).await.unwrap().into_inner();
    reply.processes.into_iter().map(|process| process.command).collect()
}
