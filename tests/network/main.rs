//! The network of a pod, with the real kernel and the real guest, called as runc is. The suite runs
//! in the test host.

#![cfg(test)]

mod interfaces;
mod load;
mod workloads;
