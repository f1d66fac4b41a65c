//! Starts an agent and dials it; makes root file systems and specifications for its containers.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io};

use bulkhead_protocol::agent::agent_client::AgentClient;
use bulkhead_protocol::agent::{
    CreateRequest, DeleteRequest, StartRequest, Streams, WaitReply, WaitRequest,
};
use bulkhead_protocol::{AGENT_PORT, STREAM_PORT, StreamHeader};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_vsock::{VMADDR_CID_LOCAL, VsockAddr, VsockStream};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// The ports are the machine's, so one agent runs at a time.
static ONE: Mutex<()> = Mutex::new(());

/// An agent, its connection, and a directory that its containers' files are in.
pub(crate) struct Guest {
    pub(crate) agent: AgentClient<Channel>,
    files: tempfile::TempDir,
    process: Child,
}

impl Guest {
    /// Runs a test against a fresh agent.
    pub(crate) fn run<F>(test: F)
    where
        F: AsyncFnOnce(Self),
    {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let guest = Self::start().await;
            tokio::time::timeout(Duration::from_secs(120), test(guest)).await.unwrap();
        });
    }

    async fn start() -> Self {
        // Below a directory that the agent does not mount over.
        let files = tempfile::tempdir_in("/var/tmp").unwrap();
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(files.path(), open).unwrap();
        make_root(&files.path().join("rootfs"));
        let process = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--uts", "--"])
            .arg(env!("CARGO_BIN_EXE_bulkhead-agent"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let agent = AgentClient::new(connect().await);
        Self { agent, files, process }
    }

    /// The root file system that containers have.
    pub(crate) fn root(&self) -> PathBuf {
        self.files.path().join("rootfs")
    }

    /// A specification that runs a shell command line.
    pub(crate) fn shell(&self, line: &str) -> Value {
        self.program(&["sh", "-c", line])
    }

    /// A specification that runs a program in namespaces of its own.
    pub(crate) fn program(&self, arguments: &[&str]) -> Value {
        let capabilities = ["CAP_KILL", "CAP_CHOWN"];
        let namespaces: Vec<Value> = ["pid", "mount", "uts", "ipc", "network", "cgroup"]
            .iter()
            .map(|kind| json!({"type": kind}))
            .collect();
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": self.root()},
            "hostname": "box",
            "process": {
                "cwd": "/", "args": arguments, "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0}, "noNewPrivileges": true,
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                }
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "mode=755", "size=64k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["nosuid", "noexec", "nodev", "ro"]}
            ],
            "linux": {
                "namespaces": namespaces,
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "maskedPaths": ["/proc/kcore", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys"]
            }
        })
    }

    /// Creates a container without streams.
    pub(crate) async fn create(&mut self, id: &str, spec: &Value) -> Result<u32, Status> {
        self.create_with(id, spec, Streams::default()).await
    }

    /// Creates a container with the streams that the headers name.
    pub(crate) async fn create_with(
        &mut self,
        id: &str,
        spec: &Value,
        streams: Streams,
    ) -> Result<u32, Status> {
        let request = CreateRequest {
            container_id: id.to_owned(),
            spec_json: serde_json::to_vec(spec).unwrap(),
            streams: Some(streams),
            ..CreateRequest::default()
        };
        self.agent.create(request).await.map(|reply| reply.into_inner().pid)
    }

    pub(crate) async fn start_container(&mut self, id: &str) -> Result<(), Status> {
        self.agent.start(StartRequest { container_id: id.to_owned() }).await.map(drop)
    }

    pub(crate) async fn wait(&mut self, id: &str) -> WaitReply {
        let request = WaitRequest { container_id: id.to_owned(), ..WaitRequest::default() };
        self.agent.wait(request).await.unwrap().into_inner()
    }

    pub(crate) async fn delete(&mut self, id: &str) -> Result<(), Status> {
        self.agent.delete(DeleteRequest { container_id: id.to_owned() }).await.map(drop)
    }

    /// Sends the agent a signal.
    pub(crate) fn signal(&self, name: &str) {
        let parent = self.process.id();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        for agent in children.unwrap().split_whitespace() {
            Command::new("kill").args(["-s", name, agent]).status().unwrap();
        }
    }

    /// Runs a container with `input` to its end; returns how it ended and what it wrote.
    pub(crate) async fn run_container(&mut self, spec: &Value, input: &[u8]) -> Ran {
        let [mut stdin, mut stdout, mut stderr] = [open(1).await, open(2).await, open(3).await];
        let streams = Streams {
            stdin: header(1).to_vec(),
            stdout: header(2).to_vec(),
            stderr: header(3).to_vec(),
            terminal: None,
        };
        self.create_with("ran", spec, streams).await.unwrap();
        self.start_container("ran").await.unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let feed = async {
            // The program need not read it all.
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown(std::net::Shutdown::Write);
        };
        let (_, read_out, read_err) =
            tokio::join!(feed, stdout.read_to_end(&mut out), stderr.read_to_end(&mut err));
        read_out.unwrap();
        read_err.unwrap();
        let end = self.wait("ran").await;
        self.delete("ran").await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran {
            status: end.exit_status,
            oom: end.oom_killed,
            stdout: text(&out),
            stderr: text(&err),
            bytes: out,
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Killed before `unshare`, which then waits for it: the ports are free when that has ended.
        self.signal("KILL");
        self.process.wait().unwrap();
    }
}

/// How a container ended and what it wrote.
pub(crate) struct Ran {
    pub(crate) status: u32,
    pub(crate) oom: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) bytes: Vec<u8>,
}

/// The header of the stream with this number.
pub(crate) fn header(number: u8) -> [u8; StreamHeader::LEN] {
    [number; StreamHeader::LEN]
}

/// Opens the stream with this number.
pub(crate) async fn open(number: u8) -> VsockStream {
    let mut stream = dial(STREAM_PORT).await.unwrap();
    stream.write_all(&header(number)).await.unwrap();
    stream
}

/// Connects to a port of the agent.
pub(crate) async fn dial(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_LOCAL, port)).await
}

async fn connect() -> Channel {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let connector = tower::service_fn(|_| async { dial(AGENT_PORT).await.map(TokioIo::new) });
        let endpoint = Endpoint::from_static("http://agent");
        match endpoint.connect_with_connector(connector).await {
            Ok(channel) => return channel,
            Err(error) => assert!(Instant::now() < deadline, "agent does not answer: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A root file system with busybox and a few files that are no programs.
fn make_root(root: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let linked = Command::new("/bin/busybox").args(["--list"]).output().unwrap();
    for name in String::from_utf8(linked.stdout).unwrap().lines().filter(|name| *name != "busybox")
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nfive:x:5:5::/home/five:\n")
        .unwrap();
    fs::write(root.join("etc/data"), "not a program\n").unwrap();
    fs::write(root.join("bin/broken"), "\u{1}not a program either\n").unwrap();
    fs::set_permissions(root.join("bin/broken"), fs::Permissions::from_mode(0o755)).unwrap();
}
