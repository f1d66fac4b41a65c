//! What containerd speaks: its Task service. The command line is a client of the same service, so that
//! there is one door to a supervisor, and one state machine behind it.

pub mod task;
