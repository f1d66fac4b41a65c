//! The initramfs: a cpio archive in the "newc" format of the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`, uncompressed.
//!
//! Device nodes are only entries of the archive, so no root is needed. Inodes are numbered in
//! order, times are zero, and the entries are fixed, so the same program gives the same bytes. The
//! archive holds the program as `/init`, the console, and the directories that the program mounts
//! on. A pod's initramfs holds nothing else; the test host's may hold further files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The largest archive, in bytes: all of it takes memory in every pod until the agent runs.
pub const MAX_SIZE: usize = 8 << 20;

const DIRECTORIES: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;
const CONSOLE: (u32, u32) = (5, 1);

/// One member of an archive.
#[derive(Debug)]
struct Entry<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    data: &'a [u8],
}

/// Writes the initramfs with this agent, first under a temporary name.
///
/// # Errors
/// When the agent cannot be read, is not a static ELF file, is too large, or the output cannot be
/// written.
pub fn write(agent: &Path, output: &Path) -> Result<usize> {
    let program = fs::read(agent).with_context(|| format!("read the agent {}", agent.display()))?;
    ensure!(program.starts_with(b"\x7fELF"), "{} is not an ELF file", agent.display());
    let archive = archive(&program, &[])?;
    ensure!(
        archive.len() <= MAX_SIZE,
        "the initramfs would be {} bytes, more than {MAX_SIZE}: the agent {} has {} (is it a stripped \
         release build?)",
        archive.len(),
        agent.display(),
        program.len()
    );
    let partial = output.with_extension("partial");
    fs::write(&partial, &archive).with_context(|| format!("write {}", partial.display()))?;
    fs::rename(&partial, output).with_context(|| format!("rename to {}", output.display()))?;
    Ok(archive.len())
}

/// The bytes of an archive with this program and further files, each a name and its content.
///
/// # Errors
/// When a file is too large for the format.
pub fn archive(program: &[u8], files: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut entries: Vec<Entry<'_>> = DIRECTORIES
        .iter()
        .map(|name| Entry { name, mode: S_IFDIR | 0o755, device: (0, 0), data: &[] })
        .collect();
    entries.push(Entry { name: "dev/console", mode: S_IFCHR | 0o600, device: CONSOLE, data: &[] });
    entries.push(Entry { name: "init", mode: S_IFREG | 0o755, device: (0, 0), data: program });
    let file = |(name, data)| Entry { name, mode: S_IFREG | 0o644, device: (0, 0), data };
    entries.extend(files.iter().map(|(name, data)| (name.as_str(), data.as_slice())).map(file));
    entries.sort_by_key(|entry| entry.name);
    let mut archive = Vec::with_capacity(program.len() + 4096);
    for (number, entry) in (1..).zip(&entries) {
        append(&mut archive, number, entry)?;
    }
    let trailer = Entry { name: "TRAILER!!!", mode: 0, device: (0, 0), data: &[] };
    append(&mut archive, 0, &trailer)?;
    Ok(archive)
}

/// Appends an entry: a header with a magic number and thirteen fields of eight hexadecimal digits,
/// the name with its NUL, and the data. Header with name, and data, are each padded to four bytes.
fn append(archive: &mut Vec<u8>, inode: u32, entry: &Entry<'_>) -> Result<()> {
    let links = if entry.mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
    let fields = [
        inode,
        entry.mode,
        0, // uid
        0, // gid
        links,
        0, // mtime
        u32::try_from(entry.data.len()).context("file too large for a cpio archive")?,
        0, // major and minor of the device that held the file
        0,
        entry.device.0,
        entry.device.1,
        u32::try_from(entry.name.len() + 1).context("name too long for a cpio archive")?,
        0, // checksum, unused in this format
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(entry.name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(entry.data);
    pad(archive);
    Ok(())
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn first_entry_has_the_bytes_of_the_format() {
        let archive = archive(b"\x7fELF", &[]).unwrap();
        let header = concat!(
            "070701", "00000001", "000041ED", "00000000", "00000000", "00000002", "00000000",
            "00000000", "00000000", "00000000", "00000000", "00000000", "00000004", "00000000",
            "dev\0"
        );
        assert_eq!(&archive[..header.len()], header.as_bytes());
        assert_eq!(&archive[116..122], b"070701");
    }

    #[test]
    fn entries_and_data_start_on_four_bytes_for_every_length() {
        for length in 0..9_usize {
            let data = vec![b'x'; length];
            let mut bytes = Vec::new();
            let entry = Entry { name: "init", mode: S_IFREG, device: (0, 0), data: &data };
            append(&mut bytes, 1, &entry).unwrap();
            assert_eq!(bytes.len() % 4, 0);
            assert_eq!(bytes.len(), 116 + length.next_multiple_of(4));
        }
    }

    #[test]
    fn same_agent_gives_the_same_bytes() {
        assert_eq!(archive(b"agent", &[]).unwrap(), archive(b"agent", &[]).unwrap());
    }

    #[test]
    fn too_large_agent_is_refused_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let agent = directory.path().join("agent");
        let mut program = b"\x7fELF".to_vec();
        program.resize(MAX_SIZE, 0);
        fs::write(&agent, program).unwrap();
        let error = write(&agent, &directory.path().join("out")).unwrap_err().to_string();
        assert!(error.contains("more than 8388608"), "{error}");
        assert!(!directory.path().join("out").exists());
    }

    /// Reads the archive with busybox's cpio as well.
    #[test]
    fn busybox_lists_exactly_the_entries() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("initramfs.cpio");
        let files = [("further".to_owned(), b"file".to_vec())];
        fs::write(&path, archive(b"\x7fELF agent", &files).unwrap()).unwrap();
        let listing = Command::new("busybox")
            .args(["cpio", "-t"])
            .stdin(fs::File::open(&path).unwrap())
            .stderr(Stdio::null())
            .output()
            .unwrap();
        let names = String::from_utf8(listing.stdout).unwrap();
        assert_eq!(names, "dev\ndev/console\nfurther\ninit\nproc\nrun\nsys\ntmp\n");
    }
}
