//! What is particular to x86-64: where things lie, and how a processor starts.

pub(crate) mod boot;
pub(crate) mod cpuid;
pub(crate) mod layout;
pub(crate) mod mptable;
pub(crate) mod registers;
