//! Containers: statuses, refusals, limits, signals, what is left behind.

use std::path::Path;

use bulkhead_protocol::agent::{KillRequest, ProcessesRequest};
use serde_json::json;
use tonic::Code;

use crate::guest::Guest;

#[test]
#[ignore = "needs the test host"]
fn a_container_has_its_output_its_status_and_its_own_view() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("hostname; echo $HOME $$; echo oops >&2; ls /etc; exit 3");
        let ran = guest.run_container(&spec, b"").await;
        assert_eq!(ran.stderr, "oops\n");
        assert_eq!(ran.stdout, "box\n/root 1\ndata\npasswd\n");
        assert_eq!(ran.status, 3);
        assert!(!ran.oom);
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_program_that_is_missing_and_one_that_is_none_have_their_codes() {
    Guest::run(async |mut guest| {
        let table = [
            ("absent", Code::NotFound, "exec: \"absent\": executable file not found in $PATH"),
            (
                "/bin/absent",
                Code::NotFound,
                "exec: \"/bin/absent\": stat /bin/absent: no such file or directory",
            ),
            ("/etc/data", Code::PermissionDenied, "exec: \"/etc/data\": permission denied"),
            ("/etc", Code::PermissionDenied, "exec: \"/etc\": is a directory"),
        ];
        for (program, code, words) in table {
            // The same id each time: nothing is left of the previous container.
            let spec = guest.program(&[program]);
            let status = guest.create("one", &spec).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (code, words));
        }
        assert!(!Path::new("/sys/fs/cgroup/containers/one").exists());
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_program_that_the_kernel_refuses_says_so_and_exits_with_1() {
    Guest::run(async |mut guest| {
        let spec = guest.program(&["/bin/broken"]);
        let ran = guest.run_container(&spec, b"").await;
        assert_eq!(ran.stderr, "exec /bin/broken: exec format error\n");
        assert_eq!(ran.status, 1);
    });
}

#[test]
#[ignore = "needs the test host"]
fn what_cannot_be_created_says_why_and_leaves_nothing() {
    Guest::run(async |mut guest| {
        let mut spec = guest.shell("true");
        spec["mounts"][1]["source"] = json!("/nonexistent");
        spec["mounts"][1]["type"] = json!("bind");
        spec["mounts"][1]["options"] = json!(["bind"]);
        let status = guest.create("one", &spec).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("/nonexistent"), "{}", status.message());
        let mut spec = guest.shell("true");
        spec["process"]["terminal"] = json!(true);
        let status = guest.create("one", &spec).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        let status = guest.create("a/b", &spec).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let spec = guest.shell("true");
        guest.create("one", &spec).await.unwrap();
        let status = guest.create("one", &spec).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::AlreadyExists, "container one exists")
        );
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_killed_container_has_128_and_the_signal() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done");
        for (all, signal, expected) in [(false, 9, 137), (true, 9, 137), (false, 15, 7)] {
            guest.create("one", &spec).await.unwrap();
            guest.start_container("one").await.unwrap();
            wait_for_children(&mut guest, "one").await;
            let deleted = guest.delete("one").await.unwrap_err();
            assert_eq!(deleted.message(), "container one is running");
            kill(&mut guest, "one", signal, all).await.unwrap();
            assert_eq!(guest.wait("one").await.exit_status, expected);
            // It can be asked for again, and the container cannot be signalled any more.
            assert_eq!(guest.wait("one").await.exit_status, expected);
            let status = kill(&mut guest, "one", 9, false).await.unwrap_err();
            assert_eq!(status.message(), "container one has ended");
            guest.delete("one").await.unwrap();
            assert!(!Path::new("/sys/fs/cgroup/containers/one").exists());
            assert_eq!(guest.delete("one").await.unwrap_err().code(), Code::NotFound);
        }
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_container_that_was_not_started_can_be_deleted() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("true");
        guest.create("one", &spec).await.unwrap();
        guest.delete("one").await.unwrap();
        guest.create("one", &spec).await.unwrap();
        guest.start_container("one").await.unwrap();
        assert!(guest.start_container("one").await.is_err());
        assert_eq!(guest.wait("one").await.exit_status, 0);
    });
}

