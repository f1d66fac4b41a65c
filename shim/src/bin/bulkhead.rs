//! `bulkhead`: the OCI command line, and the supervisor that it starts.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead::cli::main()
}
