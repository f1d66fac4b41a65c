//! Everything that is specific to x86-64: the memory layout, and how a processor starts.

pub(crate) mod boot;
pub(crate) mod cpuid;
pub(crate) mod layout;
pub(crate) mod mptable;
pub(crate) mod registers;
