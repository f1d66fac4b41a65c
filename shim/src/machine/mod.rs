//! The pod's machine: its parts, how they are started, and how requests are sent to them.
//!
//! - [`kvm`], [`assets`]: what the host and the installation provide.
//! - [`spawn`], [`channel`]: starting a jailed process, and its control socket.
//! - [`monitor`]: the virtual machine. [`growth`]: making a running one larger.
//! - [`file_server`], [`share`]: the files of the pod, as the guest sees them; `user_namespace`:
//!   the mappings of idmapped mounts.
//! - [`settings`], [`formats`]: what of the host's kernel holds in the guest's too.
//! - [`agent`]: the client of PID 1 of the guest. [`words`]: makes text from the guest safe to
//!   show.

pub mod agent;
pub mod assets;
pub mod channel;
pub mod file_server;
pub mod formats;
pub mod growth;
pub mod host_clock;
pub mod kvm;
pub mod monitor;
mod mount_points;
pub mod settings;
pub mod share;
pub mod spawn;
mod user_namespace;
pub mod words;
