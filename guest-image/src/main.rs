//! Command line to build the parts of the guest image; `cargo xtask image` calls the same library.

use std::env;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use guest_image::progress::say;
use guest_image::source::Source;
use guest_image::{initramfs, kernel};

const USAGE: &str = "usage: guest-image kernel             build the guest kernel, say where it is
       guest-image initramfs AGENT OUTPUT  write the initramfs with that agent as /init
The kernel's source: the package linux-source-6.12, or BULKHEAD_KERNEL_TARBALL with
BULKHEAD_KERNEL_SHA256. The cache: BULKHEAD_CACHE.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("guest-image: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["kernel"] => {
            let built = kernel::build(kernel::guest(), &Source::from_environment()?)?;
            say(&built.vmlinux.display().to_string());
        }
        ["initramfs", agent, output] => {
            let size =
                initramfs::write(Path::new(agent), Path::new(output)).context("initramfs")?;
            say(&format!("{output}: {size} bytes"));
        }
        _ => bail!("{USAGE}"),
    }
    Ok(())
}
