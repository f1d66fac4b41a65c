//! The policy of the host: a file that root alone writes, with a section for each name of the
//! runtime.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::{Runtime, told};
use bulkhead_tests::vm::dist;
use serde_json::json;
use tempfile::TempDir;

/// A host's policy, and the program under another name.
struct Host {
    directory: TempDir,
}

impl Host {
    fn with(policy: &str) -> Self {
        let host = Self { directory: TempDir::new().unwrap() };
        fs::write(host.file(), policy).unwrap();
        symlink(dist().join("bin/bulkhead"), host.link()).unwrap();
        host
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("config.toml")
    }

    fn link(&self) -> PathBuf {
        self.directory.path().join("bulkhead-strict")
    }

    /// The runtime by its own name.
    fn plain(&self) -> Runtime {
        Runtime::new().unwrap().with("BULKHEAD_CONFIG", self.file().to_str().unwrap())
    }

    /// The runtime by its other name.
    fn strict(&self) -> Runtime {
        let runtime = Runtime::of(self.link()).unwrap();
        runtime.with("BULKHEAD_CONFIG", self.file().to_str().unwrap())
    }
}

/// The memory that the machine of a container seems to have, in MiB.
fn total_mib(output: &str) -> u64 {
    let line = output.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}

const USE_400: &str = "grep MemTotal /proc/meminfo; cat /sys/fs/cgroup/memory.max
    dd if=/dev/zero of=/dev/null bs=400M count=1 2>/dev/null; echo used $?";

#[test]
fn a_runtime_by_another_name_has_another_cap() {
    let host = Host::with(
        "[size]\nprocessors_max = 1\n\n[runtime.bulkhead-strict]\nsize.memory_max = \"192MiB\"\n",
    );
    let bundle = Bundle::script(USE_400).unwrap();
    let plain = host.plain();
    let (status, output, errors) = told(&plain.run("c", &bundle).unwrap());
    assert_eq!((status, errors.as_str()), (Some(0), ""));
    assert!(output.ends_with("\nmax\nused 0\n") && total_mib(&output) > 1000, "{output}");

    let strict = host.strict();
    let (status, output, errors) = told(&strict.run("c", &bundle).unwrap());
    assert_eq!((status, errors.as_str()), (Some(0), ""));
    assert!((192..340).contains(&total_mib(&output)), "{output}");
    assert!(output.ends_with("\nmax\nused 137\n"), "{output}");
    // A limit of its own is not the policy's.
    let limit = json!({"memory": {"limit": 600 << 20}});
    let limited = Bundle::script(USE_400).unwrap();
    let limited = limited.with(|spec| spec["linux"]["resources"] = limit).unwrap();
    let (_, output, _) = told(&strict.run("limited", &limited).unwrap());
    assert!(output.ends_with("\n629145600\nused 0\n"), "{output}");

    // The option does the same.
    let path = bundle.path().to_str().unwrap();
    let by_option = ["--runtime-name", "bulkhead-strict", "run", "--bundle", path, "c"];
    let output = plain.ok(&by_option).unwrap();
    assert!(output.ends_with("used 137\n"), "{output}");
    for runtime in [plain, strict] {
        runtime.assert_clean().unwrap();
    }
}

#[test]
fn a_container_that_joins_a_pod_follows_the_pods_policy() {
    let host = Host::with("[runtime.bulkhead-strict]\nsize.memory_max = \"192MiB\"\n");
    let strict = host.strict();
    let first = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    strict.create("first", &first).unwrap();
    strict.ok(&["start", "first"]).unwrap();
    let network = format!("/proc/{}/ns/net", strict.state("first").unwrap()["pid"]);
    let joined = Bundle::script("grep MemTotal /proc/meminfo").unwrap();
    let joined = joined
        .with(|spec| {
            for entry in spec["linux"]["namespaces"].as_array_mut().unwrap() {
                if entry["type"] == "network" {
                    entry["path"] = json!(network);
                }
            }
        })
        .unwrap();
    let mut command = host.plain().command(&[]);
    command.args(["--root", strict.root().to_str().unwrap(), "run", "--bundle"]);
    let output = command.arg(joined.path()).arg("second").output().unwrap();
    let (status, output, errors) = told(&output);
    assert_eq!((status, errors.as_str()), (Some(0), ""));
    assert!((384..560).contains(&total_mib(&output)), "{output}");
    strict.ok(&["delete", "--force", "first"]).unwrap();
    strict.assert_clean().unwrap();
}

