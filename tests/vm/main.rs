//! The monitor and the guest image, without a supervisor: needs /dev/kvm, root, and what
//! `cargo xtask image` builds. Runs in the test host.

#[cfg(test)]
mod agent;
#[cfg(test)]
mod devices;
#[cfg(test)]
mod fault;
#[cfg(test)]
mod growth;
#[cfg(test)]
mod jail;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod network;
#[cfg(test)]
mod processors;
