//! Two relays back to back, as on the two sides of a machine.

use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use super::*;

/// The two ends that programs have, with two relays between them.
fn through_the_wall(content: Content) -> [UnixStream; 2] {
    let kind = match content {
        Content::Bytes => SocketType::STREAM,
        Content::Packets => SocketType::SEQPACKET,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = |kind| {
        let (one, other) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        [one, other].map(|end| UnixStream::from_std(StdStream::from(end)).unwrap())
    };
    let [inner, inside] = pair(kind);
    let [outside, outer] = pair(kind);
    let [near, far] = pair(SocketType::STREAM);
    tokio::spawn(relay(content, inside, near, None));
    tokio::spawn(relay(content, outside, far, None));
    [inner, outer]
}

#[tokio::test]
async fn each_direction_of_a_stream_ends_by_itself() {
    let [mut inner, mut outer] = through_the_wall(Content::Bytes);
    inner.write_all(b"question").await.unwrap();
    inner.shutdown().await.unwrap();
    let mut said = String::new();
    outer.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "question");
    outer.write_all(b"answer").await.unwrap();
    drop(outer);
    said.clear();
    inner.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "answer");
}

#[tokio::test]
async fn a_side_that_is_closed_closes_the_other() {
    for first in [0, 1] {
        let [inner, outer] = through_the_wall(Content::Bytes);
        let (mut stays, mut goes) = if first == 0 { (inner, outer) } else { (outer, inner) };
        goes.write_all(b"last words").await.unwrap();
        drop(goes);
        let mut said = String::new();
        stays.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "last words");
        let closed = async {
            while !is_hung_up(&stays) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(5), closed).await.unwrap();
        assert!(stays.write_all(b"x").await.is_err());
    }
}

#[tokio::test]
async fn who_stops_reading_still_sends() {
    let [mut inner, outer] = through_the_wall(Content::Bytes);
    rustix::net::shutdown(&outer, rustix::net::Shutdown::Read).unwrap();
    let refused = async { while inner.write_all(&[0; 4096]).await.is_ok() {} };
    timeout(Duration::from_secs(5), refused).await.unwrap();
    write_all(&outer, b"too much").await.unwrap();
    drop(outer);
    let mut said = String::new();
    inner.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "too much");
}

#[tokio::test]
async fn packets_keep_their_bounds() {
    let [inner, outer] = through_the_wall(Content::Packets);
    let packets = [&b"one"[..], b"2", &[7; 100_000]];
    for packet in packets {
        send_from(None, &inner, packet).await.unwrap();
    }
    for packet in packets {
        assert_eq!(receive_packet(&outer).await.unwrap().as_deref(), Some(packet));
    }
    drop(inner);
    assert_eq!(receive_packet(&outer).await.unwrap(), None);
}

#[tokio::test]
async fn a_frame_that_breaks_the_rules_is_an_error() {
    for bytes in [&[0, 0, 0, 0][..], &[0, 0, 0, 9, 1], &[0, 0, 1], &[0, 0, 0, 2, 1]] {
        let (mut sender, stream) = UnixStream::pair().unwrap();
        sender.write_all(bytes).await.unwrap();
        drop(sender);
        assert!(read_frame(&stream, 8).await.is_err(), "{bytes:?}");
    }
    let (sender, stream) = UnixStream::pair().unwrap();
    write_frame(&sender, b"whole").await.unwrap();
    drop(sender);
    assert_eq!(read_frame(&stream, 8).await.unwrap().as_deref(), Some(&b"whole"[..]));
    assert_eq!(read_frame(&stream, 8).await.unwrap(), None);
}
