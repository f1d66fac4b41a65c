//! The disks of a machine. A disk stays attached until the machine ends.
//!
//! A disk whose file system is mounted belongs to one machine, or to several that only read it: two
//! kernels that write to one file system destroy it. A lock of the whole file (`flock(2)`) says so,
//! and for a block device `O_EXCL`, which the host's own mounts respect. Both hold as long as the
//! monitor has the disk open.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_protocol::agent;
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::PodError;
use crate::bundle::{DISKS_MAX, Disk, FileSystem};
use crate::machine::monitor::Machine;

/// Where the programs are that make file systems.
const PROGRAMS: &str = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How much of a disk has to be zero for it to be empty. The file systems have their first block
/// here, and so have partition tables and the headers of LVM and LUKS.
const BLANK: u64 = 1 << 20;

/// The disks that a machine has, by their slots.
#[derive(Debug, Default)]
pub(super) struct Disks(Mutex<Vec<Attached>>);

#[derive(Debug)]
struct Attached {
    /// Which file it is, if its file system is mounted: another container gets the same disk.
    file: Option<Identity>,
    read_only: bool,
}

/// Whether it is a block device, then its number; or else its file system and its inode.
type Identity = (bool, u64, u64);

impl Disks {
    /// Attaches a disk to the machine, and returns it as the agent needs it.
    pub(super) async fn attach(
        &self,
        machine: &Machine,
        disk: &Disk,
    ) -> Result<agent::Disk, PodError> {
        let failed = |error| PodError::Disk(disk.source.clone(), error);
        let mut attached = self.0.lock().await;
        let file = match disk.file_system {
            Some(_) => Some(identity(&disk.source).map_err(failed)?),
            None => None,
        };
        let named = |serial| agent::Disk {
            path: disk.path.display().to_string(),
            serial,
            mounted: disk.file_system.is_some(),
        };
        let known = attached.iter().position(|it| file.is_some() && it.file == file);
        if let Some(index) = known {
            if attached[index].read_only && !disk.read_only {
                let why = "another container of the pod has it read-only";
                return Err(failed(io::Error::other(why)));
            }
            return Ok(named(serial(index)));
        }
        let opening = disk.clone();
        let open = spawn_blocking(move || match &opening.file_system {
            Some(file_system) => open_volume(&opening, file_system),
            None => opening.open(),
        });
        let open = open.await.map_err(io::Error::other).flatten().map_err(failed)?;
        let serial =
            give(machine, &mut attached, &open, Attached { file, read_only: disk.read_only });
        Ok(named(serial.await?))
    }

    /// Attaches a file that no container has as a disk; returns its serial number.
    pub(super) async fn attach_file(
        &self,
        machine: &Machine,
        file: &File,
    ) -> Result<String, PodError> {
        let own = Attached { file: None, read_only: false };
        give(machine, &mut *self.0.lock().await, file, own).await
    }
}

/// Gives a disk the next slot; returns its serial number.
async fn give(
    machine: &Machine,
    attached: &mut Vec<Attached>,
    open: &File,
    disk: Attached,
) -> Result<String, PodError> {
    let index = attached.len();
    let slot = u8::try_from(index).ok().filter(|_| index < DISKS_MAX).ok_or(PodError::Disks)?;
    machine.attach_disk(slot, open, disk.read_only, serial(index)).await?;
    // A disk that cannot be attached leaves its slot to the next one.
    attached.push(disk);
    Ok(serial(index))
}

/// The serial number of the disk in a slot.
fn serial(index: usize) -> String {
    format!("bulkhead-{index}")
}

fn identity(path: &Path) -> io::Result<Identity> {
    let metadata = fs::metadata(path)?;
    Ok(match metadata.file_type().is_block_device() {
        true => (true, metadata.rdev(), 0),
        false => (false, metadata.dev(), metadata.ino()),
    })
}

