//! Unit tests of what is checked and changed in a specification.

use serde_json::{Value, json};

use super::*;

fn minimal() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "/nonexistent"},
        "process": {
            "cwd": "/", "args": ["true"], "env": ["PATH=/bin"], "user": {"uid": 5, "gid": 5}
        },
        "linux": {"cgroupsPath": "/elsewhere", "namespaces": [{"type": "network"}]}
    })
}

fn prepared(spec: &Value) -> Result<Prepared, SpecError> {
    prepare("one", &serde_json::to_vec(spec).unwrap(), false, Vec::new())
}

#[test]
fn ids_are_what_other_runtimes_accept() {
    for id in ["a", "A.b_c+d-0,1", "...", &"x".repeat(255)] {
        assert!(check_id(id).is_ok(), "{id}");
    }
    for id in ["", ".", "..", "a/b", "a b", "ä", "a\0", &"x".repeat(256)] {
        assert!(check_id(id).is_err(), "{id}");
    }
}

#[test]
fn a_further_process_has_the_containers_limits_and_restrictions() {
    let mut spec = minimal();
    spec["process"]["capabilities"] = json!({"bounding": ["CAP_KILL"]});
    let Prepared { spec, restrictions, .. } = prepared(&spec).unwrap();
    let further = json!({"cwd": "/", "args": ["true"], "user": {"uid": 7, "gid": 7}});
    let further = serde_json::to_vec(&further).unwrap();
    let further = prepare_process((&spec, &restrictions), &further, false).unwrap();
    let of_container = spec.process().as_ref().unwrap();
    assert_eq!(further.restrictions, restrictions);
    assert_eq!(further.process.rlimits(), of_container.rlimits());
    assert_eq!(further.stream_owner, 7);
    assert_eq!(further.process.env().as_deref(), Some(["HOME=/".to_owned()].as_slice()));
}

#[test]
fn settings_of_the_machine_are_taken_out() {
    let mut spec = minimal();
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "5"});
    assert!(prepared(&spec).unwrap().machine_settings.is_empty(), "the container has its own");
    spec["linux"]["namespaces"] = json!([]);
    let taken = prepared(&spec).unwrap();
    let expected = Setting::new("net.ipv4.ip_forward", "1".to_owned()).unwrap();
    assert_eq!(taken.machine_settings, [expected]);
    let left = taken.spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
    assert_eq!(left.keys().collect::<Vec<_>>(), ["kernel.shmmax"]);
    spec["linux"]["sysctl"] = json!({"vm.max_map_count": "9", "kernel.msgmax": "5"});
    let taken = prepared(&spec).unwrap().machine_settings;
    let expected = Setting::of_the_machine("vm.max_map_count", "9".to_owned()).unwrap();
    assert_eq!(taken, [expected]);
    spec["linux"]["sysctl"] = json!({"net.//../x": "1"});
    assert!(matches!(prepared(&spec), Err(SpecError::Setting(_))));
}

#[test]
fn the_cgroup_is_named_by_the_id() {
    let spec = prepared(&minimal()).unwrap().spec;
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/containers/one")));
}

#[test]
fn a_home_is_added_only_where_there_is_none() {
    let spec = prepared(&minimal()).unwrap().spec;
    let environment = spec.process().as_ref().unwrap().env().clone().unwrap();
    assert_eq!(environment, ["PATH=/bin", "HOME=/"]);
    let mut with_home = minimal();
    with_home["process"]["env"] = json!(["HOME=/x"]);
    let spec = prepared(&with_home).unwrap().spec;
    assert_eq!(spec.process().as_ref().unwrap().env().clone().unwrap(), ["HOME=/x"]);
}

#[test]
fn a_home_comes_from_the_containers_user_table() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    let table = "root:x:0:0::/root:/bin/sh\nbroken\nfive:x:5:5::/home/five:/bin/sh\n";
    std::fs::write(root.path().join("etc/passwd"), table).unwrap();
    assert_eq!(home(root.path(), 5).as_deref(), Some("/home/five"));
    assert_eq!(home(root.path(), 6), None);
}

#[test]
fn a_link_out_of_the_root_is_not_followed_out() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.path().join("etc/passwd")).unwrap();
    assert_eq!(home(root.path(), 0), None);
}

