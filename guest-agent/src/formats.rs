//! The host's formats of binfmt_misc, registered in the guest's kernel, where they hold for all
//! containers, as the host's do.
//!
//! The kernel opens an interpreter with the flag F when the format is registered, by its path. On
//! the host that path need not be in any container; here it is in a mount namespace that has the
//! interpreters of the share and nothing else. Nobody is ever in it again, but it must stay: the
//! kernel shows the path of an open file only as far as its mounts are mounted.

// UNSAFETY: unshare(2) is unsafe in rustix, because it may separate the files of threads.
#![expect(unsafe_code, reason = "unshare(2) in a thread of its own")]

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;

use bulkhead_protocol::agent::{Format, FormatsRequest, InterpreterFile, Magic, format::Files};
use bulkhead_protocol::{FORMATS_DIR, SHARE_DIR};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Where the new root is mounted before it is the root.
const STAGE: &str = "/run";

/// What the kernel needs for the formats to stay as they are.
#[derive(Debug)]
pub(crate) struct Registered {
    /// The kernel forgets all formats when binfmt_misc is mounted nowhere.
    _file_system: OwnedFd,
    /// Keeps the interpreters mounted at their paths.
    _interpreters: File,
}

/// Registers formats. One that the kernel refuses is left out.
///
/// # Errors
/// No format can be registered.
pub(crate) fn register(request: FormatsRequest) -> io::Result<Registered> {
    // The thread leaves its root and its mounts for ever.
    let thread = thread::Builder::new().name("formats".into());
    let registered = thread.spawn(move || register_apart(request))?.join();
    registered.unwrap_or_else(|_| Err(io::Error::other("thread failed")))
}

fn register_apart(request: FormatsRequest) -> io::Result<Registered> {
    // The kernel asks for its module here, so it must be before the share is out of sight.
    let file_system = mount_alone("binfmt_misc")?;
    let files: Vec<_> =
        request.formats.iter().map(|format| format.file.as_ref().map(open)).collect();
    let interpreters = leave_root()?;
    for (format, file) in request.formats.iter().zip(files) {
        let registered = file
            .transpose()
            .and_then(|file| format.file.as_ref().zip(file).map_or(Ok(()), |it| place(format, it)))
            .and_then(|()| add(file_system.as_fd(), format));
        if let Err(error) = registered {
            let name = String::from_utf8_lossy(&format.name);
            tracing::warn!(%name, %error, "a format of the host is not the guest's");
        }
    }
    if request.disabled {
        write(file_system.as_fd(), b"status", b"0")?;
    }
    Ok(Registered { _file_system: file_system, _interpreters: interpreters })
}

/// Takes an interpreter out of the share.
fn open(file: &InterpreterFile) -> io::Result<OwnedFd> {
    let path = Path::new(SHARE_DIR).join(FORMATS_DIR).join(file.number.to_string());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, path, flags)?)
}

/// Moves this thread into a mount namespace with an empty root; returns the namespace.
fn leave_root() -> io::Result<File> {
    // SAFETY: the thread shares no files by this, only no mounts, root and current directory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let namespace = File::open("/proc/thread-self/ns/mnt")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    attach(mount_alone("tmpfs")?.as_fd(), Path::new(STAGE))?;
    chdir(STAGE)?;
    // The old root is on top of the new one then (pivot_root(2)).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(namespace)
}

