//! The pod's network is not configured: the guest gets whatever the caller has put into the
//! container's network namespace.
//!
//! - [`namespace`]: which namespace that is.
//! - [`mirror`]: adds a tap for each interface, and reads what is set on the interface.
//! - [`interfaces`]: updates the machine and the guest whenever the namespace changes.
//! - [`names`]: makes name servers on the namespace's loopback answer in the guest.
//! - [`vhost`]: lets the host's kernel move the frames where it can.

pub mod interfaces;
pub mod mirror;
pub mod names;
pub mod namespace;
pub mod vhost;
