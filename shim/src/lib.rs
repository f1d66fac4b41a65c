//! The host side of a pod: the OCI command line and the supervisor behind it.
//!
//! - [`cli`]: one file for each verb. A verb is a client of the Task service.
//! - [`supervisor`], [`task`]: one process for each pod, and its door.
//! - [`container`], [`exec`], [`lifecycle`], [`state`]: what happens to a container and to processes
//!   that join it, and what is written down.
//! - [`bundle`]: from an OCI specification to what the pod needs, or a refusal.
//! - [`sandbox`], [`neighbours`]: containers that share a pod.
//! - [`pod`], [`vm`], [`growth`], [`file_server`], [`share`], [`agent`]: the pod's processes;
//!   `user_namespace`: what the owners of a shared mount are mapped by.
//! - [`interfaces`], [`mirror`], [`names`], [`vhost`]: the network of the caller's namespace, as the
//!   guest has it.
//! - [`attach`], [`relay`], [`network`], `proxy`, [`stand_in`]: a process of the host that stands for one of the
//!   guest, its streams, and the two tied together. [`terminal`]: where the streams are a terminal.
//!   [`preserved`]: what a caller passes beside them.
//!   `own_text`: what such a process does not keep mapped while it waits.

pub mod agent;
pub mod assets;
pub mod attach;
pub mod bundle;
pub mod cgroup;
pub mod channel;
pub mod cli;
pub mod container;
pub mod exec;
pub mod file_server;
pub mod growth;
pub mod hooks;
pub mod id;
pub mod interfaces;
pub mod kvm;
pub mod lifecycle;
pub mod logging;
pub mod mirror;
pub mod names;
pub mod neighbours;
pub mod network;
pub mod oom;
mod own_text;
pub mod pod;
pub mod preserved;
pub mod process;
mod proxy;
pub mod relay;
pub mod sandbox;
pub mod share;
pub mod socket_path;
pub mod spawn;
pub mod stand_in;
pub mod state;
pub mod supervisor;
pub mod task;
pub mod terminal;
pub mod timestamp;
pub mod trace;
mod user_namespace;
pub mod vhost;
pub mod vm;
