//! Unit tests of the streams: no vsock, paused time.

use tokio::io::{duplex, simplex};

use super::*;

fn header(byte: u8) -> StreamHeader {
    StreamHeader([byte; StreamHeader::LEN])
}

async fn permit() -> OwnedSemaphorePermit {
    Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_comes_first_waits_for_its_call() {
    let meeting = Meeting::default();
    let offering = meeting.clone();
    tokio::spawn(async move { offering.offer(header(1), "mine", permit().await).await });
    sleep(Duration::from_secs(9)).await;
    assert_eq!(meeting.claim(header(1), StreamKind::Stdout).await.unwrap(), "mine");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_comes_first_waits_for_its_connection() {
    let meeting = Meeting::default();
    let claiming = meeting.clone();
    let call = tokio::spawn(async move { claiming.claim(header(1), StreamKind::Stdin).await });
    sleep(Duration::from_secs(9)).await;
    meeting.offer(header(1), "mine", permit().await).await;
    assert_eq!(call.await.unwrap().unwrap(), "mine");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_does_not_come_in_time_is_named() {
    let meeting = Meeting::<()>::default();
    let error = meeting.claim(header(1), StreamKind::Stdin).await.unwrap_err();
    assert_eq!(error.to_string(), "stdin was not connected in 30 seconds");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_of_a_call_or_a_connection_that_waited_in_vain() {
    let meeting = Meeting::default();
    meeting.offer(header(1), "unwanted", permit().await).await;
    assert!(meeting.claim(header(2), StreamKind::Stdout).await.is_err());
    drop(timeout(Duration::from_secs(1), meeting.claim(header(3), StreamKind::Stdout)).await);
    assert!(meeting.table().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_second_call_for_one_stream_is_refused_and_the_first_still_served() {
    let meeting = Meeting::default();
    let claiming = meeting.clone();
    let call = tokio::spawn(async move { claiming.claim(header(1), StreamKind::Stdout).await });
    sleep(Duration::from_millis(1)).await;
    let second = meeting.claim(header(1), StreamKind::Stderr).await;
    assert!(matches!(second, Err(StreamError::Taken { stream: StreamKind::Stderr })));
    meeting.offer(header(1), "first", permit().await).await;
    assert_eq!(call.await.unwrap().unwrap(), "first");
}

#[test]
fn a_header_of_the_wrong_length_is_refused() {
    let error = Pipes::new([&[], &[1, 2, 3], &[]]).unwrap_err();
    assert_eq!(error.to_string(), "stdout has a header of 3 bytes, not 16");
}

#[tokio::test]
async fn ten_mebibytes_are_copied_unharmed() {
    let sent: Vec<u8> = (0..=u8::MAX).cycle().step_by(7).take(10 << 20).collect();
    let (mut reader, mut writer) = simplex(CHUNK / 3);
    let (mut near, mut far) = duplex(CHUNK / 5);
    let source = sent.clone();
    tokio::spawn(async move {
        writer.write_all(&source).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    tokio::spawn(async move { copy(&mut reader, &mut near).await.unwrap() });
    let mut received = Vec::new();
    far.read_to_end(&mut received).await.unwrap();
    assert!(received == sent);
}

#[tokio::test]
async fn input_ends_when_the_process_closes_it() {
    let (theirs, ours) = new_pipe().unwrap();
    let mut ours = pipe::Sender::from_owned_fd(ours).unwrap();
    let (mut near, far) = duplex(16);
    let fed = tokio::spawn(async move { feed_all(&mut near, &mut ours).await });
    drop(theirs);
    fed.await.unwrap().unwrap();
    drop(far);
}
