//! The real file server without a virtual machine: the kernel's own FUSE takes the guest's place.
//!
//! A bridge ([`pod`]) passes messages between `/dev/fuse` and the process `bulkhead-fs`, which
//! serves a directory of this machine from its jail. Each test works through the mount as it could
//! on the directory itself, and compares both. Needs root and `/dev/fuse`.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "all of it is a test, the functions that tests share as well"
)]

mod attributes;
mod data;
mod descriptors;
mod file_systems;
mod hostile;
mod jail;
mod locks;
mod names;
mod pod;
mod scale;
mod taken_over;
