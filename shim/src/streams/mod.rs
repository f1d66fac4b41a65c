//! A process of the host stands for each process that a caller has asked for: it owns the caller's
//! streams, moves their bytes, passes signals on, and ends as the process in the guest does.
//!
//! - [`attach`]: what a stand-in and the supervisor say to each other.
//! - [`relay`]: what it does. [`stand_in`]: the program that does nothing else; `own_text`: what it does
//!   not keep mapped while it waits.
//! - [`terminal`]: where the streams are a terminal. [`preserved`]: what a caller passes beside them.

pub mod attach;
mod copy;
mod linger;
mod own_text;
pub mod preserved;
pub mod relay;
pub mod stand_in;
pub mod terminal;
