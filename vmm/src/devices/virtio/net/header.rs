//! The header before each frame, VIRTIO 1.3 §5.1.6: which offloads the frame still needs.
//!
//! Pure: takes bytes that were copied out of the guest and returns the header for a tap. It asks
//! for nothing that the driver did not negotiate or that lies outside of the frame.

use libc::c_uint;

use super::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_USO4, F_GUEST_USO6,
    F_HOST_ECN, F_HOST_TSO4, F_HOST_TSO6, F_HOST_USO,
};

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 12;
/// Offsets of the flags and of the number of buffers that a frame was put into.
pub(super) const FLAGS: usize = 0;
pub(super) const BUFFERS: usize = 10;
/// Bytes of the shortest frame: two addresses and a type.
pub(super) const FRAME_MIN: usize = 14;
/// Bytes of the longest frame: a packet of 64 KiB, an Ethernet header and two VLAN tags.
pub(super) const FRAME_MAX: usize = FRAME_MIN + 8 + 0x1_0000;

/// The checksum is to be computed.
const NEEDS_CSUM: u8 = 1;
/// How a frame is to be segmented.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// The offloads (`TUN_F_*`) to set on a tap for a driver that negotiated `features`.
pub(super) fn offloads(features: u64) -> c_uint {
    let csum = features & F_GUEST_CSUM != 0;
    let tso = features & (F_GUEST_TSO4 | F_GUEST_TSO6) != 0;
    // A tap has USO for both versions of IP or for none.
    let uso = features & F_GUEST_USO4 != 0 && features & F_GUEST_USO6 != 0;
    // §5.1.3.1: each offload depends on another, and a tap refuses one without the other.
    let table = [
        (csum, libc::TUN_F_CSUM),
        (csum && features & F_GUEST_TSO4 != 0, libc::TUN_F_TSO4),
        (csum && features & F_GUEST_TSO6 != 0, libc::TUN_F_TSO6),
        (csum && tso && features & F_GUEST_ECN != 0, libc::TUN_F_TSO_ECN),
        (csum && uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    table.iter().filter(|(on, _)| *on).fold(0, |flags, (_, flag)| flags | flag)
}

/// Checks the header of a frame of `len` bytes that the driver sends; returns the one for the tap.
///
/// # Errors
/// Says why the frame is to be dropped.
pub(super) fn check(
    header: [u8; HEADER_BYTES],
    len: usize,
    features: u64,
) -> Result<[u8; HEADER_BYTES], &'static str> {
    if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
        return Err("no frame has its length");
    }
    let [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
    let mut told = [0; HEADER_BYTES];
    // §5.1.6.2.2: flags that are not known are ignored.
    if flags & NEEDS_CSUM != 0 {
        let start = usize::from(u16::from_le_bytes([c0, c1]));
        let offset = usize::from(u16::from_le_bytes([o0, o1]));
        if features & F_CSUM == 0 {
            return Err("its checksum is left to a device that computes none");
        }
        if start + offset + 2 > len {
            return Err("its checksum lies outside of it");
        }
        told[FLAGS] = NEEDS_CSUM;
        told[6..10].copy_from_slice(&[c0, c1, o0, o1]);
    }
    if gso != GSO_NONE {
        let needs = match gso & !GSO_ECN {
            GSO_TCPV4 => F_HOST_TSO4,
            GSO_TCPV6 => F_HOST_TSO6,
            GSO_UDP => F_HOST_USO,
            _ => return Err("it is to be segmented in an unknown way"),
        };
        let needs = if gso & GSO_ECN != 0 { needs | F_HOST_ECN } else { needs };
        if features & needs != needs {
            return Err("it is to be segmented in a way that was not negotiated");
        }
        if flags & NEEDS_CSUM == 0 || (s0, s1) == (0, 0) {
            return Err("it is to be segmented without a checksum or a size");
        }
        // The length is a hint, §5.1.6.2.2; a tap refuses one that is longer than the frame.
        let hint = usize::from(u16::from_le_bytes([h0, h1])).min(len);
        let [h0, h1] = u16::try_from(hint).unwrap_or(u16::MAX).to_le_bytes();
        told[1..6].copy_from_slice(&[gso, h0, h1, s0, s1]);
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::super::super::mock::Random;
    use super::*;

    const ALL: u64 = u64::MAX;

    /// A header that asks for a checksum at 34 + 16 and for segments of 1448 bytes.
    fn tso() -> [u8; HEADER_BYTES] {
        [NEEDS_CSUM, GSO_TCPV4, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]
    }

    #[test]
    fn what_is_well_formed_is_handed_on() {
        assert_eq!(check([0; 12], 60, 0), Ok([0; 12]));
        assert_eq!(check(tso(), 5000, ALL), Ok(tso()));
        let mut ecn = tso();
        ecn[1] |= GSO_ECN;
        assert_eq!(check(ecn, 5000, ALL), Ok(ecn));
    }

    #[test]
    fn unknown_flags_and_unused_fields_are_not_handed_on() {
        let mut header = [0xff; HEADER_BYTES];
        header[FLAGS] = !NEEDS_CSUM;
        header[1] = GSO_NONE;
        assert_eq!(check(header, 60, ALL), Ok([0; 12]));
        let mut header = tso();
        header[BUFFERS..].fill(0xff);
        assert_eq!(check(header, 5000, ALL), Ok(tso()));
    }

    #[test]
    fn a_hint_is_no_longer_than_the_frame() {
        let mut header = tso();
        header[2..4].fill(0xff);
        assert_eq!(check(header, 100, ALL).unwrap()[2..4], [100, 0]);
    }

    #[test]
    fn every_malformed_header_is_refused() {
        type Spoil = fn(&mut [u8; HEADER_BYTES]);
        let table: [(&str, usize, u64, Spoil); 11] = [
            ("short", FRAME_MIN - 1, ALL, |_| {}),
            ("long", FRAME_MAX + 1, ALL, |_| {}),
            ("no checksums", 5000, ALL & !F_CSUM, |_| {}),
            ("no tso", 5000, ALL & !F_HOST_TSO4, |_| {}),
            ("checksum cut off", 51, ALL, |_| {}),
            ("checksum far outside", 5000, ALL, |h| h[6..10].fill(0xff)),
            ("unknown kind", 5000, ALL, |h| h[1] = 2),
            ("ecn of nothing", 5000, ALL, |h| h[1] = GSO_ECN),
            ("ecn not negotiated", 5000, ALL & !F_HOST_ECN, |h| h[1] |= GSO_ECN),
            ("no size", 5000, ALL, |h| h[4..6].fill(0)),
            ("no checksum", 5000, ALL, |h| h[0] = 0),
        ];
        for (name, len, features, spoil) in table {
            let mut header = tso();
            spoil(&mut header);
            assert!(check(header, len, features).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_handed_on_lies_inside_of_the_frame_whatever_came() {
        let mut random = Random(0x1234_5678_9abc_def1);
        let (mut refused, mut checksums, mut segments) = (0, 0, 0);
        for _ in 0..200_000 {
            let mut header = [0; HEADER_BYTES];
            header.fill_with(|| u8::try_from(random.below(256)).unwrap());
            header[0] &= 3;
            header[1] &= 0x87;
            header[7] &= 7;
            header[9] &= 7;
            let len = usize::try_from(random.below(4000)).unwrap();
            let features = random.below(1 << 16) | random.below(2) << 56;
            let Ok(told) = check(header, len, features) else {
                refused += 1;
                continue;
            };
            checksums += u32::from(told[0] != 0);
            segments += u32::from(told[1] != 0);
            let field = |at: usize| usize::from(u16::from_le_bytes([told[at], told[at + 1]]));
            assert!(told[0] == 0 || (features & F_CSUM != 0 && field(6) + field(8) + 2 <= len));
            assert!(told[1] == 0 || (told[0] == NEEDS_CSUM && field(4) > 0 && field(2) <= len));
            assert_eq!(field(BUFFERS), 0);
        }
        // Each outcome occurred often.
        let ways = [refused, checksums, segments];
        assert!(ways.iter().all(|taken| *taken > 100), "{ways:?}");
    }

    #[test]
    fn a_tap_is_told_what_was_negotiated_with_all_that_it_needs() {
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(F_GUEST_TSO4 | F_GUEST_ECN | F_GUEST_USO4), 0);
        assert_eq!(offloads(F_GUEST_CSUM | F_GUEST_ECN), libc::TUN_F_CSUM);
        let tso = libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        assert_eq!(offloads(F_GUEST_CSUM | F_GUEST_TSO6 | F_GUEST_ECN), tso);
        assert_eq!(offloads(F_GUEST_CSUM | F_GUEST_USO4), libc::TUN_F_CSUM);
        assert_eq!(offloads(ALL), 0x6f);
    }
}
