//! A stand-in is a process of the host that stands for a process that a caller has asked for: it
//! owns the caller's streams, moves their bytes, passes signals on, and ends as the process in the
//! guest does.
//!
//! - [`attach`]: what a stand-in and the supervisor say to each other.
//! - [`relay`]: what a stand-in does. [`stand_in`]: the program that does nothing else; `own_text`:
//!   unmaps its code while it waits.
//! - [`terminal`]: streams that are a terminal. [`preserved`]: what a caller passes beside the
//!   streams.

pub mod attach;
mod copy;
mod linger;
mod own_text;
pub mod preserved;
pub mod relay;
pub mod stand_in;
pub mod terminal;
