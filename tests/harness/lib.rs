//! What the suites share: machines, bundles and the programs under test.

pub mod bundle;
pub mod docker;
pub mod memory;
pub mod network;
pub mod ping;
pub mod runtime;
pub mod soak;
pub mod systemd;
pub mod vm;
