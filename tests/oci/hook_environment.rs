//! The environment of hooks, beside runc: their own, an empty one, or the inherited one.

use std::collections::BTreeMap;
use std::fs;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

const ON_HOST: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];
/// These write to the container's root, where both runtimes start them.
const IN_CONTAINER: [&str; 2] = ["createContainer", "startContainer"];

/// Runs a container whose hooks have this environment; returns what each of them found.
fn found(runtime: &Runtime, environment: &Value) -> BTreeMap<&'static str, String> {
    let mut bundle = Bundle::script("true").unwrap();
    let place = |kind: &str| match ON_HOST.contains(&kind) {
        true => bundle.path().join(kind),
        false => bundle.rootfs().join(kind),
    };
    let mut hooks = json!({});
    for kind in ON_HOST.into_iter().chain(IN_CONTAINER) {
        let place = place(kind);
        let at = if ON_HOST.contains(&kind) { place.to_str().unwrap() } else { kind };
        let script = format!("echo \"${{COLOUR-none}} ${{OWN-none}} ${{TERM-none}}\" > {at}");
        let mut hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        if !environment.is_null() {
            hook["env"] = environment.clone();
        }
        hooks[kind] = json!([hook]);
    }
    let places = ON_HOST.into_iter().chain(IN_CONTAINER).map(|kind| (kind, place(kind)));
    let places: Vec<_> = places.collect();
    bundle.spec["hooks"] = hooks;
    bundle.spec["process"]["env"] = json!(["PATH=/bin", "COLOUR=blue"]);
    bundle.write().unwrap();
    let (status, output, errors) = told(&runtime.run("hooked", &bundle).unwrap());
    assert_eq!(status, Some(0), "{output}{errors}");
    runtime.assert_clean().unwrap();
    let word = |(kind, place)| (kind, fs::read_to_string(place).unwrap());
    places.into_iter().map(word).collect()
}

#[test]
#[ignore = "long: --suite oci_long"]
fn a_hook_has_its_own_environment_or_that_of_who_runs_it() {
    for (environment, on_host, in_container) in [
        (Value::Null, "red none dumb\n", "blue none none\n"),
        (json!([]), "none none none\n", "none none none\n"),
        (json!(["OWN=1"]), "none 1 none\n", "none 1 none\n"),
    ] {
        let runtimes = [Runtime::new().unwrap(), Runtime::runc().unwrap()];
        let [ours, theirs] = runtimes.map(|runtime| {
            found(&runtime.with("COLOUR", "red").with("TERM", "dumb"), &environment)
        });
        assert_eq!(ours, theirs, "{environment}");
        for (kind, words) in ours {
            let expected = if ON_HOST.contains(&kind) { on_host } else { in_container };
            assert_eq!(words, expected, "{kind}, {environment}");
        }
    }
}
