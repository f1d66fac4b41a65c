//! The pod's machine: what its parts are made from, how they are started and asked.
//!
//! - [`kvm`], [`assets`]: what the host and the installation have.
//! - [`spawn`], [`channel`]: starting a jailed process, and the socket on which it is spoken to.
//! - [`monitor`]: the virtual machine. [`growth`]: making a running one larger.
//! - [`file_server`], [`share`]: the files of the pod, as the guest sees them; `user_namespace`: what
//!   the owners of a shared mount are mapped by.
//! - [`agent`]: PID 1 of the guest. [`words`]: what a guest says, fit to be shown.

pub mod agent;
pub mod assets;
pub mod channel;
pub mod file_server;
pub mod growth;
pub mod kvm;
pub mod monitor;
mod mount_points;
pub mod share;
pub mod spawn;
mod user_namespace;
pub mod words;
