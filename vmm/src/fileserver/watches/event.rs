//! Events as fanotify(7) writes them, and as the guest's kernel reads them.

use super::group::Key;
use crate::fileserver::wire::{Reply, u32_at, u64_at};

/// Events, which have the same bits in inotify(7).
pub(super) mod bit {
    pub(crate) const ACCESS: u32 = 0x1;
    pub(crate) const MODIFY: u32 = 0x2;
    pub(crate) const ATTRIB: u32 = 0x4;
    pub(crate) const CLOSE_WRITE: u32 = 0x8;
    pub(crate) const CLOSE_NOWRITE: u32 = 0x10;
    pub(crate) const OPEN: u32 = 0x20;
    pub(crate) const MOVED_FROM: u32 = 0x40;
    pub(crate) const MOVED_TO: u32 = 0x80;
    pub(crate) const CREATE: u32 = 0x100;
    pub(crate) const DELETE: u32 = 0x200;
    pub(crate) const DELETE_SELF: u32 = 0x400;
    pub(crate) const MOVE_SELF: u32 = 0x800;
    pub(crate) const MOVED: u32 = MOVED_FROM | MOVED_TO;
    /// The file is a directory.
    pub(crate) const DIRECTORY: u32 = 0x4000_0000;
    /// `FAN_EVENT_ON_CHILD`.
    pub(crate) const ON_CHILD: u32 = 0x0800_0000;
    /// `FAN_RENAME`: both names of a file that is renamed.
    pub(crate) const RENAME: u32 = 0x1000_0000;
    /// What happens to the file itself, whatever its name.
    pub(crate) const ITSELF: u32 = ON_CHILDREN | DELETE_SELF | MOVE_SELF;
    /// What a directory is told of a name in it.
    pub(crate) const OF_NAMES: u32 = ON_CHILDREN | CREATE | DELETE;
    /// What happens to files, and is told to the directory above.
    const ON_CHILDREN: u32 = ACCESS | MODIFY | ATTRIB | CLOSE_WRITE | CLOSE_NOWRITE | OPEN;
}

/// In which order events are told that the kernel has merged. A name that is there was deleted
/// before it was created.
const ORDER: [u32; 9] = [
    bit::CREATE,
    bit::OPEN,
    bit::ACCESS,
    bit::MODIFY,
    bit::ATTRIB,
    bit::CLOSE_WRITE,
    bit::CLOSE_NOWRITE,
    bit::DELETE,
    bit::MOVE_SELF,
];

/// The events of a mask one by one.
pub(super) fn one_by_one(mask: u32, name_is_there: bool) -> impl Iterator<Item = u32> {
    let first = if name_is_there { mask & bit::DELETE } else { 0 };
    let rest = ORDER.into_iter().filter(move |event| mask & !first & event != 0);
    (first != 0).then_some(first).into_iter().chain(rest)
}

/// A file that an event is about: its directory and its name there, or itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    Itself(Key),
    Named(Key, Vec<u8>),
    /// The name from which a file was renamed, and to which.
    From(Key, Vec<u8>),
    To(Key, Vec<u8>),
}

/// What the kernel reports at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) mask: u32,
    /// Who did it; 0 for a process of which this one may not know.
    pub(super) process: i32,
    pub(super) subjects: Vec<Subject>,
}

/// `struct fanotify_event_metadata`.
const METADATA: usize = 24;
/// `FAN_EVENT_INFO_TYPE_FID`, `DFID_NAME`, `DFID`, `OLD_DFID_NAME` and `NEW_DFID_NAME`.
const FILE: u8 = 1;
const DIRECTORY_AND_NAME: u8 = 2;
const DIRECTORY: u8 = 3;
const OLD_NAME: u8 = 10;
const NEW_NAME: u8 = 12;
/// What precedes the bytes of a handle: type and length of the record, the file system, their
/// number and their type.
const RECORD: usize = 20;

impl Event {
    /// Takes the next event off what was read.
    pub(super) fn take(buffer: &mut &[u8]) -> Option<Self> {
        let length = u32_at(buffer, 0)? as usize;
        let (event, rest) = buffer.split_at_checked(length.max(METADATA))?;
        *buffer = rest;
        // The upper half of the mask is of no use here.
        let (mask, process) = (u32_at(event, 8)?, u32_at(event, 20)?.cast_signed());
        let mut subjects = Vec::new();
        let mut records = &event[METADATA..];
        while let [kind, _, low, high, ..] = *records {
            let length = usize::from(u16::from_le_bytes([low, high]));
            let Some((record, rest)) = records.split_at_checked(length.max(4)) else { break };
            records = rest;
            // Both records of a directory itself, its own and that of its name ".", mean the same.
            subjects.extend(subject(kind, record).filter(|subject| !subjects.contains(subject)));
        }
        Some(Self { mask, process, subjects })
    }
}

fn subject(kind: u8, record: &[u8]) -> Option<Subject> {
    let (file_system, length) = (u64_at(record, 4)?, u32_at(record, 12)? as usize);
    // With the type.
    let handle = record.get(RECORD - 4..RECORD.checked_add(length)?)?;
    let key = Key { file_system, handle: handle.into() };
    let name = || {
        let bytes = &record[RECORD + length..];
        bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
    };
    Some(match kind {
        FILE | DIRECTORY => Subject::Itself(key),
        DIRECTORY_AND_NAME => match name() {
            name if name == b"." => Subject::Itself(key),
            name => Subject::Named(key, name),
        },
        OLD_NAME => Subject::From(key, name()),
        NEW_NAME => Subject::To(key, name()),
        _ => return None,
    })
}

/// What the guest is told, `struct fuse_watch_event` of our patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) node: u64,
    pub(super) mask: u32,
    pub(super) cookie: u32,
    /// The name in the directory that is watched; empty for what is watched itself.
    pub(super) name: Vec<u8>,
}

/// What precedes the name.
const REPORT: usize = 24;

impl Report {
    /// How many bytes it has in a reply.
    pub(super) fn size(&self) -> usize {
        REPORT + self.name.len().next_multiple_of(8)
    }

    pub(super) fn put(&self, reply: &mut Reply<'_>) {
        // Names have 255 bytes at most.
        let length = u32::try_from(self.name.len()).unwrap_or_default();
        reply.put_u64s([self.node]);
        reply.put_u32s([self.mask, self.cookie, length, 0]);
        reply.put(&self.name);
        reply.put(&[0; 8][..self.name.len().next_multiple_of(8) - self.name.len()]);
    }
}
