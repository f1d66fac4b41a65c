//! Headers and fields as the kernel lays them out, and what is refused.

use super::*;

#[test]
fn a_request_header_is_read_as_the_kernel_lays_it_out() {
    let mut message = vec![0_u8; 48];
    message[..4].copy_from_slice(&48_u32.to_le_bytes());
    message[4..8].copy_from_slice(&opcode::INTERRUPT.to_le_bytes());
    put_u64(&mut message, 8, 0x0102_0304_0506_0708);
    put_u64(&mut message, 16, 9);
    put_u64(&mut message, 24, 5 << 32 | 4);
    let request = Request::parse(&message).unwrap();
    let expected =
        Request { len: 48, opcode: 36, unique: 0x0102_0304_0506_0708, node: 9, uid: 4, gid: 5 };
    assert_eq!(request, expected);
    assert!(!request.has_reply());
    assert_eq!(Request::parse(&message[..39]), None);
}

#[test]
fn a_reply_header_survives_the_wire() {
    let reply = ReplyHeader::failure(7, Errno::IO);
    assert_eq!(ReplyHeader::parse(&reply.bytes()), Some(reply));
    assert_eq!(reply.bytes()[4..8], (-5_i32).to_le_bytes());
    assert_eq!(ReplyHeader::parse(&reply.bytes()[..15]), None);
}

#[test]
fn fields_past_the_end_are_refused() {
    let mut bytes = [0xff; 9];
    assert_eq!(u64_at(&bytes, 1), Some(u64::MAX));
    assert_eq!(u64_at(&bytes, 2), None);
    assert_eq!(u32_at(&bytes, 6), None);
    put_u64(&mut bytes, 2, 0);
    assert_eq!(bytes, [0xff; 9]);
}

#[test]
fn a_body_is_read_front_to_back() {
    let mut message = vec![0; IN_HEADER];
    message.extend([1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    message.extend(b"old\0new\0tail");
    let mut body = Body::of(&message);
    assert_eq!(body.u32(), Ok(1));
    assert_eq!(body.u64(), Ok(2));
    assert_eq!(body.name(), Ok(c"old"));
    assert_eq!(body.name(), Ok(c"new"));
    assert_eq!(body.bytes(4), Ok(&b"tail"[..]));
    assert_eq!(body.bytes(5), Err(Errno::INVAL));
    assert_eq!(body.name(), Err(Errno::INVAL), "no NUL");
    assert_eq!(body.u64(), Err(Errno::INVAL));
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"/\0", b"unended"] {
        let mut message = vec![0; IN_HEADER];
        message.extend(name);
        assert_eq!(Body::of(&message).name(), Err(Errno::INVAL), "{name:?}");
    }
}

#[test]
fn an_error_replaces_the_body() {
    let mut buffer = [0; 100];
    let mut reply = Reply::new(&mut buffer);
    reply.put_u64s([1, 2]);
    assert_eq!(reply.message(3, Ok(())).len(), OUT_HEADER + 16);
    let message = reply.message(3, Err(Errno::NOENT)).to_vec();
    assert_eq!(ReplyHeader::parse(&message), Some(ReplyHeader::failure(3, Errno::NOENT)));
    assert_eq!(message.len(), OUT_HEADER);
}
