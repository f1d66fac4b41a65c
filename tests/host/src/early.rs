//! Extra steps inside for a kernel with modules: switching from the initramfs to the machine's
//! root, and loading the modules that a container host has.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::request::{MODULE, ROOT_OPTIONS, ROOT_TAG};

/// A directory of the initramfs.
const NEW_ROOT: &str = "/run";
/// Modules with a device node or a socket family that do not exist before they are loaded.
const WANTED: [&str; 7] =
    ["fuse", "loop", "tun", "vhost_net", "vhost_vsock", "virtio_rng", "vsock_loopback"];

/// Mounts the machine's root. If the initramfs has no modules, the kernel has mounted it already.
pub(crate) fn reach_root() -> Result<()> {
    let modules = first_modules()?;
    if modules.is_empty() {
        return Ok(());
    }
    for module in modules {
        let file = File::open(&module)?;
        let name = || module.display().to_string();
        rustix::system::finit_module(file, c"", 0).with_context(name)?;
    }
    let options = std::ffi::CString::new(ROOT_OPTIONS)?;
    mount(ROOT_TAG, NEW_ROOT, "9p", MountFlags::RDONLY, options.as_c_str()).context("mount 9p")?;
    rustix::process::chdir(NEW_ROOT)?;
    mount_move(".", "/").context("move it to the root")?;
    rustix::process::chroot(".")?;
    Ok(rustix::process::chdir("/")?)
}

/// The modules in the initramfs; their names sort in the order of loading.
fn first_modules() -> Result<Vec<PathBuf>> {
    let mut modules = Vec::new();
    for file in fs::read_dir("/")? {
        let file = file?;
        if file.file_name().to_string_lossy().starts_with(MODULE) {
            modules.push(file.path());
        }
    }
    modules.sort();
    Ok(modules)
}

/// Makes the kernel's modules available, and loads those that are not loaded on demand.
pub(crate) fn load_modules(directory: &Path) -> Result<()> {
    let place = directory.display();
    ensure!(directory.is_dir(), "{place} is not in the test host (its /tmp and /run are its own)");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    fs::create_dir_all("/lib/modules")?;
    let ours = Path::new("/lib/modules").join(release.trim());
    // A machine that runs the same kernel has this directory.
    if !ours.exists() {
        symlink(directory, ours)?;
    }
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    let svm = processor.split_whitespace().any(|flag| flag == "svm");
    let mut modprobe = Command::new("/sbin/modprobe");
    modprobe.arg("--all").args(WANTED).arg(if svm { "kvm_amd" } else { "kvm_intel" });
    let output = modprobe.stdin(Stdio::null()).output().context("run modprobe (package kmod)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "modprobe failed ({}): {}", output.status, said.trim());
    Ok(())
}
