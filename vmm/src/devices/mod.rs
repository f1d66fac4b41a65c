//! What the guest sees beside its processors and memory.

pub(crate) mod virtio;
