//! `bulkhead-stand-in`: the process of the host that stands for one of a container.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead::streams::stand_in::main()
}
