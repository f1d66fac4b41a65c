//! Packs a kernel's ELF file: keeps only the program headers and the segments that they load.
//!
//! The kernel is linked for pages of 2 MiB, so a third of the file would be holes between segments.
//! In the packed file, segments are aligned to 4 KiB, with the same addresses in memory. Long runs
//! of padding inside a segment (entry code has 2 MiB of its own) are removed too: bytes that are
//! not in the file are not written into the memory of a pod, which is zero at first. Loaders read
//! only program headers, so sections, symbols and debug data are removed.
//! Spec: ELF-64 object file format, chapters 3 and 8. Only the 64-bit little-endian form is read.

use anyhow::{Context, Result, bail, ensure};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: u64 = 64;
const PAGE: u64 = 4096;
const LOAD: u64 = 1;
/// The shortest run of padding that is worth a program header, in pages.
const WORTHWHILE: u64 = 16;
/// The bytes with which the linker pads data and code.
const FILLERS: [u8; 2] = [0, 0xcc];

/// One program header, as its raw fields and its place in the file.
#[derive(Debug, Clone, Copy)]
struct Segment {
    raw: [u8; PROGRAM_HEADER],
    kind: u64,
    offset: u64,
    address: u64,
    physical: u64,
    size: u64,
    memory: u64,
}

impl Segment {
    /// The part of a loaded segment from `start` to `end`, both relative to its start. The last
    /// part also has the memory beyond the data in the file.
    fn part(&self, start: u64, end: u64) -> Self {
        let rest = if end == self.size { self.memory - self.size } else { 0 };
        Self {
            offset: self.offset + start,
            address: self.address + start,
            physical: self.physical + start,
            size: end - start,
            memory: end - start + rest,
            ..*self
        }
    }
}

/// The packed file.
///
/// # Errors
/// When `file` is not a 64-bit little-endian ELF file, or a header points outside it.
pub fn pack(file: &[u8]) -> Result<Vec<u8>> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let mut parts = Vec::new();
    for segment in segments(file)? {
        parts.extend(without_padding(file, segment)?);
    }
    let mut packed = file.get(..HEADER).context("ELF header cut short")?.to_vec();
    put(&mut packed, 32, 8, HEADER as u64)?; // e_phoff
    put(&mut packed, 40, 8, 0)?; // e_shoff
    put(&mut packed, 56, 2, parts.len() as u64)?; // e_phnum
    put(&mut packed, 58, 6, 0)?; // e_shentsize, e_shnum, e_shstrndx
    packed.resize(HEADER + parts.len() * PROGRAM_HEADER, 0);

    let mut moved: Vec<(Segment, u64)> = Vec::new();
    for part in parts.iter().filter(|part| part.kind == LOAD) {
        // Offset and address are congruent modulo the page size, as mmap needs it.
        let page = (packed.len() as u64).next_multiple_of(PAGE);
        let offset = page + part.address % PAGE;
        packed.resize(usize::try_from(offset)?, 0);
        packed.extend_from_slice(slice(file, part.offset, part.size)?);
        moved.push((*part, offset));
    }
    for (index, part) in parts.iter().enumerate() {
        let at = HEADER + index * PROGRAM_HEADER;
        packed[at..at + PROGRAM_HEADER].copy_from_slice(&part.raw);
        let fields =
            [new_offset(part, &moved)?, part.address, part.physical, part.size, part.memory];
        for (field, value) in (8..48).step_by(8).zip(fields) {
            put(&mut packed, at + field, 8, value)?;
        }
        if part.kind == LOAD {
            put(&mut packed, at + 48, 8, PAGE)?; // p_align
        }
    }
    Ok(packed)
}

/// The content of the first section with this name.
///
/// # Errors
/// When `file` is not a 64-bit little-endian ELF file, or a header points outside it.
pub fn section<'a>(file: &'a [u8], name: &str) -> Result<Option<&'a [u8]>> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let table = get(file, 40, 8)?;
    ensure!(get(file, 58, 2)? == SECTION_HEADER, "odd size of section headers");
    let (count, names) = (get(file, 60, 2)?, get(file, 62, 2)?);
    let header = |index: u64| slice(file, table + index * SECTION_HEADER, SECTION_HEADER);
    let content = |header: &[u8]| slice(file, get(header, 24, 8)?, get(header, 32, 8)?);
    let names = content(header(names)?)?;
    for index in 0..count {
        let header = header(index)?;
        let own = names.get(usize::try_from(get(header, 0, 4)?)?..).unwrap_or_default();
        let is_named =
            own.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"\0"));
        if is_named {
            return content(header).map(Some);
        }
    }
    Ok(None)
}

