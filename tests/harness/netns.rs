//! Network namespaces as a caller of a runtime makes them, and the state of the host's networks: it
//! is equal before and after a test that leaves nothing behind.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::runtime::{comes_true, output};

/// Commands that show the state of the host's networks. Counters are left out.
const OF_HOST: [&[&str]; 7] = [
    &["ls", "/sys/class/net"],
    &["ip", "route", "show", "table", "all"],
    &["ip", "rule"],
    &["tc", "qdisc", "show"],
    &["iptables-save"],
    &["ip6tables-save"],
    &["ls", "/run/netns"],
];

/// Longer than the kernel's duplicate address detection takes.
const DETECTION: Duration = Duration::from_millis(2500);

/// A named network namespace; dropping it deletes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace and brings its loopback up.
    ///
    /// # Errors
    /// When a namespace of this name exists.
    pub fn new(name: &str) -> Result<Self> {
        ip(&format!("netns add {name}"))?;
        let namespace = Self { name: name.to_owned() };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that is run in it.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command in it that must succeed; returns its standard output.
    ///
    /// # Errors
    /// With its standard error when it fails.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        succeeded(&mut self.command(args))
    }

    /// Runs ip(8) in it, with arguments that have no spaces.
    ///
    /// # Errors
    /// With its standard error when it fails.
    pub fn ip(&self, line: &str) -> Result<String> {
        ip(&format!("-netns {} {line}", self.name))
    }

    /// Gives a bundle this network.
    ///
    /// # Errors
    /// When its specification cannot be written.
    pub fn of(&self, bundle: Bundle) -> Result<Bundle> {
        join(bundle, &self.path().display().to_string())
    }

    /// The state of the namespace as its caller sees it: interfaces, addresses, routes and the
    /// queueing disciplines that redirect frames.
    ///
    /// # Errors
    /// When one of the commands fails.
    pub fn seen(&self) -> Result<String> {
        let name = self.name.as_str();
        let mut seen = String::new();
        for line in ["-details link", "address", "route show table all", "-6 route show table all"]
        {
            seen += &self.ip(line)?;
        }
        seen += &succeeded(Command::new("tc").args(["-netns", name, "qdisc", "show"]))?;
        // The remaining lifetime of an address changes.
        let kept = seen.lines().filter(|line| !line.contains("valid_lft"));
        Ok(kept.map(|line| format!("{line}\n")).collect())
    }

    /// Waits until duplicate address detection has ended for all addresses.
    ///
    /// # Errors
    /// When it does not end.
    pub fn settle(&self) -> Result<()> {
        let settled =
            || self.ip("-6 address show tentative").is_ok_and(|addresses| addresses.is_empty());
        // Detection begins again if an interface gets its carrier only later.
        let stays = || {
            thread::sleep(DETECTION);
            settled()
        };
        let comes = comes_true(Duration::from_secs(60), || settled() && stays());
        ensure!(comes, "an address stays tentative");
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Fails when the test has deleted the namespace.
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// A network namespace whose `eth0` leads to the host.
#[derive(Debug)]
pub struct Wired {
    /// The namespace. Its `eth0` has the address [`THERE`].
    pub pod: Namespace,
}

/// The host's address on the way to [`Wired::pod`].
pub const HERE: &str = "10.9.0.1";
/// The pod's address.
pub const THERE: &str = "10.9.0.2";

impl Wired {
    /// Makes the namespace and the link, with a route for multicast.
    ///
    /// # Errors
    /// When they exist already.
    pub fn new() -> Result<Self> {
        let pod = Namespace::new("pod")?;
        ip("link add here type veth peer name eth0 netns pod")?;
        ip(&format!("address add {HERE}/24 dev here"))?;
        ip("link set here up")?;
        ip("route add 239.0.0.0/8 dev here")?;
        pod.ip("link set eth0 up")?;
        pod.ip(&format!("address add {THERE}/24 dev eth0"))?;
        pod.ip(&format!("route add default via {HERE}"))?;
        pod.settle()?;
        Ok(Self { pod })
    }
}

impl Drop for Wired {
    fn drop(&mut self) {
        // A namespace in which a process still runs keeps its interfaces.
        let _ = Command::new("ip").args(["link", "delete", "here"]).status();
    }
}

/// Gives a bundle the network namespace at a path.
///
/// # Errors
/// When its specification cannot be written.
pub fn join(bundle: Bundle, path: &str) -> Result<Bundle> {
    bundle.with(|spec| set(spec, path))
}

/// Gives a specification the network namespace at a path.
pub(crate) fn set(spec: &mut Value, path: &str) {
    for entry in spec["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
        if entry["type"] == "network" {
            entry["path"] = json!(path);
        }
    }
}

/// Runs ip(8) with arguments that have no spaces; returns its standard output.
///
/// # Errors
/// With its standard error when it fails.
pub fn ip(line: &str) -> Result<String> {
    succeeded(Command::new("ip").args(line.split(' ')))
}

/// The state of the host's networks.
///
/// # Errors
/// When one of the commands cannot be run.
pub fn of_host() -> Result<String> {
    let mut state = String::new();
    for line in OF_HOST {
        // The status is ignored: without any namespace there is no `/run/netns`.
        let output = output(Command::new(line[0]).args(&line[1..]))?;
        for line in String::from_utf8(output.stdout)?.lines() {
            // Comments have the time, and chains have counters. A bridge that has lost its last
            // port loses its carrier up to a second later, and its routes show that.
            if !line.starts_with('#') {
                state += &line.split(" [").next().unwrap_or_default().replace(" linkdown", "");
                state.push('\n');
            }
        }
    }
    Ok(state)
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub struct Serving(Child);

impl Serving {
    /// Starts a process with its streams connected to the null device.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(child.spawn().with_context(|| format!("{command:?}"))?))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Both fail only when the process has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn succeeded(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {error}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}
