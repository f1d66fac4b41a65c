//! What a driver asks of a disk, VIRTIO 1.2 §5.2.6: bytes in, checked ranges out.
//!
//! Pure: neither guest memory nor a disk is touched here. All arithmetic on sectors is checked, so
//! a range that comes out of here lies on the disk.

/// The unit of all sector numbers, whatever the block size.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Bytes of a request's header.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of one range of a discard or of zeroes.
pub(super) const SEGMENT_BYTES: usize = 16;
/// The most sectors in one range of a discard: 2 GiB, which is one system call.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// The most sectors in one range of zeroes: 16 MiB, because they may have to be written.
pub(super) const ZERO_SECTORS_MAX: u32 = 1 << 15;

/// How a request ended; the status byte of §5.2.6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// Done.
    Done = 0,
    /// The request was wrong, or the disk failed.
    Failed = 1,
    /// The device does not do this.
    Unsupported = 2,
}

/// A request of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Reads from this sector.
    Read(u64),
    /// Writes from this sector.
    Write(u64),
    /// Makes completed writes durable.
    Flush,
    /// Reads the disk's serial.
    Identify,
    /// Discards ranges, whose contents are not needed any more.
    Discard,
    /// Makes ranges read as zeroes.
    Zero,
}

impl Request {
    /// Parses a header.
    pub(super) fn parse(header: &[u8; HEADER_BYTES]) -> Result<Self, Status> {
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = *header;
        let [_, _, _, _, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes(kind) {
            0 => Ok(Self::Read(sector)),
            1 => Ok(Self::Write(sector)),
            4 => Ok(Self::Flush),
            8 => Ok(Self::Identify),
            11 => Ok(Self::Discard),
            13 => Ok(Self::Zero),
            _ => Err(Status::Unsupported),
        }
    }
}

/// A range of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Range {
    /// `len` bytes from `sector`: whole sectors that exist.
    pub(super) fn new(sector: u64, len: u64, disk_bytes: u64) -> Result<Self, Status> {
        let range = sector.checked_mul(SECTOR_BYTES).map(|start| Self { start, len });
        range
            .filter(|range| range.len.is_multiple_of(SECTOR_BYTES))
            .filter(|range| range.start.checked_add(range.len).is_some_and(|end| end <= disk_bytes))
            .ok_or(Status::Failed)
    }
}

/// A range of a discard or of zeroes, §5.2.6 `virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) range: Range,
    /// The disk may give the range's space back.
    pub(super) unmap: bool,
}

impl Segment {
    /// Parses a segment of `request`.
    pub(super) fn parse(
        bytes: &[u8; SEGMENT_BYTES],
        request: Request,
        disk_bytes: u64,
    ) -> Result<Self, Status> {
        let [sector @ .., _, _, _, _, _, _, _, _] = *bytes;
        let [_, _, _, _, _, _, _, _, sectors @ .., _, _, _, _] = *bytes;
        let [_, _, _, _, _, _, _, _, _, _, _, _, flags @ ..] = *bytes;
        let flags = u32::from_le_bytes(flags);
        // §5.2.6.2: reserved flags are unsupported, and so is the one flag in a discard.
        let (flags_known, sectors_max) = match request {
            Request::Discard => (0, DISCARD_SECTORS_MAX),
            _ => (1, ZERO_SECTORS_MAX),
        };
        if flags & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        let sectors = u32::from_le_bytes(sectors);
        if sectors > sectors_max {
            return Err(Status::Failed);
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        let range = Range::new(u64::from_le_bytes(sector), len, disk_bytes)?;
        Ok(Self { range, unmap: flags & 1 != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u64 = 1 << 20;

    fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }

    fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; SEGMENT_BYTES] {
        let mut bytes = [0; SEGMENT_BYTES];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    #[test]
    fn known_types_are_told_apart_and_others_unsupported() {
        assert_eq!(Request::parse(&header(0, 7)), Ok(Request::Read(7)));
        assert_eq!(Request::parse(&header(1, u64::MAX)), Ok(Request::Write(u64::MAX)));
        assert_eq!(Request::parse(&header(4, 0)), Ok(Request::Flush));
        for unknown in [2, 3, 5, 10, 12, 14, u32::MAX] {
            assert_eq!(Request::parse(&header(unknown, 0)), Err(Status::Unsupported));
        }
    }

    #[test]
    fn ranges_lie_on_the_disk() {
        assert_eq!(Range::new(0, DISK, DISK), Ok(Range { start: 0, len: DISK }));
        assert_eq!(Range::new(2047, 512, DISK), Ok(Range { start: DISK - 512, len: 512 }));
        for (sector, len) in [
            (2048, 512),
            (2047, 1024),
            (0, DISK + 512),
            (0, 511),
            (0, 513),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (u64::MAX / 512 + 1, 0),
            (1 << 55, 512),
            (1, u64::MAX - 511),
        ] {
            assert_eq!(Range::new(sector, len, DISK), Err(Status::Failed), "{sector} {len}");
        }
    }

    #[test]
    fn a_sector_cut_off_at_the_end_is_not_reachable() {
        assert_eq!(Range::new(2047, 512, DISK - 1), Err(Status::Failed));
    }

    #[test]
    fn segments_obey_their_limits() {
        let parse = |bytes, request| Segment::parse(&bytes, request, u64::MAX);
        assert!(parse(segment(0, DISCARD_SECTORS_MAX, 0), Request::Discard).is_ok());
        let too_long = segment(0, DISCARD_SECTORS_MAX + 1, 0);
        assert_eq!(parse(too_long, Request::Discard), Err(Status::Failed));
        let too_long = segment(0, ZERO_SECTORS_MAX + 1, 0);
        assert_eq!(parse(too_long, Request::Zero), Err(Status::Failed));
        assert!(parse(segment(0, 8, 1), Request::Zero).unwrap().unmap);
        assert_eq!(parse(segment(0, 8, 1), Request::Discard), Err(Status::Unsupported));
        assert_eq!(parse(segment(0, 8, 2), Request::Zero), Err(Status::Unsupported));
        assert_eq!(parse(segment(u64::MAX, 8, 0), Request::Zero), Err(Status::Failed));
    }
}