/// Splits a loaded segment at its long runs of padding; returns any other segment unchanged.
fn without_padding(file: &[u8], segment: Segment) -> Result<Vec<Segment>> {
    if segment.kind != LOAD {
        return Ok(vec![segment]);
    }
    ensure!(segment.memory >= segment.size, "a segment is larger in the file than in memory");
    let content = slice(file, segment.offset, segment.size)?;
    let mut parts = Vec::new();
    let (mut start, mut padding) = (0, 0);
    for (page, bytes) in (0..).zip(content.chunks(usize::try_from(PAGE)?)) {
        if FILLERS.iter().any(|filler| bytes.iter().all(|byte| byte == filler)) {
            padding += 1;
            continue;
        }
        if padding >= WORTHWHILE {
            if page > padding {
                parts.push(segment.part(start, (page - padding) * PAGE));
            }
            start = page * PAGE;
        }
        padding = 0;
    }
    parts.push(segment.part(start, segment.size));
    Ok(parts)
}

/// The offset of a segment in the packed file. A segment that is not loaded lies within a loaded
/// one.
fn new_offset(segment: &Segment, moved: &[(Segment, u64)]) -> Result<u64> {
    for (load, offset) in moved {
        let end = segment.offset + segment.size;
        if segment.offset >= load.offset && end <= load.offset + load.size {
            return Ok(offset + (segment.offset - load.offset));
        }
    }
    bail!("a program header of type {:#x} lies in no loaded segment", segment.kind)
}

fn segments(file: &[u8]) -> Result<Vec<Segment>> {
    let table = get(file, 32, 8)?;
    ensure!(get(file, 54, 2)? == PROGRAM_HEADER as u64, "odd size of program headers");
    let mut segments = Vec::new();
    for index in 0..get(file, 56, 2)? {
        let raw = slice(file, table + index * PROGRAM_HEADER as u64, PROGRAM_HEADER as u64)?;
        segments.push(Segment {
            raw: raw.try_into()?,
            kind: get(raw, 0, 4)?,
            offset: get(raw, 8, 8)?,
            address: get(raw, 16, 8)?,
            physical: get(raw, 24, 8)?,
            size: get(raw, 32, 8)?,
            memory: get(raw, 40, 8)?,
        });
    }
    Ok(segments)
}

fn slice(file: &[u8], offset: u64, size: u64) -> Result<&[u8]> {
    let end = offset.checked_add(size).context("a program header overflows")?;
    file.get(usize::try_from(offset)?..usize::try_from(end)?)
        .with_context(|| format!("a program header points to {offset:#x}, outside the file"))
}

fn get(bytes: &[u8], at: usize, width: usize) -> Result<u64> {
    let mut value = [0; 8];
    value[..width].copy_from_slice(bytes.get(at..at + width).context("ELF header cut short")?);
    Ok(u64::from_le_bytes(value))
}

