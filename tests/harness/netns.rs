//! Network namespaces as a caller of a runtime makes them, and what the host has of networks: two
//! looks are equal when nothing was left in between.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::runtime::{comes_true, output};

/// What there is of the host's networks beside its namespaces; whatever counts is left out.
const OF_HOST: [&[&str]; 7] = [
    &["ls", "/sys/class/net"],
    &["ip", "route", "show", "table", "all"],
    &["ip", "rule"],
    &["tc", "qdisc", "show"],
    &["iptables-save"],
    &["ip6tables-save"],
    &["ls", "/run/netns"],
];

/// How long a kernel asks on a link before it uses an address, and a while more.
const DETECTION: Duration = Duration::from_millis(2500);

/// A named network namespace; dropping it deletes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one, its loopback up.
    ///
    /// # Errors
    /// When there is one of this name.
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

    /// A command that must succeed; gives its standard output.
    ///
    /// # Errors
    /// With its standard error when it fails.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        succeeded(&mut self.command(args))
    }

    /// ip(8) in it, of words without spaces.
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

    /// What its caller sees of interfaces, addresses and routes, who redirects frames, and which
    /// devices were added.
    ///
    /// # Errors
    /// When one of the programs that say so fails.
    pub fn seen(&self) -> Result<String> {
        let name = self.name.as_str();
        let mut seen = String::new();
        for line in ["-details link", "address", "route show table all", "-6 route show table all"]
        {
            seen += &self.ip(line)?;
        }
        seen += &succeeded(Command::new("tc").args(["-netns", name, "qdisc", "show"]))?;
        // How long an address is good for passes.
        let kept = seen.lines().filter(|line| !line.contains("valid_lft"));
        Ok(kept.map(|line| format!("{line}\n")).collect())
    }

    /// Waits until the kernel has found out that nobody else has its addresses.
    ///
    /// # Errors
    /// When it does not.
    pub fn settle(&self) -> Result<()> {
        let settled =
            || self.ip("-6 address show tentative").is_ok_and(|addresses| addresses.is_empty());
        // It begins again where an interface finds only later that its cable is plugged.
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
        // It fails when the test has deleted it.
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// A network namespace whose `eth0` leads to the host.
#[derive(Debug)]
pub struct Wired {
    /// The namespace, in which it has the address [`THERE`].
    pub pod: Namespace,
}

/// The host's address on the way to [`Wired::pod`].
pub const HERE: &str = "10.9.0.1";
/// That of the pod.
pub const THERE: &str = "10.9.0.2";

impl Wired {
    /// A new one, with a route for groups.
    ///
    /// # Errors
    /// When there is one already.
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
        // A namespace that somebody is still in keeps its interfaces.
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

/// ip(8) with words without spaces; gives its standard output.
///
/// # Errors
/// With its standard error when it fails.
pub fn ip(line: &str) -> Result<String> {
    succeeded(Command::new("ip").args(line.split(' ')))
}

/// What the host has of networks.
///
/// # Errors
/// When one of the programs that say so cannot be run.
pub fn of_host() -> Result<String> {
    let mut state = String::new();
    for line in OF_HOST {
        // Without a namespace ever made there is no directory of them.
        let output = output(Command::new(line[0]).args(&line[1..]))?;
        for line in String::from_utf8(output.stdout)?.lines() {
            // Comments have the time, chains what has passed; a bridge that has lost its last port
            // loses its carrier, which its routes tell, up to a second later.
            if !line.starts_with('#') {
                state += &line.split(" [").next().unwrap_or_default().replace(" linkdown", "");
                state.push('\n');
            }
        }
    }
    Ok(state)
}

/// A process that is ended with this.
#[derive(Debug)]
pub struct Serving(Child);

impl Serving {
    /// Starts it, its streams the null device.
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
        // Both fail only when it has ended.
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
