//! `features` tells the truth: each feature that it lists is tried.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;
use serde_json::{Value, json};

fn features(runtime: &Runtime) -> Value {
    serde_json::from_str(&runtime.ok(&["features"]).unwrap()).unwrap()
}

fn words(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect()
}

/// Runs a container that must start and exit with its script's status.
fn runs(runtime: &Runtime, bundle: &Bundle) {
    let output = runtime.run("tried", bundle).unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn every_mount_option_is_taken() {
    let runtime = Runtime::new().unwrap();
    let features = features(&runtime);
    let script = "for at in /mnt/*; do grep -q \" $at \" /proc/self/mountinfo || exit 1; done";
    let mut bundle = Bundle::script(script).unwrap();
    for option in words(&features["mountOptions"]) {
        let source = bundle.rootfs().to_owned();
        let mount = match option {
            // For existing mounts only.
            "remount" => continue,
            // The kernel refuses this for tmpfs.
            "mand" => continue,
            // For bind mounts only; `mounts.rs` tests them.
            "idmap" | "ridmap" => continue,
            "bind" | "rbind" => json!({
                "destination": format!("/mnt/{option}"), "type": "bind", "source": source,
                "options": [option],
            }),
            _ => json!({
                "destination": format!("/mnt/{option}"), "type": "tmpfs", "source": "tmpfs",
                "options": [option],
            }),
        };
        bundle = bundle.mount(mount).unwrap();
    }
    runs(&runtime, &bundle);
}

#[test]
fn every_namespace_and_capability_is_given() {
    let runtime = Runtime::new().unwrap();
    let features = features(&runtime);
    let linux = &features["linux"];
    let capabilities = words(&linux["capabilities"]);
    let all: u64 = (1 << capabilities.len()) - 1;
    let script = format!("grep -q 'CapEff:.*{all:016x}' /proc/self/status");
    let bundle = Bundle::script(&script).unwrap();
    let namespaces: Vec<Value> =
        words(&linux["namespaces"]).iter().map(|name| json!({"type": name})).collect();
    let map = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
    let bundle = bundle.with(|spec| {
        spec["linux"]["namespaces"] = json!(namespaces);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        let sets = ["bounding", "effective", "permitted", "inheritable", "ambient"];
        let sets = sets.iter().map(|set| ((*set).to_owned(), json!(capabilities)));
        spec["process"]["capabilities"] = sets.collect::<serde_json::Map<_, _>>().into();
    });
    runs(&runtime, &bundle.unwrap());
}

#[test]
fn every_word_of_seccomp_is_understood() {
    let runtime = Runtime::new().unwrap();
    let features = features(&runtime);
    let seccomp = &features["linux"]["seccomp"];
    let bundle = Bundle::script("true").unwrap();
    // Rules for a system call that no shell makes.
    let mut rules: Vec<Value> = words(&seccomp["actions"])
        .iter()
        .zip(0..)
        .filter(|(action, _)| **action != "SCMP_ACT_ALLOW")
        .map(|(action, value)| {
            let argument = json!({"index": 0, "value": value, "op": "SCMP_CMP_EQ"});
            json!({"names": ["kexec_load"], "action": action, "args": [argument]})
        })
        .collect();
    for operator in words(&seccomp["operators"]) {
        let argument = json!({"index": 1, "value": 1, "valueTwo": 1, "op": operator});
        rules.push(json!({"names": ["swapon"], "action": "SCMP_ACT_ERRNO", "args": [argument]}));
    }
    let bundle = bundle.with(|spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": seccomp["archs"],
            "syscalls": rules,
        });
    });
    runs(&runtime, &bundle.unwrap());
}

#[test]
fn what_it_denies_is_refused() {
    let runtime = Runtime::new().unwrap();
    let features = features(&runtime);
    assert_eq!(features["linux"]["apparmor"], json!({"enabled": false}));
    for (verb, later) in [("checkpoint", "c"), ("restore", "c")] {
        let errors = runtime.fails(&[verb, later]).unwrap();
        assert!(errors.contains(verb) && errors.contains("not supported yet"), "{errors}");
    }
}