#[test]
#[ignore = "needs the test host"]
fn processes_that_outlive_their_init_are_deleted_with_it() {
    Guest::run(async |mut guest| {
        let mut spec = guest.shell("sleep 1000 & exit 5");
        // Without a PID namespace the init does not take the others with it.
        spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]);
        spec["linux"]["readonlyPaths"] = json!([]);
        guest.create("one", &spec).await.unwrap();
        guest.start_container("one").await.unwrap();
        assert_eq!(guest.wait("one").await.exit_status, 5);
        assert_eq!(processes(&mut guest, "one").await.len(), 1);
        guest.delete("one").await.unwrap();
        assert!(!Path::new("/sys/fs/cgroup/containers/one").exists());
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_memory_limit_kills_and_is_told() {
    Guest::run(async |mut guest| {
        let mut spec = guest.shell("tail /dev/zero");
        spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
        let ran = guest.run_container(&spec, b"").await;
        assert_eq!(ran.status, 137, "{}", ran.stderr);
        assert!(ran.oom);
    });
}

#[test]
#[ignore = "needs the test host"]
fn statuses_of_short_lived_containers_are_never_lost() {
    Guest::run(async |mut guest| {
        for number in 0..20_u32 {
            let spec = guest.program(&["sh", "-c", &format!("exit {number}")]);
            guest.create("one", &spec).await.unwrap();
            guest.start_container("one").await.unwrap();
            assert_eq!(guest.wait("one").await.exit_status, number);
            guest.delete("one").await.unwrap();
        }
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_new_network_has_a_loopback_that_is_up_and_nothing_else() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("ip -o link | cut -d' ' -f2,3; ping -c1 -W2 127.0.0.1 >/dev/null");
        let ran = guest.run_container(&spec, b"").await;
        assert!(ran.stdout.starts_with("lo: <LOOPBACK,UP,LOWER_UP>\n"), "{}", ran.stdout);
    });
}

#[test]
#[ignore = "needs the test host"]
fn an_unprivileged_user_can_open_its_streams_again() {
    Guest::run(async |mut guest| {
        let line = "echo $HOME; echo out >/dev/stdout; echo err >/dev/stderr; id -u; \
                    grep CapEff /proc/self/status";
        let mut spec = guest.shell(line);
        spec["process"]["user"] = json!({"uid": 5, "gid": 5});
        let ran = guest.run_container(&spec, b"").await;
        assert_eq!(ran.stderr, "err\n");
        assert_eq!(ran.stdout, "/home/five\nout\n5\nCapEff:\t0000000000000000\n");
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_program_has_its_environment_in_order_and_its_signals_at_their_defaults() {
    Guest::run(async |mut guest| {
        let mut spec = guest.program(&["cat", "/proc/self/environ", "/proc/self/status"]);
        spec["process"]["env"] = json!(["Z=1", "PATH=/bin", "A=2=3", "HOME=/x"]);
        let ran = guest.run_container(&spec, b"").await;
        let (environment, status) = ran.stdout.split_once("Name:").unwrap();
        assert_eq!(environment, "Z=1\0PATH=/bin\0A=2=3\0HOME=/x\0");
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert_eq!(ignored & (1 << (13 - 1)), 0, "the broken-pipe signal is ignored");
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_filter_of_system_calls_holds_with_and_without_new_privileges() {
    Guest::run(async |mut guest| {
        for no_new_privileges in [json!(true), json!(false), json!(null)] {
            let mut spec = guest.shell("mkdir /tmp/x; echo $?; echo still here");
            spec["process"]["noNewPrivileges"] = no_new_privileges;
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]
            });
            let ran = guest.run_container(&spec, b"").await;
            assert!(ran.stderr.contains("Operation not permitted"), "{}", ran.stderr);
            assert_eq!(ran.stdout, "1\nstill here\n");
        }
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_working_directory_that_is_not_there_is_made() {
    Guest::run(async |mut guest| {
        let mut spec = guest.shell("pwd");
        spec["process"]["cwd"] = json!("/made/here");
        assert_eq!(guest.run_container(&spec, b"").await.stdout, "/made/here\n");
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_user_namespace_maps_its_root() {
    Guest::run(async |mut guest| {
        let mut spec = guest.shell("id -u; cat /proc/self/uid_map; echo err >/dev/stderr");
        let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
        let ran = guest.run_container(&spec, b"").await;
        assert_eq!(ran.stdout, "0\n         0     100000      65536\n", "{}", ran.stderr);
        assert_eq!(ran.stderr, "err\n");
    });
}

async fn kill(guest: &mut Guest, id: &str, signal: u32, all: bool) -> Result<(), tonic::Status> {
    let request =
        KillRequest { container_id: id.to_owned(), signal, all, ..KillRequest::default() };
    guest.agent.kill(request).await.map(drop)
}

async fn processes(guest: &mut Guest, id: &str) -> Vec<u32> {
    let request = ProcessesRequest { container_id: id.to_owned() };
    let reply = guest.agent.processes(request).await.unwrap().into_inner();
    reply.processes.iter().map(|process| process.pid).collect()
}

/// Waits until the shell has come to its loop, by when it has set its trap.
async fn wait_for_children(guest: &mut Guest, id: &str) {
    while processes(guest, id).await.len() < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
