//! Standard streams: what arrives, what ends them, what is refused.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::Streams;
use bulkhead_protocol::{DESCRIPTORS_MAX, STREAM_PORT};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

use crate::guest::{Guest, dial, header, open};

#[test]
#[ignore = "needs the test host"]
fn ten_mebibytes_go_in_and_come_out_unharmed() {
    Guest::run(async |mut guest| {
        let sent: Vec<u8> = (0..=u8::MAX).cycle().step_by(7).take(10 << 20).collect();
        let spec = guest.program(&["cat"]);
        let ran = guest.run_container(&spec, &sent).await;
        assert_eq!(ran.status, 0);
        assert!(ran.bytes == sent);
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_container_without_streams_has_the_null_device() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("cat; echo lost; test -c /dev/stdin && test -c /dev/stdout");
        guest.create("one", &spec).await.unwrap();
        guest.start_container("one").await.unwrap();
        assert_eq!(guest.wait("one").await.exit_status, 0);
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_stream_may_come_after_its_call() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("echo late");
        let streams = Streams { stdout: header(4).to_vec(), ..Streams::default() };
        let connecting = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            open(4).await
        };
        let creating = guest.create_with("one", &spec, streams);
        let (created, mut stdout) = tokio::join!(creating, connecting);
        created.unwrap();
        guest.start_container("one").await.unwrap();
        let mut text = String::new();
        stdout.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "late\n");
    });
}

#[test]
#[ignore = "needs the test host"]
fn streams_end_with_the_last_process_that_holds_them() {
    Guest::run(async |mut guest| {
        let spec = guest.shell("exec 2>&-; echo first; exec >&-; sleep 1000");
        let streams = Streams {
            stdin: header(1).to_vec(),
            stdout: header(2).to_vec(),
            stderr: header(3).to_vec(),
            terminal: None,
        };
        let [mut stdin, mut stdout, mut stderr] = [open(1).await, open(2).await, open(3).await];
        guest.create_with("one", &spec, streams).await.unwrap();
        guest.start_container("one").await.unwrap();
        let mut text = String::new();
        stderr.read_to_string(&mut text).await.unwrap();
        stdout.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first\n");
        // The process lives on and holds its input, which ends only with the process.
        let held = tokio::time::timeout(Duration::from_millis(300), stdin.read_u8()).await;
        assert!(held.is_err(), "stdin ended early: {held:?}");
        let kill = bulkhead_protocol::agent::KillRequest {
            container_id: "one".to_owned(),
            signal: 9,
            ..Default::default()
        };
        guest.agent.kill(kill).await.unwrap();
        assert!(stdin.read_u8().await.is_err());
    });
}

#[test]
#[ignore = "needs the test host"]
fn a_host_that_closes_the_output_breaks_the_pipe() {
    Guest::run(async |mut guest| {
        let spec = guest.program(&["yes"]);
        let streams = Streams { stdout: header(2).to_vec(), ..Streams::default() };
        let stdout = open(2).await;
        guest.create_with("one", &spec, streams).await.unwrap();
        guest.start_container("one").await.unwrap();
        stdout.shutdown(Shutdown::Both).unwrap();
        drop(stdout);
        // The init of a PID namespace ignores the signal unless it handles it, so the program sees
        // the error; it must not have inherited that the signal is ignored.
        assert_eq!(guest.wait("one").await.exit_status, 1);
    });
}

/// One test, because both take the 30 seconds that a stream has to come.
#[test]
#[ignore = "needs the test host"]
fn streams_that_do_not_come_and_connections_that_say_nothing_are_given_up() {
    Guest::run(async |mut guest| {
        let mut idle = Vec::new();
        // The streams of four processes that have as many as one can have, all before the agent
        // gets to accept one.
        guest.signal("STOP");
        for number in 0..4 * (DESCRIPTORS_MAX as u128 + 3) {
            let mut stream = dial(STREAM_PORT).await.unwrap();
            if number % 2 == 0 {
                stream.write_all(&(number + 100).to_ne_bytes()).await.unwrap();
            }
            idle.push(stream);
        }
        guest.signal("CONT");
        // One too many is closed at once.
        let mut extra = dial(STREAM_PORT).await.unwrap();
        let closed = tokio::time::timeout(Duration::from_secs(5), extra.read_u8()).await;
        assert!(closed.unwrap().is_err());

        // A process whose stream does not come is not created, and its ID is free again.
        let spec = guest.shell("echo room");
        let streams = Streams { stdout: header(9).to_vec(), ..Streams::default() };
        let began = Instant::now();
        let status = guest.create_with("one", &spec, streams).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(status.message(), "stdout was not connected in 30 seconds");
        assert!(began.elapsed() >= Duration::from_secs(10));
        guest.create("one", &spec).await.unwrap();

        // The others are closed after their time, and then there is room again.
        for mut stream in idle {
            let closed = tokio::time::timeout(Duration::from_secs(45), stream.read_u8()).await;
            assert!(closed.unwrap().is_err());
        }
        assert_eq!(guest.run_container(&spec, b"").await.stdout, "room\n");
    });
}
