//! Limits are enforced.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;
use serde_json::json;

#[test]
fn a_container_over_its_memory_limit_is_killed() {
    let runtime = Runtime::new().unwrap();
    // tail keeps its whole input in memory, because it has no line ends.
    let bundle = Bundle::script("exec tail -c 100000000 /dev/zero").unwrap();
    let bundle = bundle
        .with(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20}))
        .unwrap();
    let output = runtime.run("oom", &bundle).unwrap();
    assert_eq!(output.status.code(), Some(137), "{}", String::from_utf8_lossy(&output.stderr));
    runtime.assert_clean().unwrap();
}

#[test]
fn a_container_at_its_pids_limit_cannot_fork() {
    let runtime = Runtime::new().unwrap();
    let script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 30 & done; wait";
    let bundle = Bundle::script(script).unwrap();
    let bundle =
        bundle.with(|spec| spec["linux"]["resources"]["pids"] = json!({"limit": 8})).unwrap();
    let output = runtime.run("pids", &bundle).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("fork"), "{}: {errors}", output.status);
    assert!(!output.status.success());
}
