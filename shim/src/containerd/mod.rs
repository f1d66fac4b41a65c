//! containerd's Task service. The command line is a client of the same service, so a supervisor has
//! one entry point, and one state machine behind it.

pub mod task;