#[test]
fn the_owner_of_the_streams_is_mapped_out_of_a_user_namespace() {
    assert_eq!(prepared(&minimal()).unwrap().stream_owner, 5);
    let mut mapped = minimal();
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 10}]);
    mapped["linux"]["uidMappings"] = mapping;
    assert_eq!(prepared(&mapped).unwrap().stream_owner, 100_005);
}

#[test]
fn what_cannot_be_kept_is_refused_in_words() {
    let refused = |change: fn(&mut Value), words: &str| {
        let mut spec = minimal();
        change(&mut spec);
        assert_eq!(prepared(&spec).unwrap_err().to_string(), words);
    };
    refused(
        |spec| spec["process"]["terminal"] = json!(true),
        "process.terminal and the stream of a terminal go together",
    );
    refused(
        |spec| spec["hooks"] = json!({"poststop": [{"path": "/bin/x"}]}),
        "hooks.poststop run on the host, not in the guest",
    );
    refused(|spec| spec["root"] = json!({"path": "x"}), "root.path \"x\" is not absolute");
    refused(|spec| spec["process"]["args"] = json!([]), "specification has no process.args");
    refused(|spec| spec["linux"] = Value::Null, "specification has no linux");
}

#[test]
fn hooks_that_run_in_the_container_are_kept() {
    let mut spec = minimal();
    spec["hooks"] = json!({
        "createContainer": [{"path": "/bin/x"}], "startContainer": [{"path": "/bin/x"}], "poststop": []
    });
    assert!(prepared(&spec).is_ok());
}

#[test]
fn only_a_network_without_a_path_is_new() {
    assert!(has_new_network(&prepared(&minimal()).unwrap().spec));
    let mut spec = minimal();
    spec["linux"]["namespaces"] = json!([{"type": "network", "path": "/proc/1/ns/net"}]);
    assert!(!has_new_network(&prepared(&spec).unwrap().spec));
}

#[test]
fn the_working_directory_is_made_inside_the_root() {
    let outside = tempfile::tempdir().unwrap();
    let root = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
    make_directories(root.path(), Path::new("/a/b/c"));
    assert!(root.path().join("a/b/c").is_dir());
    make_directories(root.path(), Path::new("/link/x"));
    assert!(!outside.path().join("x").exists());
}

#[test]
fn the_limit_of_locked_memory_stays_what_it_is() {
    let spec = prepared(&minimal()).unwrap().spec;
    let limits = spec.process().as_ref().unwrap().rlimits().clone().unwrap();
    assert_eq!(limits.len(), 1);
    assert_eq!(limits[0].soft(), getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX));
    let mut limited = minimal();
    limited["process"]["rlimits"] = json!([{"type": "RLIMIT_MEMLOCK", "soft": 1, "hard": 2}]);
    let spec = prepared(&limited).unwrap().spec;
    assert_eq!(spec.process().as_ref().unwrap().rlimits().as_ref().unwrap()[0].soft(), 1);
}

#[test]
fn a_user_namespace_shares_the_sysfs_of_the_machine() {
    let mut spec = minimal();
    spec["mounts"] = json!([
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        {"destination": "/proc", "type": "proc", "source": "proc"},
    ]);
    spec["linux"]["namespaces"] = json!([{"type": "user"}]);
    let mounts = prepared(&spec).unwrap().spec.mounts().clone().unwrap();
    assert_eq!(
        (mounts[0].typ().as_deref(), mounts[1].typ().as_deref()),
        (Some("bind"), Some("proc"))
    );
    assert_eq!(mounts[0].source().as_deref(), Some(Path::new("/sys")));
    let options = mounts[0].options().clone().unwrap();
    assert_eq!(options, ["ro", "rbind", "nosuid", "nodev", "noexec"]);
    // One that owns its network mounts its own.
    spec["linux"]["namespaces"] = json!([{"type": "user"}, {"type": "network"}]);
    let mounts = prepared(&spec).unwrap().spec.mounts().clone().unwrap();
    assert_eq!(mounts[0].typ().as_deref(), Some("sysfs"));
}

#[test]
fn a_mount_needs_no_source() {
    let mut spec = minimal();
    spec["mounts"] = json!([
        {"destination": "/a", "type": "tmpfs"},
        {"destination": "/b", "type": "tmpfs", "source": "named"}
    ]);
    let spec = prepared(&spec).unwrap().spec;
    let sources: Vec<_> = spec.mounts().iter().flatten().map(|mount| mount.source()).collect();
    assert_eq!(sources, [&Some("".into()), &Some("named".into())]);
}