fn put(bytes: &mut [u8], at: usize, width: usize, value: u64) -> Result<()> {
    let field = bytes.get_mut(at..at + width).context("ELF header cut short")?;
    field.copy_from_slice(&value.to_le_bytes()[..width]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two loaded segments far apart in the file, and a note within the first.
    fn kernel() -> Vec<u8> {
        let mut file = vec![0; 0x40_0000];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        put(&mut file, 32, 8, 64).unwrap();
        put(&mut file, 54, 2, 56).unwrap();
        put(&mut file, 56, 2, 3).unwrap();
        let headers =
            [(1, 0x20_0000, 0xffff_0000_u64, 16), (1, 0x30_0123, 0x1123, 5), (4, 0x20_0008, 0, 4)];
        for (index, (kind, offset, address, size)) in headers.into_iter().enumerate() {
            let at = 64 + index * 56;
            let fields = [(0, 4, kind), (8, 8, offset), (16, 8, address), (24, 8, address)];
            for (field, width, value) in
                fields.into_iter().chain([(32, 8, size), (40, 8, size + 8)])
            {
                put(&mut file, at + field, width, value).unwrap();
            }
        }
        file[0x20_0000..0x20_0010].copy_from_slice(b"text....note....");
        file[0x30_0123..0x30_0128].copy_from_slice(b"data!");
        file
    }

    #[test]
    fn segments_keep_content_and_address_and_lose_the_holes() {
        let packed = pack(&kernel()).unwrap();
        assert!(packed.len() < 3 * 4096, "{}", packed.len());
        let segments = segments(&packed).unwrap();
        let content =
            |index: usize| slice(&packed, segments[index].offset, segments[index].size).unwrap();
        assert_eq!(content(0), b"text....note....");
        assert_eq!(content(1), b"data!");
        assert_eq!(content(2), b"note");
        for segment in &segments[..2] {
            assert_eq!(segment.offset % 4096, segment.address % 4096);
        }
    }

    #[test]
    fn long_padding_within_a_segment_is_left_out() {
        let mut file = kernel();
        let size = 0x8_0000;
        put(&mut file, 64 + 32, 8, size).unwrap();
        put(&mut file, 64 + 40, 8, size + 8).unwrap();
        file[0x20_1000..0x27_0000].fill(0xcc);
        file[0x27_8000..0x27_8004].copy_from_slice(b"tail");
        let parts = segments(&pack(&file).unwrap()).unwrap();
        // One page, the padding, then from the tail to the end: code keeps its addresses.
        assert_eq!(parts.len(), 4);
        assert_eq!((parts[0].size, parts[0].memory), (0x1000, 0x1000));
        assert_eq!(parts[1].address, 0xffff_0000 + 0x7_8000);
        assert_eq!(parts[1].physical, parts[1].address);
        assert_eq!((parts[1].size, parts[1].memory), (0x8000, 0x8008));
    }

    #[test]
    fn packing_twice_changes_nothing() {
        let once = pack(&kernel()).unwrap();
        assert_eq!(pack(&once).unwrap(), once);
    }

    #[test]
    fn a_section_is_found_by_its_whole_name() {
        let mut file = vec![0; 0x400];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let names = b"\0.note\0.no\0.names\0";
        file[0x40..0x40 + names.len()].copy_from_slice(names);
        for (at, width, value) in [(40, 8, 0x100), (58, 2, 64), (60, 2, 3), (62, 2, 2)] {
            put(&mut file, at, width, value).unwrap();
        }
        for (index, (name, offset, size)) in
            [(1, 0x80, 4), (7, 0x84, 3), (11, 0x40, names.len() as u64)].into_iter().enumerate()
        {
            let at = 0x100 + index * 64;
            put(&mut file, at, 4, name).unwrap();
            put(&mut file, at + 24, 8, offset).unwrap();
            put(&mut file, at + 32, 8, size).unwrap();
        }
        file[0x80..0x87].copy_from_slice(b"noteno!");
        assert_eq!(section(&file, ".no").unwrap(), Some(&b"no!"[..]));
        assert_eq!(section(&file, ".note").unwrap(), Some(&b"note"[..]));
        assert_eq!(section(&file, ".n").unwrap(), None);
        put(&mut file, 0x140 + 24, 8, u64::MAX).unwrap();
        assert!(section(&file, ".no").is_err());
        assert!(section(b"#!/bin/sh", ".no").is_err());
    }

    #[test]
    fn wrong_files_are_refused() {
        assert!(pack(b"\x7fELF\x01\x01").is_err());
        assert!(pack(b"#!/bin/sh").is_err());
        let mut outside = kernel();
        put(&mut outside, 64 + 8, 8, u64::MAX).unwrap();
        assert!(pack(&outside).is_err());
        let mut stray = kernel();
        put(&mut stray, 64 + 2 * 56 + 8, 8, 0).unwrap();
        assert!(pack(&stray).unwrap_err().to_string().contains("no loaded segment"));
    }
}
