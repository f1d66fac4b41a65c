//! The network of a pod, with the real kernel and the real guest, called as runc is. The suite runs
//! in the test host.

#[cfg(test)]
mod interfaces;
#[cfg(test)]
mod load;
#[cfg(test)]
mod workloads;
