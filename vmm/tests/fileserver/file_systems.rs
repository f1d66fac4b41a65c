//! File systems under a pod's files: what the guest's root may do, the server can do on them.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::pod::{Pod, as_user};

const OWNER: u32 = 5000;

/// A file system of the host, with a place in the share.
struct Shared {
    host: PathBuf,
    guest: PathBuf,
    /// The loop device, if there is one.
    device: Option<String>,
}

impl Shared {
    fn new(pod: &Pod, kind: &str) -> Self {
        let scratch = pod.other_host();
        let host = scratch.join("mounted");
        fs::create_dir(&host).unwrap();
        let device = match kind {
            "tmpfs" => {
                mount("tmpfs", &host, "tmpfs", MountFlags::empty(), None).unwrap();
                None
            }
            "overlay" => {
                let mut options = Vec::new();
                for directory in ["lowerdir", "upperdir", "workdir"] {
                    let path = scratch.join(directory);
                    fs::create_dir(&path).unwrap();
                    options.push(format!("{directory}={}", path.display()));
                }
                // The files are in the lower directory, as most of a root file system is.
                fill(&scratch.join("lowerdir"));
                let options = std::ffi::CString::new(options.join(",")).unwrap();
                let flags = MountFlags::empty();
                mount("overlay", &host, "overlay", flags, Some(options.as_c_str())).unwrap();
                None
            }
            _ => {
                let image = scratch.join("image");
                File::create(&image).unwrap().set_len(16 << 20).unwrap();
                command("/usr/sbin/mkfs.ext4", &["-q", image.to_str().unwrap()]);
                let device =
                    command("/usr/sbin/losetup", &["--find", "--show", image.to_str().unwrap()]);
                mount(&*device, &host, "ext4", MountFlags::empty(), None).unwrap();
                Some(device)
            }
        };
        if kind != "overlay" {
            fill(&host);
        }
        pod.attach(&host, &format!("c/{kind}"));
        Self { host, guest: pod.root.join("c").join(kind), device }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = unmount(&self.host, UnmountFlags::DETACH);
        if let Some(device) = &self.device {
            // Lazily: the file server has it open until it ends.
            let _ = Command::new("/usr/sbin/losetup").args(["--detach", device]).status();
        }
    }
}

fn command(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

/// Files of another user that nobody has permissions for.
fn fill(directory: &Path) {
    let private = directory.join("private");
    fs::create_dir(&private).unwrap();
    fs::create_dir(private.join("closed")).unwrap();
    fs::write(private.join("closed/file"), b"inside").unwrap();
    fs::write(private.join("file"), b"hidden").unwrap();
    symlink("file", private.join("link")).unwrap();
    lchown(private.join("link"), Some(OWNER), Some(OWNER)).unwrap();
    for (path, mode) in [("file", 0), ("closed", 0), ("", 0o700)] {
        let path = private.join(path);
        chown(&path, Some(OWNER), Some(OWNER)).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    }
}

/// What root may do without permissions, and what the owner may with its own.
fn works(kind: &str) {
    let pod = Pod::new();
    let shared = Shared::new(&pod, kind);
    let (private, host) = (shared.guest.join("private"), shared.host.join("private"));
    assert_eq!(fs::read(private.join("file")).unwrap(), b"hidden");
    assert_eq!(fs::read(private.join("link")).unwrap(), b"hidden");
    assert_eq!(fs::read_dir(private.join("closed")).unwrap().count(), 1);
    assert_eq!(fs::read(private.join("closed/file")).unwrap(), b"inside");
    fs::write(private.join("file"), b"changed").unwrap();
    assert_eq!(fs::read(host.join("file")).unwrap(), b"changed");
    assert_eq!(fs::metadata(host.join("file")).unwrap().mode() & 0o7777, 0);
    // New names of files and of links, made by root and by the owner.
    fs::hard_link(private.join("file"), private.join("closed/by-root")).unwrap();
    as_user(OWNER, OWNER, &[], || {
        fs::hard_link(private.join("file"), private.join("by-owner")).unwrap();
        fs::hard_link(private.join("link"), private.join("other-link")).unwrap();
        assert!(fs::read(private.join("file")).is_err(), "the guest checks permissions");
    });
    let stat = |name| fs::symlink_metadata(host.join(name)).unwrap();
    assert_eq!(stat("file").nlink(), 3);
    assert_eq!(stat("by-owner").ino(), stat("closed/by-root").ino());
    assert_eq!(stat("other-link").ino(), stat("link").ino());
    as_user(OWNER + 1, OWNER + 1, &[], || assert!(fs::read_dir(&private).is_err()));
    fs::remove_file(private.join("closed/file")).unwrap();
}

#[test]
fn in_memory() {
    works("tmpfs");
}

#[test]
fn on_an_overlay() {
    works("overlay");
}

#[test]
fn on_a_disk() {
    works("ext4");
}
