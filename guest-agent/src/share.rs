//! The pod's shared files: the virtio-fs device with the tag [`SHARE_TAG`], mounted at
//! [`SHARE_DIR`]. A pod that shares no files has no such device; it may get one later.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bulkhead_protocol::{SHARE_DIR, SHARE_TAG};
use procfs::process::Process;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

/// Whether the share is mounted. Clones share the answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Share(Arc<Mutex<bool>>);

impl Share {
    /// Mounts the share if the device is there and it is not mounted yet.
    ///
    /// # Errors
    /// The device is there and cannot be mounted.
    pub(crate) async fn mount(&self) -> io::Result<()> {
        let mut mounted = self.0.lock().await;
        if !*mounted {
            // Mounting waits for the file server's first answer.
            *mounted = spawn_blocking(try_mount).await.map_err(io::Error::other)??;
        }
        Ok(())
    }
}

/// Writes everything back, and drops mounts and cached files that nobody uses: for each file that
/// the guest caches, the host's file server holds a descriptor, which keeps the file's mount from
/// being undone.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn forget() -> io::Result<()> {
    rustix::fs::sync();
    unmount_unused()?;
    // proc_sys_vm(5): dentries and inodes, but no pages.
    std::fs::write("/proc/sys/vm/drop_caches", "2")
}

/// Unmounts the file systems that the kernel mounted when a path in the share led into them. Those
/// in use stay.
fn unmount_unused() -> io::Result<()> {
    let table = Process::myself().and_then(|own| own.mountinfo()).map_err(io::Error::other)?;
    let inside = |path: &Path| path.starts_with(SHARE_DIR) && path != Path::new(SHARE_DIR);
    // The later ones first: they may be in the earlier ones.
    let paths = table.into_iter().map(|mount| mount.mount_point).filter(|path| inside(path));
    for path in paths.collect::<Vec<_>>().iter().rev() {
        match unmount(path, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::BUSY | Errno::NOENT | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether there was a device to mount.
fn try_mount() -> io::Result<bool> {
    std::fs::create_dir_all(SHARE_DIR)?;
    match mount(SHARE_TAG, SHARE_DIR, "virtiofs", MountFlags::empty(), None) {
        Ok(()) => Ok(true),
        // No device has the tag; no kernel support.
        Err(Errno::INVAL | Errno::NODEV) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
