//! A pod that a test keeps for its containers, so that many of them need one boot.

use std::process::Output;

use anyhow::{Context, Result};

use crate::bundle::Bundle;
use crate::netns;
use crate::runtime::Runtime;

/// The id of the container that keeps the pod.
const KEEPER: &str = "keeper";

/// A container that sleeps, and the runtime that further containers join it under: of Bulkhead they are
/// in the same machine, under runc in the same network namespace.
#[derive(Debug)]
pub struct Pod {
    runtime: Runtime,
    network: String,
    _bundle: Bundle,
}

impl Pod {
    /// Starts the container that keeps it.
    ///
    /// # Errors
    /// With what the runtime says when it cannot.
    pub fn of(runtime: Runtime) -> Result<Self> {
        let bundle = Bundle::new(&["/bin/sleep", "10000"])?;
        runtime.create(KEEPER, &bundle)?;
        runtime.ok(&["start", KEEPER])?;
        let pid = runtime.state(KEEPER)?["pid"].as_u64().context("the keeper has no process")?;
        Ok(Self { runtime, network: format!("/proc/{pid}/ns/net"), _bundle: bundle })
    }

    /// One of Bulkhead and one of runc.
    ///
    /// # Errors
    /// As [`Pod::of`].
    pub fn beside_runc() -> Result<[Self; 2]> {
        Ok([Self::of(Runtime::new()?)?, Self::of(Runtime::runc()?)?])
    }

    /// The runtime, for what its containers share no more of.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Runs a bundle's container in it, to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run(&self, id: &str, bundle: &mut Bundle) -> Result<Output> {
        netns::set(&mut bundle.spec, &self.network);
        bundle.write()?;
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
}