/// Opens a disk whose file system is mounted, and makes that on an empty disk if it is to be made.
fn open_volume(disk: &Disk, file_system: &FileSystem) -> io::Result<File> {
    let file = disk.open()?;
    lock(&file, disk.read_only)?;
    if file_system.make && !disk.read_only && is_blank(&file)? {
        make(file_system.kind, &disk.source)?;
    }
    if disk.read_only || !file.metadata()?.file_type().is_block_device() {
        return Ok(file);
    }
    // The program that makes file systems does not work on a device that is claimed.
    drop(file);
    let exclusive = OFlags::EXCL.bits().cast_signed();
    let file = File::options().read(true).write(true).custom_flags(exclusive).open(&disk.source);
    let file = file.map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => io::Error::other("the host has it mounted or in use"),
        _ => error,
    })?;
    lock(&file, false)?;
    Ok(file)
}

fn lock(file: &File, read_only: bool) -> io::Result<()> {
    let operation = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(file, operation) {
        Err(Errno::AGAIN) => Err(io::Error::other("another machine or program uses it")),
        result => Ok(result?),
    }
}

fn is_blank(file: &File) -> io::Result<bool> {
    let mut start = Vec::new();
    file.take(BLANK).read_to_end(&mut start)?;
    Ok(!start.is_empty() && start.iter().all(|byte| *byte == 0))
}

/// Makes a file system on an empty disk.
fn make(kind: &str, disk: &Path) -> io::Result<()> {
    let program = format!("mkfs.{kind}");
    let mut command = Command::new(&program);
    command.env("PATH", PROGRAMS).stdin(Stdio::null()).arg("-q");
    if kind == "ext4" {
        // Otherwise it asks whether a file is meant.
        command.arg("-F");
    }
    let output = command.arg(disk).output().map_err(|error| {
        let packages = "it is in e2fsprogs, xfsprogs or btrfs-progs";
        io::Error::new(error.kind(), format!("cannot run {program} ({packages}): {error}"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program} failed: {}", words.trim())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn image(bytes: &[u8], length: u64) -> (tempfile::TempDir, Disk) {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("image");
        fs::write(&source, bytes).unwrap();
        File::options().write(true).open(&source).unwrap().set_len(length).unwrap();
        let file_system = Some(FileSystem { kind: "ext4", make: true });
        let disk = Disk { path: "/d".into(), source, read_only: false, file_system };
        (directory, disk)
    }

    fn open(disk: &Disk) -> io::Result<File> {
        open_volume(disk, disk.file_system.as_ref().unwrap())
    }

    #[test]
    fn an_empty_disk_gets_a_file_system_once() {
        let (_directory, disk) = image(b"", 8 << 20);
        let magic = |file: &File| {
            let mut bytes = [0; 2];
            file.read_exact_at(&mut bytes, 1024 + 56).unwrap();
            bytes
        };
        let file = open(&disk).unwrap();
        assert_eq!(magic(&file), [0x53, 0xef]);
        // Something that mkfs would overwrite.
        file.write_all_at(b"mine", 1024 + 120).unwrap();
        drop(file);
        let mut label = [0; 4];
        open(&disk).unwrap().read_exact_at(&mut label, 1024 + 120).unwrap();
        assert_eq!(&label, b"mine");
    }

    #[test]
    fn what_is_on_a_disk_stays() {
        let (_directory, disk) = image(b"data of somebody", 8 << 20);
        let mut start = [0; 16];
        open(&disk).unwrap().read_exact_at(&mut start, 0).unwrap();
        assert_eq!(&start, b"data of somebody");
        let (_directory, empty) = image(b"", 0);
        assert!(!is_blank(&open(&empty).unwrap()).unwrap(), "nothing can be made in no bytes");
    }

    #[test]
    fn one_machine_writes_or_several_read() {
        let (_directory, disk) = image(b"data", 8 << 20);
        let reader = Disk { read_only: true, ..disk.clone() };
        let writes = open(&disk).unwrap();
        for other in [&disk, &reader] {
            let error = open(other).unwrap_err().to_string();
            assert!(error.contains("another machine or program"), "{error}");
        }
        drop(writes);
        let _reads = (open(&reader).unwrap(), open(&reader).unwrap());
        assert!(open(&disk).is_err());
    }

    #[test]
    fn a_file_system_that_cannot_be_made_says_why() {
        let (_directory, disk) = image(b"", 4096);
        let error = open(&disk).unwrap_err().to_string();
        assert!(error.contains("mkfs.ext4 failed: "), "{error}");
    }
}
