//! An agent that crashes or panics writes enough to the guest's console to find the reason.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_protocol::AGENT_PORT;
use bulkhead_protocol::agent::agent_client::AgentClient;
use bulkhead_protocol::agent::{CreateRequest, ExecRequest, StartRequest};
use bulkhead_tests::vm::{Options, TestVm, dist};
use bulkhead_vmm::control::{Ending, Event};
use serde_json::json;
use tonic::transport::Channel;

use super::agent::{BOOT, client, hello};

/// The root directory for containers, beside the agent in the initramfs.
const ROOT: &str = "/root";
const FILES: [&str; 6] = ["fault", "root", "root/bin", "root/bin/sleep", "root/dev", "root/proc"];

/// The agent's initramfs with `/fault`, the program that makes the agent crash, in addition.
fn initramfs(directory: &Path) -> PathBuf {
    for made in ["root/bin", "root/dev", "root/proc"] {
        fs::create_dir_all(directory.join(made)).unwrap();
    }
    fs::copy("/bin/busybox", directory.join("root/bin/sleep")).unwrap();
    let program = directory.join("fault");
    fs::copy(env!("CARGO_BIN_EXE_fault"), &program).unwrap();
    let stripped = Command::new("strip").arg(&program).status().unwrap();
    assert!(stripped.success());
    let list = directory.join("list");
    fs::write(&list, FILES.join("\n") + "\n").unwrap();
    let archive = directory.join("archive");
    let mut cpio = Command::new("/bin/busybox");
    cpio.args(["cpio", "-o", "-H", "newc"]).current_dir(directory);
    cpio.stdin(File::open(&list).unwrap()).stdout(File::create(&archive).unwrap());
    assert!(cpio.stderr(Stdio::null()).status().unwrap().success());
    // The kernel unpacks both archives in order.
    let mut both = fs::read(dist().join("share/bulkhead/initramfs.cpio")).unwrap();
    both.resize(both.len().next_multiple_of(4), 0);
    both.extend(fs::read(&archive).unwrap());
    let path = directory.join("initramfs.cpio");
    fs::write(&path, both).unwrap();
    path
}

/// A machine whose agent crashes; the kernel passes the words after the dashes to `/fault`.
fn boot(harm: &str) -> TestVm {
    let directory = tempfile::tempdir().unwrap();
    let options = Options {
        cmdline: format!("rdinit=/fault -- {harm}"),
        initramfs: Some(initramfs(directory.path())),
        ..Options::default()
    };
    TestVm::boot(&options).unwrap()
}

/// How a machine ends whose first process crashes, and its console.
fn end(harm: &str) -> (Event, String) {
    let vm = boot(harm);
    let event = vm.ending().unwrap();
    (event, vm.console_text())
}

/// Checks that a console has the trace of a process that jumped to an unmapped address.
fn assert_trace(console: &str, life: &str) {
    for words in [
        &format!("bulkhead-agent: {life} ["),
        "] faults: SIGSEGV (code 1) at 0xbad0",
        "bulkhead-agent: rip 0xbad0 rsp 0x",
        "r12 0x123456789abcdef ",
        "bulkhead-agent: code at 0xbab0: cannot be read, error 5",
        "bulkhead-agent: stack at 0x",
        " r-xp ",
        "/init\n",
        "[stack]",
    ] {
        assert!(console.contains(words), "{words:?}: {console}");
    }
}

#[test]
fn a_fault_of_the_agent_is_on_the_console_with_registers_code_and_maps() {
    let (event, console) = end("init");
    assert_eq!(event.ended, Ending::Panic, "{console}");
    assert_trace(&console, "init");
    let died = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b";
    assert!(console.contains(died), "{console}");
    // The lines that become part of the supervisor's error have it too.
    let tail = event.console_tail.join("\n");
    assert!(tail.contains("faults: SIGSEGV") && tail.contains("rip 0xbad0"), "{tail}");
}

#[test]
fn a_panic_of_the_agent_is_on_the_console_with_its_place() {
    let (event, console) = end("panic");
    assert_eq!(event.ended, Ending::Reset, "{console}");
    let last = event.console_tail.iter().find(|line| line.contains("agent panicked")).unwrap();
    assert!(last.contains("panicked at ") && last.contains(".rs:"), "{last}");
    assert!(last.contains("Bad file descriptor"), "{last}");
}

/// A container that sleeps.
fn sleeper(id: &str) -> CreateRequest {
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": ROOT},
        "process": {"cwd": "/", "args": ["/bin/sleep", "1000"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    });
    let spec_json = spec.to_string().into_bytes();
    CreateRequest { container_id: id.to_owned(), spec_json, ..CreateRequest::default() }
}

/// Calls the agent of a machine in which one of its re-executed processes crashes; returns the
/// console.
fn call(life: &str, calls: impl AsyncFnOnce(&mut AgentClient<Channel>)) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut vm = boot(life);
    let stream = vm.open_stream(AGENT_PORT, BOOT).unwrap();
    runtime.block_on(async {
        let mut agent = client(stream).await;
        agent.hello(hello()).await.unwrap();
        calls(&mut agent).await;
    });
    vm.console_text()
}

#[test]
fn a_fault_while_a_container_is_created_is_on_the_console_and_the_agent_goes_on() {
    let console = call("create", async |agent| {
        let status = agent.create(sleeper("one")).await.unwrap_err();
        assert!(status.message().contains("signal 11"), "{status}");
        agent.create(sleeper("two")).await.unwrap();
    });
    assert_trace(&console, "create");
}

#[test]
fn a_fault_while_a_process_joins_a_container_is_on_the_console_and_the_agent_goes_on() {
    let console = call("exec", async |agent| {
        agent.create(sleeper("one")).await.unwrap();
        agent.start(StartRequest { container_id: "one".to_owned() }).await.unwrap();
        let process =
            json!({"cwd": "/", "args": ["/bin/sleep", "1"], "user": {"uid": 0, "gid": 0}});
        let exec = |exec_id: &str| ExecRequest {
            container_id: "one".to_owned(),
            exec_id: exec_id.to_owned(),
            process_json: process.to_string().into_bytes(),
            ..ExecRequest::default()
        };
        let status = agent.exec(exec("two")).await.unwrap_err();
        assert!(status.message().contains("signal 11"), "{status}");
        agent.exec(exec("three")).await.unwrap();
    });
    assert_trace(&console, "exec");
}
