//! The process has the settings of the specification, and ends as under runc.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;
use serde_json::json;

fn status_of(script: &str) -> Option<i32> {
    let runtime = Runtime::new().unwrap();
    let output = runtime.run("status", &Bundle::script(script).unwrap()).unwrap();
    runtime.assert_clean().unwrap();
    output.status.code()
}

fn output_of(bundle: &Bundle) -> String {
    let output = Runtime::new().unwrap().run("process", bundle).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn success_is_0() {
    assert_eq!(status_of("exit 0"), Some(0));
}

#[test]
fn an_exit_code_comes_back() {
    assert_eq!(status_of("exit 1"), Some(1));
    assert_eq!(status_of("exit 42"), Some(42));
}

#[test]
fn a_command_that_the_shell_does_not_find_is_127() {
    assert_eq!(status_of("no-such-program"), Some(127));
}

#[test]
fn a_killed_process_is_128_and_the_signal() {
    assert_eq!(status_of("sh -c 'kill -9 $$'; exit $?"), Some(137));
}

#[test]
fn a_program_that_does_not_exist_is_an_error_that_names_it() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/no-such-program"]).unwrap();
    let output = runtime.run("missing", &bundle).unwrap();
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("no-such-program"), "{errors}");
    assert_eq!(errors.trim().lines().count(), 1, "{errors}");
    runtime.assert_clean().unwrap();
}

#[test]
fn environment_and_working_directory_are_those_of_the_specification() {
    let bundle = Bundle::script("echo $COLOUR; pwd").unwrap();
    let bundle = bundle
        .with(|spec| {
            spec["process"]["env"] = json!(["PATH=/bin", "COLOUR=deep red"]);
            spec["process"]["cwd"] = json!("/tmp");
        })
        .unwrap();
    assert_eq!(output_of(&bundle), "deep red\n/tmp\n");
}

#[test]
fn user_group_and_supplementary_groups_are_those_of_the_specification() {
    let bundle = Bundle::script("id -u; id -g; id -G").unwrap();
    let bundle = bundle
        .with(|spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8]});
        })
        .unwrap();
    assert_eq!(output_of(&bundle), "1000\n1001\n1001 7 8\n");
}

#[test]
fn the_host_name_is_that_of_the_specification() {
    let bundle = Bundle::script("hostname").unwrap();
    assert_eq!(output_of(&bundle), "bulk\n");
}

#[test]
fn capabilities_are_dropped_to_the_list() {
    let bundle = Bundle::script("grep -E '^Cap(Eff|Bnd)' /proc/self/status").unwrap();
    let keep = json!(["CAP_KILL", "CAP_CHOWN"]);
    let bundle = bundle
        .with(|spec| {
            let sets = json!({"bounding": keep, "effective": keep, "permitted": keep});
            spec["process"]["capabilities"] = sets;
        })
        .unwrap();
    // CAP_CHOWN is bit 0, CAP_KILL bit 5.
    assert_eq!(output_of(&bundle), "CapEff:\t0000000000000021\nCapBnd:\t0000000000000021\n");
}

#[test]
fn the_container_is_alone_in_its_pid_namespace() {
    let bundle = Bundle::script("echo $$; ls -d /proc/[0-9]* | wc -l").unwrap();
    let output = output_of(&bundle);
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[0], "1");
    assert!(lines[1].parse::<u32>().unwrap() <= 3, "{output}");
}
