//! The two jailed processes of a pod: the monitor and the file server.

pub mod config;
pub mod control;
mod devices;
pub mod seqpacket;
