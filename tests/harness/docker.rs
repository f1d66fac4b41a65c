//! Debian's Docker with Bulkhead as one of its runtimes, in a directory of its own.

use std::fs::{self, File};
use std::ops::Deref;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::bundle;
use crate::runtime::{end, output};
use crate::vm::dist;

/// How long the daemon may take to start, and to stop.
const PATIENCE: Duration = Duration::from_secs(120);
/// The programs of the image besides a shell.
const APPLETS: [&str; 22] = [
    "cat", "chmod", "cut", "df", "echo", "grep", "hostname", "httpd", "id", "ip", "ls", "mount",
    "nc", "nslookup", "od", "ping", "sed", "sh", "sleep", "touch", "true", "wget",
];

/// The daemon of [`Docker::shared`], once it has been started.
static SHARED: Mutex<Option<&Docker>> = Mutex::new(None);

/// A daemon with the image `box`, made from Debian's busybox, whose default runtime is Bulkhead;
/// dropping it ends it.
#[derive(Debug)]
pub struct Docker {
    directory: TempDir,
    daemon: Child,
}

impl Docker {
    /// Starts a daemon without a bridge.
    ///
    /// # Errors
    /// With the daemon's log when it does not come up.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// Returns a daemon with a bridge, which starts at the first call and ends with the test host. A
    /// test has it for itself, and removes what it has created.
    ///
    /// # Errors
    /// As [`Docker::start`].
    pub fn shared() -> Result<Shared> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let docker = match *shared {
            Some(docker) => docker,
            None => {
                let docker = Self::start_with(&["--bridge", "", "--iptables=true"])?;
                shared.insert(Box::leak(Box::new(docker)))
            }
        };
        Ok(Shared { docker, _turn: shared })
    }

    /// Starts a daemon with further options, which override the earlier ones.
    fn start_with(options: &[&str]) -> Result<Self> {
        let directory = TempDir::with_prefix("docker-")?;
        let path = |name: &str| directory.path().join(name).display().to_string();
        let log = File::create(directory.path().join("log"))?;
        let configuration = configuration(directory.path())?;
        let daemon = Command::new("/usr/sbin/dockerd")
            .env("BULKHEAD_CONFIG", path("policy.toml"))
            .args(["--config-file", &configuration])
            .args(["--host", &format!("unix://{}", path("socket"))])
            .args(["--data-root", &path("data"), "--exec-root", &path("exec")])
            .args(["--pidfile", &path("pid"), "--default-runtime", "bulkhead", "--bridge", "none"])
            .args(["--iptables=false", "--ip6tables=false"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("/usr/sbin/dockerd")?;
        let docker = Self { directory, daemon };
        let deadline = Instant::now() + PATIENCE;
        while !docker.call(&["version"])?.status.success() {
            ensure!(Instant::now() < deadline, "dockerd did not come up: {}", docker.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        let archive = bundle::image(docker.directory(), &APPLETS)?;
        docker.ok(&["import", &archive.display().to_string(), "box"])?;
        Ok(docker)
    }

    /// Gives the daemon the image `debian`: a small Debian, as debootstrap makes it.
    ///
    /// # Errors
    /// When `cargo xtask debian` has not made it, or as [`Docker::ok`].
    pub fn import_debian(&self) -> Result<()> {
        let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debian.tar");
        let path = archive.display().to_string();
        ensure!(archive.exists(), "no {path}: make it with `cargo xtask debian`");
        self.ok(&["import", &path, "debian"]).map(drop)
    }

    /// A command of this daemon's client.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/docker");
        let socket = self.directory.path().join("socket");
        command.arg("--host").arg(format!("unix://{}", socket.display()));
        // Do not use the configuration of the user who runs the tests.
        command.env("DOCKER_CONFIG", self.directory.path()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn call(&self, args: &[&str]) -> Result<Output> {
        output(&mut self.command(args))
    }

    /// Runs a command that must succeed; returns its standard output without the last line feed.
    ///
    /// # Errors
    /// With its standard error and the end of the daemon's log when it fails.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.call(args)?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("{args:?}: {}: {error}\n{}", output.status, self.log());
        }
        Ok(String::from_utf8(output.stdout)?.trim_end_matches('\n').to_owned())
    }

    /// The daemon's own directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The end of the daemon's log.
    fn log(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
    }
}

/// Writes the daemon's configuration and returns its path. Bulkhead is a runtime by its own name, by
/// another that is a link to it, and by an option; the host's policy has a section for the latter.
fn configuration(directory: &Path) -> Result<String> {
    let (program, strict) = (dist().join("bin/bulkhead"), directory.join("bulkhead-strict"));
    symlink(&program, &strict)?;
    let policy = "[runtime.bulkhead-strict]\nsize.memory_max = \"192MiB\"\n";
    fs::write(directory.join("policy.toml"), policy)?;
    let runtimes = json!({
        "bulkhead": {"path": program},
        "bulkhead-strict": {"path": strict},
        "by-option": {"path": program, "runtimeArgs": ["--runtime-name", "bulkhead-strict"]},
    });
    let file = directory.join("daemon.json");
    fs::write(&file, json!({ "runtimes": runtimes }).to_string())?;
    Ok(file.display().to_string())
}

/// The daemon that tests share, for one of them.
#[derive(Debug)]
pub struct Shared {
    docker: &'static Docker,
    _turn: MutexGuard<'static, Option<&'static Docker>>,
}

impl Deref for Shared {
    type Target = Docker;

    fn deref(&self) -> &Docker {
        self.docker
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A test that fails must not make the next one fail.
        if std::thread::panicking()
            && let Ok(containers) = self.ok(&["ps", "--all", "--quiet"])
        {
            let containers: Vec<&str> = containers.lines().collect();
            let _ = self.call(&[&["rm", "--force"], &containers[..]].concat());
        }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // Containers that still run end with it.
        end(&mut self.daemon, PATIENCE);
    }
}
