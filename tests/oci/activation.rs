//! systemd's protocols for services, beside runc: readiness notification (sd_notify) and passed
//! descriptors (socket activation).

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, finish, message, output, told};
use bulkhead_tests::tools;
use tempfile::TempDir;

fn both() -> [Runtime; 2] {
    [Runtime::new().unwrap(), Runtime::runc().unwrap()]
}

/// Takes the place of systemd: has the socket that `NOTIFY_SOCKET` names.
struct Systemd {
    directory: TempDir,
    socket: UnixDatagram,
}

impl Systemd {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { directory, socket }
    }

    fn start(&self, mut command: Command) -> std::process::Child {
        command.env("NOTIFY_SOCKET", self.directory.path().join("notify"));
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Receives the next message. A descriptor that comes with it is closed; a barrier waits for
    /// that.
    fn hear(&self) -> String {
        let mut bytes = [0; 4096];
        let count = self.socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..count].to_vec()).unwrap()
    }

    /// Expects the messages that a container is ready and which process systemd should follow: the
    /// container's, or `stays` if its caller stays.
    fn hears_that_it_is_ready(&self, runtime: &Runtime, stays: Option<u32>) {
        assert_eq!(self.hear(), "READY=1\n");
        let own = || runtime.state("ready").unwrap()["pid"].as_u64().unwrap();
        let pid = stays.map_or_else(own, u64::from);
        assert_eq!(self.hear(), format!("MAINPID={pid}\n"));
        // runc sends a barrier since 1.2.
        if !runtime.is_runc() {
            assert_eq!(self.hear(), "BARRIER=1");
        }
    }

    fn hears_nothing(&self) -> bool {
        self.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        self.socket.recv(&mut [0; 16]).is_err()
    }
}

/// A container that reports its status and then that it is ready.
fn says_so() -> Bundle {
    // `--no-block`, because under runc nobody reads the barrier that is sent without it.
    let script = "test -S /run/notify/notify.sock && systemd-notify --no-block --status=starting; \
                  systemd-notify --no-block --ready; exec sleep 1000";
    tools::bundle(script).unwrap()
}

#[test]
fn whoever_starts_a_container_tells_systemd_that_it_is_ready() {
    let [ours, runc] = both();
    for runtime in [&runc, &ours] {
        let (systemd, bundle) = (Systemd::new(), says_so());
        let path = bundle.path().to_str().unwrap();
        let created = systemd.start(runtime.command(&["create", "--bundle", path, "ready"]));
        assert!(finish(created).unwrap().status.success());
        let mut started = systemd.start(runtime.command(&["start", "ready"]));
        systemd.hears_that_it_is_ready(runtime, None);
        assert!(started.wait().unwrap().success());
        runtime.ok(&["delete", "--force", "ready"]).unwrap();
    }
    ours.assert_clean().unwrap();
}

#[test]
fn run_tells_it_too_in_the_background_and_in_the_foreground() {
    let [ours, runc] = both();
    for runtime in [&runc, &ours] {
        let (systemd, bundle) = (Systemd::new(), says_so());
        let path = bundle.path().to_str().unwrap();
        let mut run = systemd.start(runtime.command(&["run", "-d", "--bundle", path, "ready"]));
        systemd.hears_that_it_is_ready(runtime, None);
        assert!(run.wait().unwrap().success());
        runtime.ok(&["delete", "--force", "ready"]).unwrap();

        let mut run = systemd.start(runtime.command(&["run", "--bundle", path, "ready"]));
        systemd.hears_that_it_is_ready(runtime, Some(run.id()));
        runtime.ok(&["kill", "ready", "KILL"]).unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(137));
    }
    ours.assert_clean().unwrap();
}

#[test]
fn a_container_that_never_says_so_is_not_waited_for_beyond_its_end() {
    // Not compared with runc: runc 1.1 waits until the container is gone from /proc, where it stays
    // as a zombie child of runc.
    let ours = Runtime::new().unwrap();
    let systemd = Systemd::new();
    let bundle = Bundle::script("echo $NOTIFY_SOCKET > /root/where; sleep 1").unwrap();
    let path = bundle.path().to_str().unwrap();
    let run = systemd.start(ours.command(&["run", "-d", "--bundle", path, "silent"]));
    assert!(finish(run).unwrap().status.success());
    ours.wait_for_status("silent", "stopped").unwrap();
    assert!(systemd.hears_nothing());
    let path = std::fs::read_to_string(bundle.rootfs().join("root/where")).unwrap();
    assert_eq!(path, "/run/notify/notify.sock\n");
    ours.ok(&["delete", "silent"]).unwrap();
    ours.assert_clean().unwrap();
}

/// A command as systemd starts it, with this one descriptor passed.
fn activated(command: &Command, descriptor: impl Into<OwnedFd>) -> Command {
    let script = "exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(command.get_program()).args(command.get_args());
    shell.stdin(Stdio::from(descriptor.into()));
    shell
}

#[test]
fn descriptors_of_systemd_are_passed_on_or_refused() {
    let [ours, runc] = both();
    let script = "cat <&3; echo $LISTEN_FDS $LISTEN_PID $$";
    for runtime in [&runc, &ours] {
        let bundle = Bundle::script(script).unwrap();
        let (reader, mut writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut writer, b"through\n").unwrap();
        drop(writer);
        let mut command = activated(&runtime.run_command("passed", &bundle), reader);
        let called = output(&mut command).unwrap();
        assert_eq!(told(&called), (Some(0), "through\n1 1 1\n".to_owned(), String::new()));
    }
    let bundle = Bundle::script(script).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = activated(&ours.run_command("listens", &bundle), listener);
    let (status, _, err) = told(&output(&mut command).unwrap());
    let words = message(&err);
    assert_eq!(status, Some(1), "{words}");
    assert!(words.starts_with("socket activation (LISTEN_FDS=1): descriptor 3 is "), "{words}");
    ours.assert_clean().unwrap();
}
