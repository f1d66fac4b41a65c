//! A pod that a test keeps for its containers, so that all of them together need one boot.

use std::process::Output;

use anyhow::{Context, Result};

use crate::bundle::Bundle;
use crate::netns;
use crate::runtime::Runtime;

/// The id of the container that keeps the pod.
const KEEPER: &str = "keeper";

/// A sleeping container whose network namespace further containers join. Under Bulkhead they run in
/// the same machine.
#[derive(Debug)]
pub struct Pod {
    runtime: Runtime,
    network: String,
    _bundle: Bundle,
}

impl Pod {
    /// Starts the container that keeps the pod.
    ///
    /// # Errors
    /// When the container cannot be started.
    pub fn of(runtime: Runtime) -> Result<Self> {
        let bundle = Bundle::new(&["/bin/sleep", "10000"])?;
        runtime.create(KEEPER, &bundle)?;
        runtime.ok(&["start", KEEPER])?;
        let pid = runtime.state(KEEPER)?["pid"].as_u64().context("the keeper has no process")?;
        Ok(Self { runtime, network: format!("/proc/{pid}/ns/net"), _bundle: bundle })
    }

    /// Returns a pod of Bulkhead and one of runc.
    ///
    /// # Errors
    /// As [`Pod::of`].
    pub fn beside_runc() -> Result<[Self; 2]> {
        Ok([Self::of(Runtime::new()?)?, Self::of(Runtime::runc()?)?])
    }

    /// Runs cases that share a pod of Bulkhead and one of runc, one after the other.
    ///
    /// # Errors
    /// As [`Pod::of`] and [`Pod::end`].
    pub fn share_beside_runc(cases: &[fn(&[Self; 2])]) -> Result<()> {
        let pods = Self::beside_runc()?;
        cases.iter().for_each(|case| case(&pods));
        Self::end_all(pods)
    }

    /// The runtime, for the containers of the pod.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Makes the container of a bundle join the pod.
    ///
    /// # Errors
    /// When its specification cannot be written.
    pub fn take_in(&self, bundle: &mut Bundle) -> Result<()> {
        netns::set(&mut bundle.spec, &self.network);
        bundle.write()
    }

    /// Runs a container in the pod and waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run(&self, id: &str, bundle: &mut Bundle) -> Result<Output> {
        self.take_in(bundle)?;
        self.runtime.run(id, bundle)
    }

    /// Ends the pod, which must leave nothing behind.
    ///
    /// # Errors
    /// Names what is left.
    pub fn end(self) -> Result<()> {
        self.runtime.ok(&["delete", "--force", KEEPER])?;
        self.runtime.assert_clean()
    }

    /// Ends several pods.
    ///
    /// # Errors
    /// As [`Pod::end`].
    pub fn end_all(pods: impl IntoIterator<Item = Self>) -> Result<()> {
        pods.into_iter().try_for_each(Self::end)
    }
}
