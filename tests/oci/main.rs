//! The OCI command line, end to end: the real kernel, the real guest, as its users call it. Runs in
//! the test host.

mod errors;
mod files;
mod isolation;
mod kill;
mod lifecycle;
mod process;
mod resources;
mod storage;
mod streams;
