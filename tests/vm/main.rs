//! The monitor and the guest image without a supervisor. Needs /dev/kvm, root, and the output of
//! `cargo xtask image`. Runs in the test host.

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
