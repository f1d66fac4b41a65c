//! A machine without a supervisor: the real monitor and guest image, with the test itself at the
//! other end of the control socket.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_vmm::config::{self, DeviceConfig, Fd, JailConfig, SlotDevice, VmConfig};
use bulkhead_vmm::control::{Answer, Call, Client, Event, FromMonitor, Reply, Request};
use bulkhead_vmm::seqpacket;

/// Longer than any boot under emulation; a timeout for hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// A uid that nothing else on the test host has.
pub const JAIL_ID: u32 = 0x7000_0001;

/// Where `cargo xtask image` lays out binaries and guest image.
#[must_use]
pub fn dist() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist")
}

/// How a machine differs from the default.
#[derive(Debug, Default)]
pub struct Options {
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// The kernel, if not the guest kernel.
    pub kernel: Option<PathBuf>,
    /// The initramfs, if not the one with the agent.
    pub initramfs: Option<PathBuf>,
    /// Changes the configuration before it is sent.
    pub spoil: Option<fn(&mut VmConfig)>,
}

/// A running monitor.
#[derive(Debug)]
pub struct TestVm {
    /// The supervisor's end of the control socket.
    client: Option<Client>,
    monitor: Child,
    console: File,
    number: u64,
}

impl TestVm {
    /// Boots a machine with a vsock and an rng device.
    ///
    /// # Errors
    /// With the monitor's error.
    pub fn boot(options: &Options) -> Result<Self> {
        let mut vm = Self::spawn()?;
        vm.configure(options)?;
        Ok(vm)
    }

