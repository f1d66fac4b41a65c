//! Credit and shutdown, without sockets.

use super::super::packet::{HOST_CID, Operation, TYPE_STREAM};
use super::*;

fn packet(buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: 1025,
        dst_port: 9,
        len: 0,
        kind: TYPE_STREAM,
        operation: Some(Operation::CreditUpdate),
        sides: Sides::default(),
        buf_alloc,
        fwd_cnt,
    }
}

fn connection(buf_alloc: u32) -> Connection {
    Connection::new(1025, &packet(buf_alloc, 0))
}

const SEND: Sides = Sides { receive: false, send: true };
const RECEIVE: Sides = Sides { receive: true, send: false };

#[test]
fn room_is_the_guests_buffer_less_what_is_in_flight() {
    let mut connection = connection(1000);
    assert_eq!(connection.next(true), Some(Outgoing::Data(1000)));
    connection.note_sent(Outgoing::Data(1000), 600);
    assert_eq!(connection.next(true), Some(Outgoing::Data(400)));
    connection.note_credit(&packet(1000, 100));
    assert_eq!(connection.next(true), Some(Outgoing::Data(500)));
}

#[test]
fn counters_wrap() {
    let mut connection = connection(1000);
    connection.credit.sent = u32::MAX - 10;
    connection.note_credit(&packet(1000, u32::MAX - 10));
    connection.note_sent(Outgoing::Data(1000), 100);
    assert_eq!(connection.next(true), Some(Outgoing::Data(900)));
    connection.note_credit(&packet(1000, 89));
    assert_eq!(connection.next(true), Some(Outgoing::Data(1000)));
}

#[test]
fn a_buffer_that_shrinks_gives_no_room() {
    let mut connection = connection(1000);
    connection.note_sent(Outgoing::Data(1000), 600);
    connection.note_credit(&packet(10, 0));
    assert_eq!(connection.next(true), Some(Outgoing::CreditRequest));
}

#[test]
fn credit_is_asked_for_once() {
    let mut connection = connection(0);
    connection.note_sent(Outgoing::CreditRequest, 0);
    assert_eq!(connection.next(true), None);
    connection.note_credit(&packet(0, 0));
    assert_eq!(connection.next(true), None);
    connection.note_credit(&packet(1, 0));
    connection.note_sent(Outgoing::Data(1), 1);
    assert_eq!(connection.next(true), Some(Outgoing::CreditRequest));
}

#[test]
fn no_packet_is_larger_than_its_share() {
    assert_eq!(connection(u32::MAX).next(true), Some(Outgoing::Data(PAYLOAD_MAX)));
}

#[test]
fn a_guest_may_fill_the_buffer_and_no_more() {
    let mut connection = connection(0);
    assert_eq!(connection.judge(BUFFER_BYTES as usize), Incoming::Deliver);
    connection.backlog().extend([0; 10]);
    assert_eq!(connection.judge(BUFFER_BYTES as usize - 10), Incoming::Deliver);
    assert_eq!(connection.judge(BUFFER_BYTES as usize - 9), Incoming::Violation);
}

#[test]
fn consumed_bytes_are_told_when_they_are_many() {
    let mut connection = connection(0);
    connection.note_forwarded(UPDATE_BYTES as usize - 1);
    assert_eq!(connection.next(false), None);
    connection.note_forwarded(1);
    assert_eq!(connection.next(false), Some(Outgoing::CreditUpdate));
    assert_eq!(connection.note_sent(Outgoing::CreditUpdate, 0), (BUFFER_BYTES, UPDATE_BYTES));
    assert_eq!(connection.next(false), None);
}

#[test]
fn ends_are_told_once_and_before_all_else() {
    let mut connection = connection(1000);
    connection.note_credit_request();
    connection.note_host_end();
    assert_eq!(connection.next(true), Some(Outgoing::Shutdown(SEND)));
    connection.note_sent(Outgoing::Shutdown(SEND), 0);
    assert_eq!(connection.next(true), None);
}

#[test]
fn a_host_without_reader_is_still_read_to_its_end() {
    let mut connection = connection(1000);
    connection.note_host_gone();
    assert_eq!(connection.next(true), Some(Outgoing::Shutdown(RECEIVE)));
    connection.note_sent(Outgoing::Shutdown(RECEIVE), 0);
    assert_eq!(connection.next(true), Some(Outgoing::Data(1000)));
    assert_eq!(connection.judge(1), Incoming::Discard);
    connection.note_host_end();
    assert_eq!(connection.next(true), Some(Outgoing::Shutdown(Sides::BOTH)));
}

#[test]
fn what_a_lost_host_leaves_unread_counts_as_read() {
    let mut connection = connection(0);
    connection.backlog().extend([0; 100]);
    connection.note_host_gone();
    assert!(connection.backlog().is_empty());
    assert_eq!(connection.credit.forwarded, 100);
}

#[test]
fn after_its_end_a_guest_sends_nothing() {
    let mut connection = connection(0);
    connection.note_guest_end(SEND);
    assert_eq!(connection.judge(1), Incoming::Violation);
    assert!(connection.delivered_all());
}

#[test]
fn nothing_is_read_for_a_deaf_guest() {
    let mut connection = connection(1000);
    connection.note_guest_end(RECEIVE);
    assert_eq!(connection.next(true), None);
    connection.note_host_gone();
    assert_eq!(connection.next(true), Some(Outgoing::Shutdown(Sides::BOTH)));
}
