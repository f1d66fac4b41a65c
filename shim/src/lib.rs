//! The host side of a pod: its entry points and the supervisor behind them. One module for each
//! concern:
//!
//! - [`cli`]: runc's command line, one file for each verb. A verb is a client of the Task service.
//! - [`containerd`]: the Task service, through which all clients call a supervisor.
//! - [`supervisor`]: the process that owns a pod: its containers, their further processes, the state
//!   machine of the OCI lifecycle, hooks.
//! - [`state`]: what is stored on disk about a container, and the names that it has there.
//! - [`bundle`]: turns an OCI specification into a plan of the pod, or refuses it.
//! - [`cgroup`]: the pod's cgroup on the host.
//! - [`machine`]: the pod's jailed processes and the guest: monitor, file server, share, agent.
//! - [`network`]: brings the network of the caller's namespace into the guest.
//! - [`policy`]: what the administrator of the host decides for all containers.
//! - [`sockets`]: connections of the guest to sockets and FIFOs of the host that a container mounts.
//! - [`streams`]: the host process that stands for a process of the guest, and its streams.

pub mod bundle;
pub mod cgroup;
pub mod cli;
pub mod containerd;
pub mod logging;
pub mod machine;
pub mod network;
pub mod policy;
pub mod sockets;
pub mod state;
pub mod streams;
pub mod supervisor;
pub mod trace;
