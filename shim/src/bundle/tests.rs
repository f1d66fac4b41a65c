//! Bundles as callers make them, good and bad.

use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use super::*;
use crate::policy::Policy;

const HOST: HostSize = HostSize { cpus: 4, memory_mib: 2048 };

struct TestBundle(tempfile::TempDir);

impl TestBundle {
    fn with(config: &Value) -> Self {
        let bundle = Self(tempfile::tempdir().unwrap());
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        fs::write(bundle.path().join(CONFIG), serde_json::to_vec(config).unwrap()).unwrap();
        bundle
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn plan(&self) -> Result<ContainerPlan, BundleError> {
        let bundle = read(self.path())?;
        bundle.check(Path::new("/nonexistent"))?;
        let surroundings = Surroundings {
            directory: "0".into(),
            brings_up_the_pod: true,
            ..Surroundings::default()
        };
        bundle.plan(&"c1".parse().unwrap(), &surroundings)
    }

    fn guest_spec(&self) -> Value {
        serde_json::from_slice(&self.plan().unwrap().spec_json).unwrap()
    }
}

fn good() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "hostname": "inner",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
            {"type": "network"}
        ]}
    })
}

fn words(error: BundleError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

#[test]
fn a_directory_without_config_says_what_is_missing() {
    let empty = tempfile::tempdir().unwrap();
    let words = words(read(empty.path()).unwrap_err());
    assert!(words.starts_with("JSON specification file config.json not found in /"), "{words}");
    assert!(words.contains("bulkhead spec"), "{words}");
    let words = self::words(read(&empty.path().join("no")).unwrap_err());
    assert!(words.contains("bundle directory") && words.contains("No such file"), "{words}");
}

#[test]
fn invalid_json_is_shown_with_path_line_and_column() {
    let bundle = TestBundle::with(&good());
    fs::write(bundle.path().join(CONFIG), "{\n  \"ociVersion\": 1.0.2\n}").unwrap();
    let words = words(read(bundle.path()).unwrap_err());
    assert!(words.contains("config.json") && words.contains("at line 2 column"), "{words}");
}

#[test]
fn a_field_of_the_wrong_type_is_shown_with_its_place() {
    let mut config = good();
    config["process"]["args"] = json!("true");
    let words = words(TestBundle::with(&config).plan().unwrap_err());
    assert!(words.contains("invalid type: string \"true\", expected a sequence"), "{words}");
    assert!(words.contains("line 1 column"), "{words}");
}

#[test]
fn a_config_that_is_too_large_is_not_read() {
    let bundle = TestBundle::with(&good());
    let file = fs::File::create(bundle.path().join(CONFIG)).unwrap();
    file.set_len(CONFIG_BYTES_MAX + 1).unwrap();
    assert!(words(read(bundle.path()).unwrap_err()).contains("bytes; at most"));
}

#[test]
fn a_missing_rootfs_is_named() {
    let mut config = good();
    config["root"]["path"] = json!("nosuch");
    let bundle = TestBundle::with(&config);
    let words = words(bundle.plan().unwrap_err());
    assert!(words.starts_with("cannot use rootfs /") && words.contains("/nosuch: "), "{words}");
    fs::write(bundle.path().join("nosuch"), "").unwrap();
    let words = self::words(bundle.plan().unwrap_err());
    assert!(words.contains("not a directory"), "{words}");
}

#[test]
fn what_cannot_be_kept_is_refused_in_words() {
    for (pointer, value, expected) in [
        ("/process", Value::Null, "config.json has no process"),
        ("/process/args", json!([]), "process.args is empty"),
        ("/process/cwd", json!("tmp"), "not an absolute path"),
        ("/root", Value::Null, "config.json has no root"),
        ("/linux", Value::Null, "no linux section"),
        ("/linux/namespaces", json!([]), "no \"network\" entry"),
        ("/linux/intelRdt", json!({"closID": "a"}), "linux.intelRdt"),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "SCMP_ACT_NOTIFY"),
        ("/linux/resources", json!({"rdma": {"mlx": {"hcaHandles": 1}}}), "rdma"),
        (
            "/linux/personality",
            json!({"domain": "LINUX32", "flags": ["ADDR_NO_RANDOMIZE"]}),
            "linux.personality.flags",
        ),
        ("/linux/memoryPolicy", json!({"mode": "MPOL_BIND"}), "linux.memoryPolicy"),
        ("/linux/timeOffsets", json!({"monotonic": {"secs": 1}}), "linux.timeOffsets"),
        (
            "/annotations",
            json!({"run.oci.keep_original_groups": "1"}),
            "annotation run.oci.keep_original_groups",
        ),
        ("/process/execCPUAffinity", json!({"initial": "0"}), "execCPUAffinity"),
        (
            "/mounts",
            json!([{"destination": "/m", "type": "bind", "source": "/", "options": ["idmap"]}]),
            "the mount at /m maps owners without mappings",
        ),
    ] {
        let mut config = good();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[key] = value;
        let words = words(TestBundle::with(&config).plan().unwrap_err());
        assert!(words.contains(expected), "{pointer}: {words}");
        assert!(words.contains("; "), "{pointer} says what to do: {words}");
    }
}

