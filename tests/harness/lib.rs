//! What the suites share: machines, bundles and the programs under test.

pub mod bundle;
pub mod cni;
pub mod docker;
pub mod memory;
pub mod netns;
pub mod network;
pub mod ping;
pub mod pod;
pub mod runtime;
pub mod soak;
pub mod systemd;
pub mod tools;
pub mod traffic;
pub mod vm;
