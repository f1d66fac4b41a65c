//! The test host: a Linux with KVM and cgroup v2 under QEMU, in which any command of this machine
//! runs as root. The machine's root file system is visible read-only under a tmpfs overlay, so the
//! command cannot change the machine. Results come out as output and through `--share`.
//!
//! This is one program for both sides: outside it gets the kernel, starts QEMU and copies the
//! streams; inside it is the kernel's first process. It exits with the status of the command.

mod cgroups;
mod clock;
mod debian;
mod early;
mod init;
mod kernel;
mod qemu;
mod request;
mod session;
mod systemd;

use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest_image::progress::say;

use crate::kernel::Choice;
use crate::qemu::{Accelerator, Time};
use crate::request::Hosted;

const USAGE: &str = "usage: test-host [OPTIONS] [--] [COMMAND ARGUMENTS…]   (no command: a shell)
  --memory MIB      memory of the host, default 4096
  --cpus N          processors of the host; the default is 1 under tcg, else those of this machine
  --timeout SECS    end the host after that time, with status 124
  --share DIR       a directory of this machine, writable in the host as /run/share-out
  --accel A         kvm, tcg or auto (the default: kvm where nesting works)
  --count           let instructions pass the time, 1 ns each, for figures that do not depend on how
                    fast they are emulated; implies --accel tcg, one processor
  --cgroup-v1       the hierarchies of cgroup v1 instead of cgroup v2
  --systemd         systemd as the first process, with the system's message bus
  --kernel K        built (the default: from tests/host/x86_64.config) or debian (Debian's own, as it is)
  --console         show the host's kernel messages on standard error
  --build-only      get the host's kernel, say where it is, and end";

/// The exit status when the test host itself fails: one that commands rarely use.
const FAILED: u8 = 125;

/// The options of the command line.
#[derive(Debug)]
struct Options {
    memory_mib: u32,
    cpus: Option<usize>,
    timeout: Option<Duration>,
    share: Option<PathBuf>,
    accelerator: Accelerator,
    time: Time,
    hosted: Hosted,
    kernel: Choice,
    console: bool,
    build_only: bool,
    command: Vec<String>,
}

fn main() -> ExitCode {
    if process::id() == 1 {
        init::run();
    }
    if std::env::args().nth(1).is_some_and(|argument| argument == systemd::CHILD) {
        init::run_beside_systemd();
    }
    match parse(std::env::args().skip(1)).and_then(|options| session::run(&options)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say(&format!("test-host: {error:#}"));
            ExitCode::from(FAILED)
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        memory_mib: 4096,
        cpus: None,
        timeout: None,
        share: None,
        accelerator: Accelerator::Auto,
        time: Time::Outside,
        hosted: Hosted::Alone,
        kernel: Choice::Built,
        console: false,
        build_only: false,
        command: Vec::new(),
    };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--memory" => options.memory_mib = value()?.parse().context("--memory")?,
            "--cpus" => options.cpus = Some(value()?.parse().context("--cpus")?),
            "--timeout" => {
                options.timeout = Some(Duration::from_secs(value()?.parse().context("--timeout")?));
            }
            "--share" => options.share = Some(value()?.into()),
            "--accel" => options.accelerator = value()?.parse()?,
            "--count" => options.time = Time::Instructions,
            "--cgroup-v1" => options.hosted = Hosted::OnCgroupV1,
            "--systemd" => options.hosted = Hosted::BySystemd,
            "--kernel" => options.kernel = value()?.parse()?,
            "--console" => options.console = true,
            "--build-only" => options.build_only = true,
            "--" => {
                options.command.extend(arguments);
                break;
            }
            "--help" | "-h" => bail!("{USAGE}"),
            option if option.starts_with('-') => bail!("unknown option {option}\n{USAGE}"),
            _ => {
                options.command.push(argument);
                options.command.extend(arguments);
                break;
            }
        }
    }
    if options.time == Time::Instructions {
        let others = options.accelerator == Accelerator::Kvm || options.cpus.is_some_and(|n| n > 1);
        ensure!(
            !others,
            "--count is for one emulated processor: no --accel kvm, no --cpus above 1"
        );
        options.accelerator = Accelerator::Tcg;
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_end_at_the_command() {
        let options = parsed("--memory 512 ls --memory 1").unwrap();
        assert_eq!(options.memory_mib, 512);
        assert_eq!(options.command, ["ls", "--memory", "1"]);
        assert_eq!(parsed("-- --odd").unwrap().command, ["--odd"]);
    }

    #[test]
    fn unknown_option_and_missing_value_are_refused() {
        assert!(parsed("--frob").is_err());
        assert!(parsed("--timeout").is_err());
        assert!(parsed("--accel fast").is_err());
        assert!(parsed("--kernel new").is_err());
    }

    #[test]
    fn counting_is_for_one_emulated_processor() {
        let options = parsed("--count true").unwrap();
        assert_eq!((options.time, options.accelerator), (Time::Instructions, Accelerator::Tcg));
        assert!(parsed("--count --accel kvm true").is_err());
        assert!(parsed("--cpus 2 --count true").is_err());
    }
}
