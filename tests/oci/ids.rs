//! Container IDs: every ID that runc accepts works for all commands, and IDs that it refuses are
//! refused.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;

fn lives(runtime: &Runtime, id: &str) {
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    runtime.create(id, &bundle).unwrap();
    runtime.ok(&["start", id]).unwrap();
    assert_eq!(runtime.ok(&["exec", id, "echo", "in"]).unwrap(), "in\n", "{id}");
    assert!(runtime.ok(&["ps", id]).unwrap().contains("sleep 1000"), "{id}");
    runtime.ok(&["pause", id]).unwrap();
    runtime.ok(&["resume", id]).unwrap();
    runtime.ok(&["kill", id, "KILL"]).unwrap();
    runtime.wait_for_status(id, "stopped").unwrap();
    runtime.ok(&["delete", id]).unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn names_that_runc_takes_live_through_every_verb() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let longest = "x".repeat(255);
    for id in ["a,b", "a+b_c.d-e", "...", ",", &longest] {
        lives(&runc, id);
        lives(&ours, id);
    }
    ours.assert_clean().unwrap();
}

#[test]
fn names_that_runc_refuses_are_refused() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    let too_long = "x".repeat(256);
    let bundle = Bundle::new(&["true"]).unwrap();
    for id in ["a:b", "a b", "ä", "a=b", "a@b", "", ".", "..", "a/b", &too_long] {
        for runtime in [&ours, &runc] {
            let output = runtime.run(id, &bundle).unwrap();
            assert_eq!(output.status.code(), Some(1), "{id:?}: {output:?}");
        }
    }
    ours.assert_clean().unwrap();
}
