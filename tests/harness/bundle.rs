//! An OCI bundle around Debian's static busybox.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

const BUSYBOX: &str = "/bin/busybox";
/// The programs that the suites use.
const APPLETS: &[&str] = &[
    "cat",
    "chmod",
    "chown",
    "cmp",
    "cp",
    "dd",
    "diff",
    "dmesg",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "free",
    "grep",
    "head",
    "hostname",
    "id",
    "kill",
    "ip",
    "ln",
    "ls",
    "mkdir",
    "mkfifo",
    "mknod",
    "mount",
    "mv",
    "nc",
    "ping",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "sync",
    "tail",
    "tar",
    "tee",
    "test",
    "touch",
    "tr",
    "true",
    "umask",
    "uname",
    "wc",
    "yes",
];
/// Docker's default capabilities.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A directory with `config.json` and `rootfs`; it is removed when this is dropped.
#[derive(Debug)]
pub struct Bundle {
    directory: TempDir,
    /// The runtime specification; [`Bundle::write`] puts it on disk.
    pub spec: Value,
}

impl Bundle {
    /// A bundle that runs `args`.
    ///
    /// # Errors
    /// When the directory cannot be made, or busybox-static is not installed.
    pub fn new(args: &[&str]) -> Result<Self> {
        let directory = TempDir::with_prefix("bundle-")?;
        let rootfs = directory.path().join("rootfs");
        for name in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "mnt"] {
            fs::create_dir_all(rootfs.join(name))?;
        }
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        install_busybox(&rootfs, APPLETS)?;
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n")?;
        let bundle = Self { directory, spec: spec(args) };
        bundle.write()?;
        Ok(bundle)
    }

    /// A bundle that runs a shell script.
    ///
    /// # Errors
    /// As [`Bundle::new`].
    pub fn script(script: &str) -> Result<Self> {
        Self::new(&["/bin/sh", "-c", script])
    }

    /// Changes the specification and writes it.
    ///
    /// # Errors
    /// When `config.json` cannot be written.
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Result<Self> {
        change(&mut self.spec);
        self.write()?;
        Ok(self)
    }

    /// Gives the process a capability beyond Docker's, and writes the specification.
    ///
    /// # Errors
    /// When `config.json` cannot be written, or the process has no sets of capabilities.
    pub fn with_capability(mut self, name: &str) -> Result<Self> {
        for set in ["bounding", "effective", "permitted"] {
            let set = self.spec["process"]["capabilities"][set].as_array_mut();
            set.context("no set of capabilities")?.push(name.into());
        }
        self.write()?;
        Ok(self)
    }

    /// Changes the specification by what is in the bundle, and writes it.
    ///
    /// # Errors
    /// When `config.json` cannot be written.
    pub fn with_own(self, change: impl FnOnce(&Self, &mut Value)) -> Result<Self> {
        let mut spec = self.spec.clone();
        change(&self, &mut spec);
        self.with(|own| *own = spec)
    }

    /// Adds a mount and writes the specification.
    ///
    /// # Errors
    /// When `config.json` cannot be written.
    pub fn mount(self, mount: Value) -> Result<Self> {
        self.with(|spec| {
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(mount);
            }
        })
    }

    /// Adds the host's `/usr`, read-only, with the links to it that its programs need: Python's too.
    ///
    /// # Errors
    /// When `config.json` or a link cannot be written.
    pub fn with_usr_of_the_host(self) -> Result<Self> {
        for name in ["lib", "lib64"] {
            symlink(format!("usr/{name}"), self.rootfs().join(name))?;
        }
        self.mount(bind("/usr".as_ref(), "/usr", &["rbind", "ro"]))
    }

    /// Writes `config.json`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self) -> Result<()> {
        let json = serde_json::to_vec_pretty(&self.spec)?;
        fs::write(self.path().join("config.json"), json).context("config.json")
    }

    /// The bundle's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The container's root file system on the host.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }
}

/// Puts Debian's busybox into a root file system, with links of these names to it.
///
/// # Errors
/// When it cannot be written, or busybox-static is not installed.
pub fn install_busybox(root: &Path, applets: &[&str]) -> Result<()> {
    fs::create_dir_all(root.join("bin"))?;
    fs::copy(BUSYBOX, root.join("bin/busybox")).context(BUSYBOX)?;
    for applet in applets {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}

/// Puts a program of the host into a root file system, with the libraries that it needs.
///
/// # Errors
/// When the program does not exist, or a file cannot be copied.
pub fn install(root: &Path, program: &Path) -> Result<()> {
    let needed = Command::new("ldd").arg(program).output().context("run ldd")?;
    let needed = String::from_utf8(needed.stdout)?;
    let libraries = needed.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new);
    for file in libraries.chain([program]) {
        let place = root.join(file.strip_prefix("/")?);
        fs::create_dir_all(place.parent().context("a file has no directory")?)?;
        fs::copy(file, &place).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// Makes an archive in `directory` that engines import as an image: busybox under these names.
///
/// # Errors
/// When it cannot be written, or busybox-static is not installed.
pub fn image(directory: &Path, applets: &[&str]) -> Result<PathBuf> {
    let root = directory.join("image");
    install_busybox(&root, applets)?;
    let archive = directory.join("image.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".");
    ensure!(tar.status()?.success(), "tar failed");
    Ok(archive)
}

/// A bind mount of a host path.
#[must_use]
pub fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    let options: Vec<&str> = ["bind"].iter().chain(options).copied().collect();
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin:/usr/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "bulk",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"}, {"type": "cgroup"}
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi"
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
            ]
        }
    })
}