#[test]
fn the_guest_sees_paths_of_the_share() {
    let bundle = TestBundle::with(&good());
    let spec = bundle.guest_spec();
    assert_eq!(spec["root"]["path"], "/run/bulkhead/share/0/rootfs");
    assert_eq!(spec["linux"]["cgroupsPath"], "/c1");
    assert_eq!(spec["mounts"][0]["source"], "proc");
    let kept: Vec<_> = spec["linux"]["namespaces"].as_array().unwrap().iter().collect();
    assert!(kept.iter().all(|entry| entry["type"] != "network"), "{kept:?}");
    assert_eq!(kept.len(), 4);
}

#[test]
fn bind_mounts_are_shared_with_their_kind_and_mode() {
    let bundle = TestBundle::with(&good());
    fs::create_dir(bundle.path().join("data")).unwrap();
    fs::write(bundle.path().join("file"), "").unwrap();
    let file = bundle.path().join("file");
    let mut config = good();
    config["mounts"] = json!([
        {"destination": "/a", "type": "bind", "source": "data", "options": ["rbind", "ro", "rw"]},
        {"destination": "/b", "type": "none", "source": file, "options": ["bind", "ro"]},
        {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
        {"destination": "/c", "source": "data", "options": ["rbind", "rro"]},
        {"destination": "/d", "source": "/", "options": ["rbind", "ro", "nosuid"]},
    ]);
    fs::write(bundle.path().join(CONFIG), serde_json::to_vec(&config).unwrap()).unwrap();
    let shared = bundle.plan().unwrap().shared;
    assert_eq!(shared.len(), 5);
    assert_eq!(shared[0].target, Path::new("rootfs"));
    let seen = |n: usize| (shared[n].kind, shared[n].read_only, shared[n].recursive);
    assert_eq!(seen(1), (FileKind::Directory, false, true));
    assert_eq!(seen(2), (FileKind::File, true, false));
    let (target, name) = (&shared[2].target, bundle.path().file_name().unwrap());
    assert!(target.starts_with("mounts/1"), "{}", target.display());
    assert!(target.ends_with(Path::new(name).join("file")), "{}", target.display());
    let read_only = |n: usize| (shared[n].read_only, shared[n].read_only_below);
    assert_eq!((read_only(3), read_only(4)), ((true, true), (true, false)));
    let spec = bundle.guest_spec();
    assert_eq!(spec["mounts"][0]["source"], "/run/bulkhead/share/0/mounts/0");
    assert_eq!(spec["mounts"][1]["options"], json!(["bind", "ro"]));
    assert_eq!(spec["mounts"][2]["source"], "tmpfs");
    assert_eq!(spec["mounts"][3]["options"], json!(["rbind", "rro"]));
    assert_eq!(spec["mounts"][4]["options"], json!(["rbind", "nosuid"]));
}

#[test]
fn a_bind_mount_without_a_source_is_named() {
    let mut config = good();
    config["mounts"] = json!([{"destination": "/a", "type": "bind", "source": "/nosuch"}]);
    let words = words(TestBundle::with(&config).plan().unwrap_err());
    assert!(words.starts_with("cannot use source of a bind mount /nosuch"), "{words}");
}

#[test]
fn what_only_means_something_on_the_host_is_dropped_and_reported() {
    let mut config = good();
    config["process"]["apparmorProfile"] = json!("docker-default");
    config["linux"]["mountLabel"] = json!("system_u:object_r:a:s0");
    config["linux"]["resources"] = json!({"cpu": {"cpus": "2-3"}, "pids": {"limit": 5}});
    config["hooks"] = json!({"poststop": [{"path": "/p"}], "startContainer": [{"path": "/s"}]});
    let bundle = TestBundle::with(&config);
    let plan = bundle.plan().unwrap();
    assert_eq!(plan.dropped.len(), 2, "{:?}", plan.dropped);
    assert!(plan.hooks.poststop().is_some());
    let spec = bundle.guest_spec();
    assert!(spec["process"].get("apparmorProfile").is_none());
    assert!(spec["hooks"].get("poststop").is_none());
    assert_eq!(spec["hooks"]["startContainer"][0]["path"], "/s");
    assert_eq!(spec["linux"]["resources"]["pids"]["limit"], 5);
    assert!(spec["linux"]["resources"]["cpu"].get("cpus").is_none());
}

#[test]
fn what_is_the_pods_is_planned_apart() {
    let mut config = good();
    config["linux"]["resources"] = json!({"cpu": {"cpus": "2-3"}});
    config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "5"});
    let resolv_conf =
        json!({"destination": "/etc/resolv.conf", "type": "bind", "source": "/dev/null"});
    config["mounts"].as_array_mut().unwrap().push(resolv_conf);
    let bundle = TestBundle::with(&config);
    let pod = PodPlan::of(&read(bundle.path()).unwrap(), HOST, &Policy::default());
    assert_eq!((pod.hostname.as_str(), pod.size.vcpus, pod.most.vcpus), ("inner", 2, 4));
    assert_eq!(pod.network, Network::New);
    assert_eq!(pod.resolv_conf.as_deref(), Some(Path::new("/dev/null")));
    assert_eq!(
        pod.sysctls.into_iter().collect::<Vec<_>>(),
        [("net.ipv4.ip_forward".into(), "1".into())]
    );
    // The container that starts the pod leaves net sysctls to the pod; one that joins keeps its
    // own.
    assert_eq!(bundle.guest_spec()["linux"]["sysctl"], json!({"kernel.shmmax": "5"}));
    let joined = Surroundings::default();
    let plan = read(bundle.path()).unwrap().plan(&"c2".parse().unwrap(), &joined).unwrap();
    let spec: Value = serde_json::from_slice(&plan.spec_json).unwrap();
    assert_eq!(spec["linux"]["sysctl"], config["linux"]["sysctl"]);
}

