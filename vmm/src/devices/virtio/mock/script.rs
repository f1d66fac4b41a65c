//! What a guest does, taken from a string of bytes: numbers, buffers and descriptors that are often
//! nearly valid.

use super::*;

/// The decisions of a guest.
pub(crate) struct Script<'a> {
    /// The bytes that are left; after their end, zeroes are read.
    bytes: &'a [u8],
    /// Buffers may overlap the rings, which can then have any contents.
    pub(crate) in_rings: bool,
}

impl<'a> Script<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        let mut script = Self { bytes, in_rings: false };
        script.in_rings = script.byte() % 4 == 3;
        script
    }

    pub(crate) fn ended(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.piece(1).first().copied().unwrap_or_default()
    }

    pub(crate) fn number(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// A length, often short so that bytes are left for the rest.
    pub(crate) fn length(&mut self) -> u16 {
        match self.byte() {
            frame if frame % 8 == 6 => self.number() % 0x800,
            any if any % 8 == 7 => self.number(),
            short => u16::from(short / 8),
        }
    }

    /// A length, then that many bytes.
    pub(crate) fn sized(&mut self) -> &'a [u8] {
        let len = usize::from(self.length());
        self.piece(len)
    }

    fn piece(&mut self, len: usize) -> &'a [u8] {
        let (piece, rest) = self.bytes.split_at(len.min(self.bytes.len()));
        self.bytes = rest;
        piece
    }

    /// An address inside of memory, at its edges, in a table, or anywhere.
    pub(crate) fn address(&mut self) -> u64 {
        let offset = u64::from(self.number());
        match self.byte() % 8 {
            0 => LOW_END - offset % 64,
            1 => HIGH_END - offset % 64,
            2 => TABLES + offset % 0x400,
            3 => u64::MAX - offset,
            4 if self.in_rings => RINGS + offset % (2 * RING_BYTES),
            _ => HIGH_START + offset * 16,
        }
    }

    pub(crate) fn descriptor(&mut self) -> Raw {
        let len = match self.byte() % 4 {
            0 => u32::from(self.number()) << 16 | u32::from(self.number()),
            1 => u32::from(self.byte()),
            _ => u32::from(self.number()),
        };
        let flags = u16::from(self.byte()) & (NEXT | WRITE | INDIRECT);
        (self.address(), len, flags, u16::from(self.byte()))
    }
}
