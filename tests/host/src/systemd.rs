//! systemd as the first process of the test host, for programs that talk to it. It starts the
//! message bus and nothing else. The test host's own first process executes it, and leaves the rest
//! of its work to a child.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::init;
use crate::request::Request;

/// The argument that makes this program the child.
pub(crate) const CHILD: &str = "--beside-systemd";
const SYSTEMD: &str = "/lib/systemd/systemd";
const UNITS: &str = "/run/systemd/system";
const TARGET: &str = "test-host.target";
/// Otherwise Debian's bus would wait for units of a complete system.
const BUS_AT_ONCE: &str = "[Unit]\nDefaultDependencies=no\n";
const ONLY_A_BUS: &str = "[Unit]
Description=The test host
DefaultDependencies=no
AllowIsolate=yes
Requires=dbus.socket
After=dbus.socket
";
/// The sockets that exist once systemd is up.
const SOCKETS: [&str; 2] = ["/run/systemd/private", "/run/dbus/system_bus_socket"];
/// How long systemd may take to come up.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// Becomes systemd. A child gets the request and the port for the answer.
pub(crate) fn become_it(request: &Request, control: File) -> Result<Infallible> {
    ensure!(Path::new(SYSTEMD).exists(), "{SYSTEMD} is not there (package systemd)");
    write_units().context("units for systemd")?;
    let mut child = Command::new("/proc/self/exe")
        .arg(CHILD)
        .stdin(Stdio::piped())
        .stdout(control)
        .spawn()
        .context("start the child beside systemd")?;
    let mut orders = child.stdin.take().context("no pipe to the child")?;
    serde_json::to_writer(&mut orders, request)?;
    orders.flush()?;
    drop(orders);
    let error = Command::new(SYSTEMD).args(["--system", "--unit", TARGET]).exec();
    Err(error).context(SYSTEMD)
}

fn write_units() -> io::Result<()> {
    for unit in ["dbus.socket", "dbus.service"] {
        let directory = Path::new(UNITS).join(format!("{unit}.d"));
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("at-once.conf"), BUS_AT_ONCE)?;
    }
    fs::write(Path::new(UNITS).join(TARGET), ONLY_A_BUS)?;
    // Generators, which look at disks and the kernel's command line for more units, are masked by
    // their names.
    let off = Path::new("/run/systemd/system-generators");
    fs::create_dir_all(off)?;
    for generator in fs::read_dir("/lib/systemd/system-generators")? {
        symlink("/dev/null", off.join(generator?.file_name()))?;
    }
    Ok(())
}

/// The child: waits until systemd is up, and then runs the command.
pub(crate) fn beside_it() -> Result<()> {
    let request: Request =
        serde_json::from_reader(io::stdin().lock()).context("parse the request")?;
    let control = File::from(rustix::io::dup(io::stdout()).context("the control port")?);
    let started = Instant::now();
    while !(SOCKETS.iter().all(|path| Path::new(path).exists()) && is_on_the_bus()) {
        ensure!(started.elapsed() < PATIENCE, "systemd did not come up within {PATIENCE:?}");
        thread::sleep(POLL);
    }
    init::answer(&request, Ok(()), control)
}

/// Whether systemd has its name on the bus, which it takes once the bus is up.
fn is_on_the_bus() -> bool {
    let mut asked = Command::new("busctl");
    asked.args(["status", "org.freedesktop.systemd1"]);
    asked.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    asked.status().is_ok_and(|status| status.success())
}
