//! The host side of a pod: its front doors and the supervisor behind them. One room for each concern:
//!
//! - [`cli`]: runc's command line, one file for each verb. A verb is a client of the Task service.
//! - [`containerd`]: the Task service itself, through which everybody speaks to a supervisor.
//! - [`supervisor`]: the process that owns a pod: its containers, their further processes, the state
//!   machine of the OCI lifecycle, hooks.
//! - [`state`]: what is known of a container on disk, and the names that it has there.
//! - [`bundle`]: from an OCI specification to what the pod needs, or a refusal.
//! - [`cgroup`]: the pod's cgroup on the host.
//! - [`machine`]: the pod's jailed processes and the guest: monitor, file server, share, agent.
//! - [`network`]: the network of the caller's namespace, as the guest has it.
//! - [`streams`]: the process of the host that stands for one of the guest, and its streams.

pub mod bundle;
pub mod cgroup;
pub mod cli;
pub mod containerd;
pub mod logging;
pub mod machine;
pub mod network;
pub mod state;
pub mod streams;
pub mod supervisor;
pub mod trace;
