//! `bulkhead-stand-in`: the host process that stands for a process of a container.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead::streams::stand_in::main()
}