/// Puts an interpreter where its format looks for it, under its own path, which programs see.
fn place(format: &Format, (file, mount): (&InterpreterFile, OwnedFd)) -> io::Result<()> {
    let named = Path::new("/").join(OsStr::from_bytes(&format.interpreter));
    let path = Path::new("/").join(OsStr::from_bytes(&file.path));
    for directory in [&named, &path].into_iter().filter_map(|path| path.parent()) {
        DirBuilder::new().recursive(true).create(directory)?;
    }
    // Formats may have the same interpreter; the last mount is what the kernel finds.
    if !fs::exists(&path)? {
        File::create(&path)?;
    }
    attach(mount.as_fd(), &path)?;
    match symlink(&path, &named) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Registers a format.
fn add(file_system: BorrowedFd<'_>, format: &Format) -> io::Result<()> {
    write(file_system, b"register", &line(format).ok_or(io::ErrorKind::InvalidInput)?)?;
    if format.disabled {
        write(file_system, &format.name, b"0")?;
    }
    Ok(())
}

fn write(directory: BorrowedFd<'_>, name: &[u8], content: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(openat(directory, name, flags, Mode::empty())?);
    // The kernel takes each write for a whole line.
    match file.write(content)? {
        length if length == content.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// What is written to register a format (binfmt-misc.rst in the kernel's documentation).
fn line(format: &Format) -> Option<Vec<u8>> {
    let none = Vec::new();
    let (kind, offset, content, mask) = match format.files.as_ref()? {
        Files::Extension(extension) => ("E", String::new(), extension, &none),
        Files::Magic(Magic { offset, bytes, mask }) => ("M", offset.to_string(), bytes, mask),
    };
    let names = [&format.name, &format.interpreter, if kind == "E" { content } else { &none }];
    // Any byte can be between the fields that is in none of them: not in a name or a path, which
    // cannot be escaped, nor among the digits and letters of the others.
    let free = |byte: &u8| !names.iter().any(|name| name.contains(byte));
    let between =
        *b":|;,%^~".iter().chain(b"\x01\x02\x03\x04\x05\x06\x07").find(|byte| free(byte))?;
    let escaped = |bytes: &[u8]| match kind {
        "E" => bytes.to_vec(),
        _ => escape(bytes, between),
    };
    let file = if format.file.is_some() { "F" } else { "" };
    let fields: [&[u8]; 7] = [
        &format.name,
        kind.as_bytes(),
        offset.as_bytes(),
        &escaped(content),
        &escaped(mask),
        &format.interpreter,
        &[format.flags.as_bytes(), file.as_bytes()].concat(),
    ];
    Some(fields.iter().fold(Vec::new(), |line, field| [&line[..], &[between], field].concat()))
}

/// Escapes what cannot be written as it is. The kernel takes lines of 1920 bytes, and a magic and a
/// mask may have 256 bytes each, so most bytes must stay one.
fn escape(bytes: &[u8], between: u8) -> Vec<u8> {
    let escaped = |byte: &u8| match *byte {
        byte if byte == 0 || byte == b'\\' || byte == between => format!("\\x{byte:02x}").into(),
        byte => vec![byte],
    };
    bytes.iter().flat_map(escaped).collect()
}

/// Mounts a file system that has no options nowhere.
fn mount_alone(kind: &str) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn attach(mount: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    Ok(move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(name: &str, files: Files, interpreter: &str) -> Format {
        Format {
            name: name.into(),
            interpreter: interpreter.into(),
            files: Some(files),
            ..Format::default()
        }
    }

    fn magic(offset: u32, bytes: &[u8], mask: &[u8]) -> Files {
        Files::Magic(Magic { offset, bytes: bytes.into(), mask: mask.into() })
    }

    #[test]
    fn a_format_is_written_as_the_kernel_reads_it() {
        let jar = format("jar", magic(0, b"PK\x03\x04", b""), "/usr/bin/jexec");
        assert_eq!(line(&jar).unwrap(), b":jar:M:0:PK\x03\x04::/usr/bin/jexec:");
        let elf = magic(4, b"\x7fE\0\\x:", b"\xff\xff\0\xfe\\:");
        let file = Some(InterpreterFile::default());
        let qemu = Format { flags: "POC".into(), file, ..format("qemu", elf, "/q") };
        let expected = b":qemu:M:4:\x7fE\\x00\\x5cx\\x3a:\xff\xff\\x00\xfe\\x5c\\x3a:/q:POCF";
        assert_eq!(line(&qemu).unwrap(), expected);
        let extension = format("e", Files::Extension(b"a\\b".to_vec()), "/i");
        assert_eq!(line(&extension).unwrap(), b":e:E::a\\b::/i:");
    }

    #[test]
    fn fields_are_told_apart_whatever_is_in_them() {
        let odd = format("a:b", Files::Extension(b"x|y".to_vec()), "/i;j");
        assert_eq!(line(&odd).unwrap(), b",a:b,E,,x|y,,/i;j,");
        let all = format(":|;,%^~\x01\x02\x03\x04\x05\x06\x07", magic(0, b"x", b""), "/i");
        assert_eq!(line(&all), None);
        assert_eq!(line(&Format { name: b"x".to_vec(), ..Format::default() }), None);
    }
}
