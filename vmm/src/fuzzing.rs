//! Entry points for fuzzers: each takes bytes that say what a hostile guest does, and panics if the
//! monitor does not withstand it. Built with `--cfg fuzzing` only; the programs are in
//! `tests/fuzz`.

use crate::devices::virtio;

/// A driver of a network device: its queues, commands and frames.
pub fn network(bytes: &[u8]) {
    virtio::net::guided::drive(bytes);
}

/// Both sides of a queue: the chains of a driver, and how a device consumes them.
pub fn queue(bytes: &[u8]) {
    virtio::guided::drive(bytes);
}
