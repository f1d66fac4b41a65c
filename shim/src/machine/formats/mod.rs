//! The host's formats of binfmt_misc, which hold in the guest too: in a container of runc the host's
//! kernel runs what they are registered for.
//!
//! They are read from a mount of our own, which is attached nowhere, because a host need not have
//! mounted binfmt_misc, and looking for it at its usual path could mount it and load its module.
//! What the host registers later is not followed.

mod entry;
mod held;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use bulkhead_protocol::agent::{FormatsRequest, InterpreterFile};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, fstat, openat};
use rustix::mount::MountAttrFlags;
use tokio::task::spawn_blocking;

use self::entry::Entry;
use crate::machine::share::{self, Interpreter};

/// The name of the file system.
const KIND: &str = "binfmt_misc";
/// The most formats that are taken over: those that were registered last.
const FORMATS_MAX: usize = 256;
/// The most bytes of the description of a format: the kernel makes one page at most.
const ENTRY_MAX: u64 = 4096;
/// The most bytes of interpreters that are copied into a pod's memory, of all of them together.
const COPIES_MAX: u64 = 64 << 20;
/// PROC_USER_INIT_INO: the inode of the user namespace that the kernel starts with.
const FIRST_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// Formats, and the files of the interpreters that are not those of the container.
#[derive(Debug)]
pub(crate) struct Formats {
    /// As the agent registers them.
    pub(crate) request: FormatsRequest,
    /// As they are numbered in the request.
    pub(crate) interpreters: Vec<Interpreter>,
}

/// The formats of this host; `None` if there are none, or if they cannot be read.
pub(crate) async fn of_host() -> Option<Formats> {
    let read = spawn_blocking(read).await.unwrap_or_else(|error| Err(error.into()));
    read.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read the host's formats of binfmt_misc");
        None
    })
}

fn read() -> io::Result<Option<Formats>> {
    // The kernel would load a module for an unknown file system. In another user namespace than the
    // first it would make an empty list of formats, which from then on hides those of the host.
    let known = fs::read_to_string("/proc/filesystems")?;
    if !known.lines().any(|line| line.split_whitespace().last() == Some(KIND))
        || fs::metadata("/proc/self/ns/user")?.ino() != FIRST_USER_NAMESPACE
    {
        return Ok(None);
    }
    let mount = share::mount_nowhere(KIND, &[], MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    let entries = entries(mount.as_fd())?;
    if entries.is_empty() {
        return Ok(None);
    }
    let status = read_file(mount.as_fd(), b"status")?;
    Ok(Some(collect(entries, status == b"disabled\n")))
}

/// The formats in the order in which the kernel tries them: it lists the files of a directory in the
/// reverse order of their making.
fn entries(directory: BorrowedFd<'_>) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for file in Dir::new(openat(directory, ".", flags, Mode::empty())?)? {
        let file = file?;
        let name = file.file_name().to_bytes();
        if matches!(name, b"." | b".." | b"status" | b"register") {
            continue;
        }
        if entries.len() == FORMATS_MAX {
            tracing::warn!("the host has more than {FORMATS_MAX} formats; the oldest are left out");
            break;
        }
        match read_file(directory, name).map(|text| Entry::parse(name, &text)) {
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) => warn(name, "its description is not understood"),
            Err(error) => warn(name, &error.to_string()),
        }
    }
    Ok(entries)
}

fn read_file(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(openat(directory, name, flags, Mode::empty())?);
    let mut text = Vec::new();
    file.take(ENTRY_MAX).read_to_end(&mut text)?;
    Ok(text)
}

/// Finds the interpreters' files.
fn collect(entries: Vec<Entry>, disabled: bool) -> Formats {
    let (mut interpreters, mut room) = (Vec::new(), COPIES_MAX);
    let mut formats = Vec::new();
    for (number, entry) in entries.iter().enumerate() {
        let mut format = entry.format.clone();
        if entry.keeps_file {
            let newer = (!disabled).then_some(&entries[..number]);
            match find(entry, newer, &mut room) {
                Ok((path, interpreter)) => {
                    let number = u32::try_from(interpreters.len()).unwrap_or(u32::MAX);
                    format.file = Some(InterpreterFile { number, path });
                    interpreters.push(interpreter);
                }
                Err(error) => {
                    warn(&format.name, &format!("its interpreter: {error}"));
                    continue;
                }
            }
        }
        formats.push(format);
    }
    formats.reverse();
    Formats { request: FormatsRequest { formats, disabled }, interpreters }
}

/// The file of an interpreter, and its path. Usually it is where it was when the format was
/// registered. `newer` are the formats that the kernel tries before this one, if it tries any.
fn find(
    entry: &Entry,
    newer: Option<&[Entry]>,
    room: &mut u64,
) -> io::Result<(Vec<u8>, Interpreter)> {
    let path = Path::new(OsStr::from_bytes(&entry.format.interpreter));
    let file = match open(path) {
        Ok(file) => file,
        Err(error) => match newer.filter(|_| !entry.format.disabled) {
            Some(newer) => held::by_kernel(entry, newer)?.into(),
            None => return Err(error),
        },
    };
    let path = path_of(file.as_fd()).unwrap_or_else(|| entry.format.interpreter.clone());
    let attributes = fstat(&file)?;
    // The kernel attaches no mount of a file that has lost its name.
    if attributes.st_nlink > 0
        && let Ok(mount) = share::alone(file.as_fd(), true, false)
    {
        return Ok((path, Interpreter::Mount(mount)));
    }
    // Or it is on a mount that is not in our mount namespace, or in none any more.
    let size = attributes.st_size.cast_unsigned();
    *room = room.checked_sub(size).ok_or_else(|| {
        io::Error::other(format!(
            "no path leads to it, and copies take more than {COPIES_MAX} bytes"
        ))
    })?;
    let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok((path, Interpreter::Copy(file, size)))
}

/// Opens what an interpreter's path leads to.
fn open(path: &Path) -> io::Result<OwnedFd> {
    if !path.is_absolute() {
        return Err(io::Error::other("its path is not absolute"));
    }
    let file = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mode = fstat(&file)?.st_mode;
    // The kernel has opened a program. Where that was in a container, somebody else may have put
    // something else here, which is nothing for the guest.
    if FileType::from_raw_mode(mode) == FileType::RegularFile && mode & 0o111 != 0 {
        Ok(file)
    } else {
        Err(io::Error::other("it is no program"))
    }
}

/// The path of an open file.
fn path_of(file: BorrowedFd<'_>) -> Option<Vec<u8>> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = fs::read_link(link).ok()?.into_os_string().into_vec();
    let path = path.strip_suffix(b" (deleted)").unwrap_or(&path);
    // The root of a mount that is in no namespace has no other path than this.
    (path.starts_with(b"/") && path != b"/").then(|| path.to_vec())
}

/// Says that a format is left out.
fn warn(name: &[u8], why: &str) {
    let name = String::from_utf8_lossy(name);
    tracing::warn!(%name, why, "a format of the host is not the guest's");
}