    /// Starts a monitor that waits for its configuration.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn() -> Result<Self> {
        let (ours, theirs) = seqpacket::pair()?;
        let program = dist().join("bin/bulkhead-vmm");
        let mut command = Command::new(&program);
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        inherit_as_3(&mut command, theirs.as_fd());
        let monitor = command.spawn().with_context(|| program.display().to_string())?;
        let console = tempfile::tempfile()?;
        Ok(Self { client: Some(Client::new(ours)), monitor, console, number: 0 })
    }

    fn configure(&mut self, options: &Options) -> Result<()> {
        let image = dist().join("share/bulkhead");
        let kernel = options.kernel.clone().unwrap_or_else(|| image.join("vmlinux"));
        let initramfs = options.initramfs.clone().unwrap_or_else(|| image.join("initramfs.cpio"));
        let files = [
            File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?,
            File::open(&kernel).with_context(|| kernel.display().to_string())?,
            File::open(&initramfs).with_context(|| initramfs.display().to_string())?,
            self.console.try_clone()?,
            File::open("/dev/urandom")?,
        ];
        let mut config = plain_config(&options.cmdline);
        if let Some(spoil) = options.spoil {
            spoil(&mut config);
        }
        let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.client()?.configure(&config, &descriptors)?;
        let (reply, _) = self.answer(0)?;
        ensure!(reply == Reply::Done, "the monitor answers {reply:?} to its configuration");
        Ok(())
    }

    fn client(&self) -> Result<&Client> {
        self.client.as_ref().context("the control socket was closed by the test")
    }

    /// Makes one call and waits for its answer.
    ///
    /// # Errors
    /// With the monitor's error.
    pub fn call(
        &mut self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        self.number += 1;
        self.client()?.call(&Call { number: self.number, request }, descriptors)?;
        self.answer(self.number)
    }

    /// Opens a stream to a port of the guest.
    ///
    /// # Errors
    /// With the monitor's error.
    pub fn open_stream(&mut self, port: u32, timeout: Duration) -> Result<UnixStream> {
        let timeout_ms = u32::try_from(timeout.as_millis())?;
        let (_, mut descriptors) = self.call(Request::OpenStream { port, timeout_ms }, &[])?;
        Ok(UnixStream::from(descriptors.pop().context("no descriptor came with the stream")?))
    }

    fn answer(&self, number: u64) -> Result<(Reply, Vec<OwnedFd>)> {
        match self.receive()? {
            (FromMonitor::Answer(Answer { number: of, result }), descriptors) if of == number => {
                let reply = result.with_context(|| self.console_text())?;
                Ok((reply, descriptors))
            }
            (other, _) => bail!("expected answer {number}, got {other:?}"),
        }
    }

    /// Waits for the machine to end by itself.
    ///
    /// # Errors
    /// When it does not end, or the monitor sends something else.
    pub fn ending(&self) -> Result<Event> {
        match self.receive()? {
            (FromMonitor::Event(event), _) => Ok(event),
            (other, _) => bail!("expected the ending, got {other:?}"),
        }
    }

    fn receive(&self) -> Result<(FromMonitor, Vec<OwnedFd>)> {
        let client = self.client()?;
        let timeout = Some(PATIENCE);
        rustix::net::sockopt::set_socket_timeout(
            client,
            rustix::net::sockopt::Timeout::Recv,
            timeout,
        )?;
        client.receive().with_context(|| self.console_text())
    }

    /// Closes the control socket, as happens when a supervisor dies.
    pub fn hang_up(&mut self) {
        self.client = None;
    }

    /// Waits for the monitor to exit.
    ///
    /// # Errors
    /// When it does not within `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.monitor.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the monitor still runs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The monitor's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.monitor.id()
    }

    /// A file of the monitor's `/proc` directory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn proc(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(format!("/proc/{}/{name}", self.pid()))?)
    }

    /// Processor time of the monitor, in clock ticks.
    ///
    /// # Errors
    /// When it has ended.
    pub fn ticks(&self) -> Result<u64> {
        // proc_pid_stat(5): utime and stime are the 14th and 15th field, the name is the second.
        let stat = self.proc("stat")?;
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.skip(11).take(2).map(|ticks| Ok(ticks.parse::<u64>()?)).sum()
    }

    /// The names of the monitor's threads, including the kernel's vhost-net thread.
    ///
    /// # Errors
    /// When it has ended.
    pub fn threads(&self) -> Result<Vec<String>> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid()))?;
        // A thread that has ended meanwhile has no name.
        let names =
            threads.flatten().filter_map(|it| fs::read_to_string(it.path().join("comm")).ok());
        Ok(names.map(|name| name.trim().to_owned()).collect())
    }

    /// What the guest wrote to its console.
    #[must_use]
    pub fn console_text(&self) -> String {
        let mut text = String::from("console:\n");
        let read = self.console.try_clone().and_then(|mut file| {
            file.rewind()?;
            file.read_to_string(&mut text)
        });
        if let Err(error) = read {
            text.push_str(&format!("cannot be read: {error}"));
        }
        text
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        // Both fail if the monitor has already ended.
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

fn plain_config(cmdline: &str) -> VmConfig {
    VmConfig {
        version: config::VERSION,
        jail: JailConfig { uid: JAIL_ID, gid: JAIL_ID },
        kvm: Fd(0),
        kernel: Fd(1),
        initramfs: Fd(2),
        console: Fd(3),
        cmdline: cmdline.into(),
        vcpus: 1,
        vcpus_max: 1,
        memory_mib: 128,
        devices: vec![
            SlotDevice { slot: 0, device: DeviceConfig::Vsock { guest_cid: 3 } },
            SlotDevice { slot: 1, device: DeviceConfig::Rng { source: Fd(4) } },
        ],
    }
}

// UNSAFETY: code between fork and exec must be async-signal-safe.
#[expect(unsafe_code, reason = "the control socket is inherited as descriptor 3")]
fn inherit_as_3(command: &mut Command, socket: BorrowedFd<'_>) {
    let raw = socket.as_raw_fd();
    let as_3 = move || {
        // dup2 onto itself would leave close-on-exec set.
        let result = if raw == 3 {
            // SAFETY: changes a flag of an open descriptor.
            unsafe { libc::fcntl(3, libc::F_SETFD, 0) }
        } else {
            // SAFETY: nothing in the child owns descriptor 3 yet.
            unsafe { libc::dup2(raw, 3) }
        };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes one system call and allocates nothing; the descriptor is open in
    // the parent until the child has been spawned.
    unsafe { command.pre_exec(as_3) };
}
