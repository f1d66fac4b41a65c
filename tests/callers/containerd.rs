//! Debian's containerd: its shim for runc calls Bulkhead.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::cni::PLUGINS;
use bulkhead_tests::runtime::{end, output, told};
use bulkhead_tests::vm::dist;
use tempfile::TempDir;

use super::{PATIENCE, wait_for_nothing, wait_until};

/// A daemon in a directory of its own; dropping it ends it.
struct Containerd {
    directory: TempDir,
    daemon: Child,
}

impl Containerd {
    fn start() -> Self {
        let directory = TempDir::with_prefix("containerd-").unwrap();
        let path = |name: &str| directory.path().join(name);
        // The plugin for Kubernetes is not needed.
        let config = "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
        fs::write(path("config.toml"), config).unwrap();
        let log = File::create(path("log")).unwrap();
        let mut command = Command::new("/usr/bin/containerd");
        command.arg("--config").arg(path("config.toml")).arg("--root").arg(path("root"));
        command.arg("--state").arg(path("state")).arg("--address").arg(path("socket"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = command.spawn().unwrap();
        let containerd = Self { directory, daemon };
        wait_until(|| containerd.ctr(&["version"]).status.success());
        containerd
    }

    fn ctr(&self, line: &[&str]) -> Output {
        let mut command = Command::new("/usr/bin/ctr");
        command.arg("--address").arg(self.directory.path().join("socket"));
        output(command.args(line).stdin(Stdio::null())).unwrap()
    }

    /// The standard output of a command that must succeed.
    fn ok(&self, line: &[&str]) -> String {
        let output = self.ctr(line);
        let log = || fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        assert!(output.status.success(), "{line:?}: {output:?}\n{}", log());
        told(&output).1
    }

    /// Runs `ctr run` with Bulkhead and a root file system that containerd does not manage.
    fn run(&self, options: &[&str], rootfs: &Path, rest: &[&str]) -> Output {
        let runtime = dist().join("bin/bulkhead");
        let fixed = ["run", "--runc-binary", runtime.to_str().unwrap(), "--rootfs"];
        let rootfs = rootfs.to_str().unwrap();
        self.ctr(&[&fixed[..], options, &[rootfs], rest].concat())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        end(&mut self.daemon, PATIENCE);
    }
}

#[test]
fn a_task_does_what_containerd_asks() {
    let containerd = Containerd::start();
    let bundle = Bundle::new(&["true"]).unwrap();
    let script = ["short", "/bin/sh", "-c", "uname -r; echo err >&2; exit 7"];
    let (status, out, errors) = told(&containerd.run(&["--rm"], &bundle.rootfs(), &script));
    assert_eq!(status, Some(7), "{errors}");
    assert!(out.contains("-bulkhead") && errors.contains("err"), "{out} {errors}");

    let script = "trap 'exit 5' TERM; echo up > /root/up; while :; do sleep 0.1; done";
    let rest = ["long", "/bin/sh", "-c", script];
    let started =
        containerd.run(&["--detach", "--memory-limit", "67108864"], &bundle.rootfs(), &rest);
    assert!(started.status.success(), "{started:?}");
    wait_until(|| bundle.rootfs().join("root/up").exists());
    let exec = ["tasks", "exec", "--exec-id", "one", "long", "/bin/sh", "-c", "echo in; exit 3"];
    let (status, out, errors) = told(&containerd.ctr(&exec));
    assert_eq!((status, out.as_str()), (Some(3), "in\n"), "{errors}");
    assert!(containerd.ok(&["tasks", "metrics", "long"]).contains("memory.usage"));
    containerd.ok(&["tasks", "pause", "long"]);
    assert!(containerd.ok(&["tasks", "list"]).contains("PAUSED"));
    containerd.ok(&["tasks", "resume", "long"]);
    assert!(containerd.ok(&["tasks", "list"]).contains("RUNNING"));
    assert!(containerd.ok(&["tasks", "ps", "long"]).lines().count() > 1);
    containerd.ok(&["tasks", "kill", "long"]);
    wait_until(|| containerd.ok(&["tasks", "list"]).contains("STOPPED"));
    let deleted = containerd.ctr(&["tasks", "delete", "long"]);
    assert!(told(&deleted).2.contains("exit code 5"), "{deleted:?}");
    containerd.ok(&["containers", "delete", "long"]);
    wait_for_nothing(containerd.directory.path());
}

/// The network that `ctr run --cni` has plugins make, after it has created the container.
const NETWORK: &str = r#"{
    "cniVersion": "0.4.0", "name": "net", "plugins": [
        {"type": "bridge", "bridge": "ctr0", "isGateway": true, "ipMasq": true, "ipam": {
            "type": "host-local", "subnet": "10.46.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}}
    ]
}"#;

/// Where containerd looks for networks and for plugins.
const CONFIGURATION: &str = "/etc/cni/net.d/10-net.conflist";
const LOOKED_FOR: &str = "/opt/cni/bin";

/// A network configuration for the whole host. It is removed when this is dropped, because Podman
/// does not use netavark where it finds one.
struct Configured;

impl Configured {
    fn new() -> Self {
        for directory in ["/etc/cni/net.d", "/opt/cni"] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(CONFIGURATION, NETWORK).unwrap();
        symlink(PLUGINS, LOOKED_FOR).unwrap();
        Self
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        for file in [CONFIGURATION, LOOKED_FOR] {
            let _ = fs::remove_file(file);
        }
        // The plugins leave their bridge behind.
        let _ = Command::new("ip").args(["link", "delete", "ctr0"]).status();
    }
}

#[test]
fn a_task_has_the_network_that_plugins_make_for_it() {
    let _configured = Configured::new();
    let containerd = Containerd::start();
    let look = "ip -o -4 address show dev eth0 | sed 's/^[0-9]*: //;s/10.46.0.[0-9]*/10.46.0.n/'; \
        ip route | sed 's/src .*//'; ping -c 1 -W 30 10.46.0.1 >/dev/null && echo reached";
    let bundle = Bundle::new(&["true"]).unwrap();
    let ours = dist().join("bin/bulkhead");
    let [theirs, ours] = ["/usr/sbin/runc", ours.to_str().unwrap()].map(|runtime| {
        let options = ["run", "--rm", "--cni", "--runc-binary", runtime, "--rootfs"];
        let rootfs = bundle.rootfs();
        let rest = [rootfs.to_str().unwrap(), "looks", "/bin/sh", "-c", look];
        told(&containerd.ctr(&[&options[..], &rest].concat()))
    });
    assert!(theirs.1.ends_with("reached\n"), "{theirs:?}");
    assert_eq!(ours, theirs);
    wait_for_nothing(containerd.directory.path());
}