#[test]
fn a_mistake_keeps_containers_from_being_created_but_not_from_being_ended() {
    let host = Host::with("");
    let (runtime, file) = (host.plain(), host.file());
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create("before", &bundle).unwrap();
    let create = ["create", "--bundle", bundle.path().to_str().unwrap(), "after"];
    for (text, words) in [
        (
            "[size]\nmemory_max = 512\n",
            ":2:14: size.memory_max cannot be 512; write a size such as \\\"2GiB\\\"",
        ),
        ("[size]\nmemory = \"512MiB\"\n", ":2:1: unknown key \\\"memory\\\" in [size]; there are"),
        ("[runtime.x]\nsockets.hosts = true\n", ":2:9: unknown key \\\"hosts\\\" in [sockets]"),
    ] {
        fs::write(&file, text).unwrap();
        for line in [&create[..], &["config"], &["features"]] {
            let errors = runtime.fails(line).unwrap();
            assert_eq!(errors.trim_end().lines().count(), 1, "{errors}");
            assert!(errors.contains(&format!("{}{words}", file.display())), "{errors}");
        }
    }
    runtime.state("before").unwrap();
    runtime.ok(&["start", "before"]).unwrap();
    runtime.ok(&["delete", "--force", "before"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_policy_that_others_may_write_is_refused() {
    let host = Host::with("sockets.host = \"allow\"\n");
    let (runtime, file) = (host.plain(), host.file());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o646)).unwrap();
    let bundle = Bundle::new(&["true"]).unwrap();
    let run = ["run", "--bundle", bundle.path().to_str().unwrap(), "c"];
    let errors = runtime.fails(&run).unwrap();
    let name = file.display();
    let words = format!(
        "cannot trust {name}: others than root may write to {name} (mode 0646); take that away \
         with \\\"chmod go-w {name}\\\""
    );
    assert!(errors.contains(&words), "{errors}");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    std::os::unix::fs::chown(host.directory.path(), Some(1), None).unwrap();
    let errors = runtime.fails(&run).unwrap();
    let directory = host.directory.path().display();
    assert!(errors.contains(&format!("{directory} belongs to user 1; ")), "{errors}");
    runtime.assert_clean().unwrap();
}

#[test]
fn what_is_in_force_is_shown_with_where_it_is_from() {
    let host =
        Host::with("[log]\nlevel = \"info\"\n[runtime.bulkhead-strict.network]\nvhost = false\n");
    let (file, strict) = (host.file(), host.strict().with("BULKHEAD_BOOT_TIMEOUT", "77"));
    let shown = strict.ok(&["config"]).unwrap();
    let file = file.display();
    for (key, from) in [
        ("level = \"info\"", format!("{file}:2")),
        ("vhost = false", format!("{file}:4")),
        ("boot_timeout = 77", "environment, BULKHEAD_BOOT_TIMEOUT".to_owned()),
        ("memory_start = \"128MiB\"", "default".to_owned()),
    ] {
        let line = shown.lines().find(|line| line.starts_with(key));
        assert!(line.is_some_and(|line| line.ends_with(&format!("# {from}"))), "{key}: {shown}");
    }
    // What is shown is a policy itself.
    fs::write(host.file(), format!("{shown}\n[runtime.bulkhead-strict]\n")).unwrap();
    let again = host.strict().ok(&["config"]).unwrap();
    let values = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split('#').next().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(values(&again), values(&shown));
    // A name that somebody has misspelt has no rules at all, rather than those of another.
    let errors = host.plain().fails(&["--runtime-name", "strict", "config"]).unwrap();
    assert!(errors.contains("no section [runtime.strict]"), "{errors}");
}

#[test]
fn a_socket_of_the_host_is_refused_where_the_policy_says_so() {
    let host = Host::with("[runtime.bulkhead-strict]\nsockets.host = \"refuse\"\n");
    let socket = host.directory.path().join("sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let source = socket.to_str().unwrap();
    let bundle = Bundle::script("test -S /host.sock; echo $?").unwrap();
    let mount = json!({"destination": "/host.sock", "source": source, "options": ["bind"]});
    let bundle = bundle.mount(mount).unwrap();
    let (plain, strict) = (host.plain(), host.strict());
    assert_eq!(told(&plain.run("c", &bundle).unwrap()).1, "0\n");
    let (status, _, errors) = told(&strict.run("c", &bundle).unwrap());
    assert_eq!(status, Some(1));
    let words =
        format!("/host.sock is the socket or FIFO {source} of the host, which the policy does not");
    assert!(errors.contains(&words), "{errors}");
    for runtime in [plain, strict] {
        runtime.assert_clean().unwrap();
    }
}

/// Connects to a server of the host, then to one of its own in the same directory.
const CONNECT: &str = r#"
import errno, socket
def connect(path):
    try: socket.socket(socket.AF_UNIX).connect(path); return "connected"
    except OSError as error: return errno.errorcode[error.errno]
server = socket.socket(socket.AF_UNIX)
server.bind("/s/own")
server.listen()
print(connect("/s/sock"), connect("/s/own"))
"#;

#[test]
fn sockets_in_a_directory_are_the_pods_own_where_the_policy_says_so() {
    let host = Host::with("[runtime.bulkhead-strict]\nsockets.host = \"refuse\"\n");
    let (plain, strict) = (host.plain(), host.strict());
    for (runtime, expected) in
        [(plain, "connected connected\n"), (strict, "ECONNREFUSED connected\n")]
    {
        let directory = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(directory.path().join("sock")).unwrap();
        let bundle = Bundle::new(&["/usr/bin/python3", "-c", CONNECT]).unwrap();
        let bundle = bundle.with_usr_of_the_host().unwrap();
        let bundle = bundle.mount(bind(directory.path(), "/s", &["rbind"])).unwrap();
        assert_eq!(told(&runtime.run("c", &bundle).unwrap()).1, expected);
        runtime.assert_clean().unwrap();
    }
}
