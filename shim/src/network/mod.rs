//! The pod's network is found, not configured: whatever the caller has put into the container's network
//! namespace is the guest's too.
//!
//! - [`namespace`]: which namespace that is.
//! - [`mirror`]: a tap beside each interface, and what is set on it.
//! - [`interfaces`]: the machine and the guest follow whenever the namespace changes.
//! - [`names`]: name servers on the namespace's loopback answer in the guest.
//! - [`vhost`]: the host's kernel moves the frames where it can.

pub mod interfaces;
pub mod mirror;
pub mod names;
pub mod namespace;
pub mod vhost;
