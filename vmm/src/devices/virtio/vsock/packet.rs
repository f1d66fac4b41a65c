//! The header in front of every vsock packet, VIRTIO 1.2 §5.10.6.
//!
//! Plain bytes in, plain data out: what a header means for a connection is not decided here.

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;
/// The context id of the host, §5.10.4.
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type offered.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet asks for or tells, §5.10.6; the numbers are the specification's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Opens a connection.
    Request = 1,
    /// A listener took it.
    Response = 2,
    /// There is no such connection (any more).
    Reset = 3,
    /// The sender will not send or not receive any more, see [`Sides`].
    Shutdown = 4,
    /// Carries data.
    ReadWrite = 5,
    /// Carries nothing but the credit fields that every packet has.
    CreditUpdate = 6,
    /// Wants such a packet.
    CreditRequest = 7,
}

impl Operation {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Directions that a shutdown ends, seen from its sender; the flags of §5.10.6.5.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sides {
    /// The sender will receive no more.
    pub(super) receive: bool,
    /// The sender will send no more.
    pub(super) send: bool,
}

impl Sides {
    /// Both directions.
    pub(super) const BOTH: Self = Self { receive: true, send: true };

    fn from_wire(flags: u32) -> Self {
        Self { receive: flags & 1 != 0, send: flags & 2 != 0 }
    }

    fn to_wire(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// The directions that either has.
    pub(super) fn union(self, other: Self) -> Self {
        Self { receive: self.receive || other.receive, send: self.send || other.send }
    }
}

/// A header, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload that follow.
    pub(super) len: u32,
    /// The socket type.
    pub(super) kind: u16,
    /// `None` for a number that the specification does not know.
    pub(super) operation: Option<Operation>,
    /// Meaningful in a shutdown only.
    pub(super) sides: Sides,
    /// Size of the sender's receive buffer.
    pub(super) buf_alloc: u32,
    /// Bytes that ever left that buffer, wrapping.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Parses a header; every value of every field is representable.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            operation: Operation::from_wire(u16::from_le_bytes(field(bytes, 30))),
            sides: Sides::from_wire(u32::from_le_bytes(field(bytes, 32))),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// The bytes of the header.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let operation = self.operation.map_or(0, |operation| operation as u16);
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.sides.to_wire().to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The answer to a packet that belongs to no connection; `None` for a reset, because two peers
    /// would otherwise send resets back and forth.
    pub(super) fn refusal(&self) -> Option<Self> {
        (self.operation != Some(Operation::Reset)).then_some(Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            operation: Some(Operation::Reset),
            sides: Sides::default(),
            buf_alloc: 0,
            fwd_cnt: 0,
        })
    }
}

/// The `N` bytes from `at`; callers name places inside the header only.
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 1025,
            dst_port: 0x4000_0001,
            len: 7,
            kind: TYPE_STREAM,
            operation: Some(Operation::ReadWrite),
            sides: Sides { receive: false, send: true },
            buf_alloc: 0x1_0000,
            fwd_cnt: 0xffff_fffe,
        }
    }

    #[test]
    fn a_header_survives_encoding() {
        assert_eq!(Header::parse(&header().encode()), header());
    }

    #[test]
    fn fields_lie_where_the_specification_says() {
        let bytes = header().encode();
        assert_eq!(bytes[0..8], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16..20], [1, 4, 0, 0]);
        assert_eq!(bytes[20..24], [1, 0, 0, 0x40]);
        assert_eq!(bytes[24..32], [7, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[32..36], [2, 0, 0, 0]);
        assert_eq!(bytes[40..44], [0xfe, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn an_unknown_operation_is_kept_apart() {
        let mut bytes = header().encode();
        for unknown in [0_u16, 8, u16::MAX] {
            bytes[30..32].copy_from_slice(&unknown.to_le_bytes());
            assert_eq!(Header::parse(&bytes).operation, None);
        }
    }

    #[test]
    fn a_refusal_goes_back_to_the_sender() {
        let refusal = header().refusal().unwrap();
        assert_eq!((refusal.dst_cid, refusal.dst_port), (3, 1025));
        assert_eq!((refusal.src_cid, refusal.src_port), (HOST_CID, 0x4000_0001));
        assert_eq!(refusal.operation, Some(Operation::Reset));
    }

    #[test]
    fn a_reset_is_never_refused() {
        let reset = Header { operation: Some(Operation::Reset), ..header() };
        assert_eq!(reset.refusal(), None);
    }
}
