//! Standard streams cross unharmed.

use std::process::Stdio;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, finish};

#[test]
fn standard_output_and_error_stay_apart() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("echo out; echo err >&2").unwrap();
    let output = runtime.run("streams", &bundle).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");
    assert!(output.status.success());
    runtime.assert_clean().unwrap();
}

#[test]
fn standard_input_reaches_the_container_to_its_end() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("cat; echo end").unwrap();
    let input: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let output = runtime.run_with_input("stdin", &bundle, &input).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = [&input[..], b"end\n"].concat();
    assert!(output.stdout == expected, "{} bytes came back", output.stdout.len());
}

#[test]
fn ten_mib_come_out_unharmed() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("seq 1 1500000 | head -c 10485760").unwrap();
    let output = runtime.run("volume", &bundle).unwrap();
    let expected: Vec<u8> =
        (1..=1_500_000).flat_map(|n| format!("{n}\n").into_bytes()).take(10 << 20).collect();
    assert_eq!(output.stdout.len(), expected.len());
    assert!(output.stdout == expected, "bytes differ");
}

#[test]
fn the_streams_can_be_reopened_by_name() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("echo again > /dev/stdout; echo bad > /dev/stderr").unwrap();
    let output = runtime.run("reopen", &bundle).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "again\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "bad\n");
}

/// As under `create` with a caller whose streams are the null device.
#[test]
fn output_that_nobody_wants_can_be_written() {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::script("echo out && echo err >&2 && read nothing; test $? = 1").unwrap();
    let mut command = runtime.run_command("silent", &bundle);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let output = finish(command.spawn().unwrap()).unwrap();
    assert_eq!(output.status.code(), Some(0));
}