#[test]
fn a_container_inherits_the_limits_of_its_creator() {
    let mut config = good();
    config["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}]);
    let bundle = TestBundle::with(&config);
    let limits = json!([
        {"type": "RLIMIT_CORE", "soft": 7, "hard": 7}, {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}
    ]);
    let surroundings =
        Surroundings { limits: serde_json::from_value(limits).unwrap(), ..Surroundings::default() };
    let plan = read(bundle.path()).unwrap().plan(&"c".parse().unwrap(), &surroundings).unwrap();
    let spec: Value = serde_json::from_slice(&plan.spec_json).unwrap();
    let expected = json!([
        {"type": "RLIMIT_CORE", "soft": 1, "hard": 2}, {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}
    ]);
    assert_eq!(spec["process"]["rlimits"], expected);
}

#[test]
fn the_program_of_a_hook_that_runs_in_the_guest_is_shared() {
    let mut config = good();
    config["hooks"] = json!({"createContainer": [
        {"path": "/bin/sh", "args": ["sh"]}, {"path": "/bin/busybox"}, {"path": "/bin/busybox", "args": ["a"]}
    ]});
    let bundle = TestBundle::with(&config);
    let plan = bundle.plan().unwrap();
    let targets: Vec<_> = plan.shared.iter().map(|shared| shared.target.as_path()).collect();
    assert!(targets.ends_with(&["hooks/1".as_ref(), "hooks/2".as_ref()]), "{targets:?}");
    let hooks = &bundle.guest_spec()["hooks"]["createContainer"];
    assert_eq!(hooks[0]["path"], "/bin/sh");
    assert!(hooks[1]["path"].as_str().unwrap().ends_with("/hooks/1"), "{hooks}");
    assert_eq!((&hooks[1]["args"], &hooks[2]["args"]), (&json!(["/bin/busybox"]), &json!(["a"])));
}

#[test]
fn a_rootfs_behind_a_link_is_found() {
    let bundle = TestBundle::with(&good());
    let real = tempfile::tempdir().unwrap();
    fs::remove_dir(bundle.path().join("rootfs")).unwrap();
    symlink(real.path(), bundle.path().join("rootfs")).unwrap();
    assert_eq!(bundle.plan().unwrap().rootfs, fs::canonicalize(real.path()).unwrap());
}

#[test]
fn the_specification_that_runc_writes_is_taken() {
    let config = serde_json::to_value(crate::cli::spec::default_spec()).unwrap();
    TestBundle::with(&config).plan().unwrap();
}

#[test]
fn sockets_and_fifos_of_the_host_are_relayed_or_refused_by_policy() {
    let host = tempfile::tempdir().unwrap();
    let socket = host.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    symlink("socket", host.path().join("link")).unwrap();
    let mut config = good();
    let source = host.path().join("link");
    let mount = json!({
        "destination": "/run/s", "type": "bind", "source": source, "options": ["rbind", "ro"],
    });
    config["mounts"].as_array_mut().unwrap().push(mount);
    let bundle = TestBundle::with(&config);
    let plan = bundle.plan().unwrap();
    assert_eq!((plan.shared.len(), plan.host_sockets.len()), (1, 1));
    assert_eq!(plan.host_sockets[0].source, source);
    let mounted = &bundle.guest_spec()["mounts"][1];
    assert_eq!(mounted["source"], "/run/bulkhead/sockets/c1/0");
    assert_eq!(mounted["options"], json!(["rbind", "ro"]));
    let policy = |host| SocketPolicy { host };
    let checked = |host| read(bundle.path()).unwrap().check_sockets(policy(host));
    checked(HostSocketRule::Allow).unwrap();
    let words = words(checked(HostSocketRule::Refuse).unwrap_err());
    assert!(words.starts_with("mounts: /run/s is the socket or FIFO /"), "{words}");
    assert!(words.ends_with("use a runtime whose policy allows it"), "{words}");
}
