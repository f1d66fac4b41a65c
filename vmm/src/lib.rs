//! The two jailed processes of a pod: the monitor and the file server.
//!
//! [`config`] and [`control`] are what the supervisor needs to talk to the monitor; [`monitor`] is
//! the process itself. It opens nothing: every descriptor arrives over the control socket. Then it
//! enters the [`jail`], before the guest runs its first instruction.

mod arch;
mod bus;
pub mod config;
pub mod control;
mod devices;
pub mod fileserver;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod jail;
pub mod kvm_probe;
pub mod log_allowance;
mod logging;
mod memory;
pub mod monitor;
pub mod seqpacket;
mod vcpu;
pub mod vm;
