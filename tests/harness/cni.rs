//! Debian's CNI plugins, called as a container engine calls them: one after another, each with its
//! configuration and the result of the previous plugin on standard input.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::runtime::finish;

/// Where Debian installs the plugins.
pub const PLUGINS: &str = "/usr/lib/cni";
/// The version of the CNI specification.
const VERSION: &str = "1.0.0";

/// An interface of a network namespace that plugins have made.
#[derive(Debug)]
pub struct Attachment<'a> {
    namespace: &'a Path,
    interface: String,
    plugins: Vec<Value>,
    result: Value,
}

impl<'a> Attachment<'a> {
    /// Has plugins make an interface. Capability arguments that an engine would fill in are given
    /// in each plugin's `runtimeConfig`.
    ///
    /// # Errors
    /// With a plugin's output when it fails.
    pub fn add(namespace: &'a Path, interface: &str, plugins: &[Value]) -> Result<Self> {
        let plugins = plugins.to_vec();
        let interface = interface.to_owned();
        let mut attachment = Self { namespace, interface, plugins, result: Value::Null };
        for index in 0..attachment.plugins.len() {
            attachment.result = attachment.call("ADD", index)?;
        }
        Ok(attachment)
    }

    /// The addresses of the interface, without their prefix lengths.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let ips = self.result["ips"].as_array().into_iter().flatten();
        let addresses = ips.filter_map(|ip| ip["address"].as_str()?.split('/').next());
        addresses.map(str::to_owned).collect()
    }

    /// Has the plugins remove the interface, the last plugin first.
    ///
    /// # Errors
    /// With a plugin's output when it fails.
    pub fn delete(self) -> Result<()> {
        (0..self.plugins.len()).rev().try_for_each(|index| self.call("DEL", index).map(drop))
    }

    fn call(&self, verb: &str, index: usize) -> Result<Value> {
        let mut configuration = self.plugins[index].clone();
        configuration["cniVersion"] = json!(VERSION);
        configuration["name"] = json!("net");
        if !self.result.is_null() {
            configuration["prevResult"] = self.result.clone();
        }
        let plugin = configuration["type"].as_str().context("no type")?;
        let mut command = Command::new(Path::new(PLUGINS).join(plugin));
        let container = self.namespace.file_name().context("no name")?;
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", container);
        command.env("CNI_NETNS", self.namespace).env("CNI_IFNAME", &self.interface);
        command.env("CNI_PATH", PLUGINS);
        let streams = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = streams.spawn().with_context(|| plugin.to_owned())?;
        let mut input = child.stdin.take().context("no standard input")?;
        input.write_all(&serde_json::to_vec(&configuration)?)?;
        drop(input);
        let output = finish(child)?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{plugin}: {verb}: {said}");
        if verb == "DEL" { Ok(Value::Null) } else { Ok(serde_json::from_str(&said)?) }
    }
}
