//! QEMU's command line: q35 without firmware tables, the kernel entered through PVH, the machine's root
//! over 9p, the streams over virtio-serial ports.
//!
//! Without nested KVM, QEMU uses TCG, which emulates AMD SVM with nested paging. Three features are
//! turned off: five-level paging, because KVM in the host would then walk five levels for every
//! guest; XSAVE, because with it a guest's CPUID does not follow its XCR0, as if KVM had not
//! noticed that it was set; and fast byte strings, because they are emulated byte by byte, and a
//! kernel that sees the feature clears its pages with them.

use std::fmt::Write;
use std::fs;
use std::os::fd::RawFd;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::clock;
use crate::request::{CONTROL_PORT, ROOT_OPTIONS, ROOT_TAG, SHARE_TAG, STDERR_PORT, STDOUT_PORT};

/// The emulated processor. Features whose registers only XSAVE saves are turned off too: programs
/// that check only the feature's own flag, such as those with the crate `sha2`, would use them.
const PROCESSOR: &str = "max,+svm,-la57,-xsave,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq,-erms,-fsrm";

/// Makes Debian's kernel behave like the built one: without ACPI and mitigations, and with a panic
/// on an oops.
const AS_BUILT: &str = "acpi=off mitigations=off oops=panic";

/// What runs the host's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// KVM where this machine has nesting, else TCG.
    Auto,
    Kvm,
    Tcg,
}

impl FromStr for Accelerator {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => bail!("--accel is kvm, tcg or auto, not {text}"),
        }
    }
}

impl Accelerator {
    /// Decides what `Auto` means on this machine.
    pub(crate) fn resolve(self) -> Self {
        match self {
            Self::Auto if nesting_works() => Self::Kvm,
            Self::Auto => Self::Tcg,
            chosen => chosen,
        }
    }

    /// How many processors the host gets by default. With two emulated ones, a nested machine
    /// sometimes fails: the host's own registers appear in the guest's.
    pub(crate) fn processors(self) -> usize {
        match self {
            Self::Kvm => std::thread::available_parallelism().map_or(1, usize::from),
            Self::Tcg | Self::Auto => 1,
        }
    }
}

/// Whether the processor has a flag for virtualization: a KVM that emulates supervisor mode in
/// software has `/dev/kvm` too, but the processor has neither flag.
fn nesting_works() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let virtualization = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let nested = ["kvm_intel", "kvm_amd"].iter().any(|module| {
        let parameter = format!("/sys/module/{module}/parameters/nested");
        fs::read_to_string(parameter).is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
    });
    let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    virtualization && nested && usable
}

/// What makes time advance inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Time {
    /// The time outside.
    Outside,
    /// The instructions that the host and its guests execute, one nanosecond each; while all
    /// processors are idle, the time outside. Under TCG only.
    Instructions,
}

/// The descriptors QEMU inherits, one stream socket each.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) console: RawFd,
    pub(crate) control: RawFd,
    pub(crate) stdout: RawFd,
    pub(crate) stderr: RawFd,
}

/// The machine to start.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) init: &'a Path,
    /// The initramfs of a kernel that cannot mount the root by itself.
    pub(crate) initramfs: Option<RawFd>,
    pub(crate) accelerator: Accelerator,
    pub(crate) time: Time,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: usize,
    pub(crate) share: Option<&'a Path>,
    pub(crate) shell: bool,
}

impl Machine<'_> {
    /// The command that runs the machine. QEMU dies with this process, however this process ends.
    pub(crate) fn command(&self, sockets: &Sockets) -> Result<Command> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        match self.accelerator {
            Accelerator::Kvm => command.args(["-M", "q35", "-accel", "kvm", "-cpu", "host"]),
            Accelerator::Tcg | Accelerator::Auto => {
                match self.time {
                    Time::Outside => command.args(["-accel", "tcg,thread=multi"]),
                    // Counting is exact only where one thread runs all processors.
                    Time::Instructions => {
                        command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=on"])
                    }
                };
                command.args(["-M", "q35", "-cpu", PROCESSOR])
            }
        };
        // One processor for each socket, because the firmware lists only the first processor of a
        // socket.
        command.args(["-smp", &format!("{0},sockets={0},cores=1,threads=1", self.cpus)]);
        command.args(["-m", &self.memory_mib.to_string()]);
        command.arg("-kernel").arg(self.kernel).args(["-append", &self.kernel_arguments()?]);
        if let Some(initramfs) = self.initramfs {
            command.arg("-initrd").arg(format!("/proc/self/fd/{initramfs}"));
        }
        share(&mut command, ROOT_TAG, Path::new("/"), ",readonly=on")?;
        if let Some(directory) = self.share {
            share(&mut command, SHARE_TAG, directory, "")?;
        }
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        command.args(["-chardev", &format!("socket,id=console,fd={}", sockets.console)]);
        command.args(["-serial", "chardev:console"]);
        for (name, socket) in [
            (CONTROL_PORT, sockets.control),
            (STDOUT_PORT, sockets.stdout),
            (STDERR_PORT, sockets.stderr),
        ] {
            command.args(["-chardev", &format!("socket,id={name},fd={socket}")]);
            command.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
        if self.shell {
            command.args(["-chardev", "stdio,id=terminal,signal=off"]);
            command.args(["-device", "virtconsole,chardev=terminal"]);
        }
        Ok(command)
    }

    fn kernel_arguments(&self) -> Result<String> {
        let init = self.init.to_str().context("the path of this program is not UTF-8")?;
        let mut arguments = format!(
            "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable root={ROOT_TAG} rootfstype=9p ro \
             rootflags={ROOT_OPTIONS} init={init}"
        );
        if self.initramfs.is_some() {
            write!(arguments, " {AS_BUILT}")?;
        }
        if self.accelerator != Accelerator::Kvm {
            // When this machine is busy, timeouts would make the kernel reject its clock and timer.
            let khz = match self.time {
                Time::Outside => clock::tsc_khz(),
                // The counter then has the nanoseconds of QEMU's clock.
                Time::Instructions => 1_000_000,
            };
            write!(arguments, " no_timer_check tsc_early_khz={khz} lpj=10000000")?;
        }
        Ok(arguments)
    }
}

fn share(command: &mut Command, tag: &str, directory: &Path, access: &str) -> Result<()> {
    let path = directory.to_str().context("the shared directory's path is not UTF-8")?;
    // A comma is doubled in an option of QEMU.
    let path = path.replace(',', ",,");
    command.args([
        "-fsdev",
        &format!("local,id={tag},path={path},security_model=none,multidevs=remap{access}"),
        "-device",
        &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(accelerator: Accelerator, time: Time, share: Option<&Path>) -> Vec<String> {
        let machine = Machine {
            kernel: Path::new("/kernel"),
            init: Path::new("/init"),
            initramfs: None,
            accelerator,
            time,
            memory_mib: 512,
            cpus: 2,
            share,
            shell: false,
        };
        let sockets = Sockets { console: 3, control: 4, stdout: 5, stderr: 6 };
        let command = machine.command(&sockets).unwrap();
        command.get_args().map(|argument| argument.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn emulated_processor_has_svm_and_a_measured_clock() {
        let arguments = arguments(Accelerator::Tcg, Time::Outside, None);
        assert!(arguments.iter().any(|argument| argument.contains("+svm")));
        let kernel = arguments.iter().find(|argument| argument.contains("tsc_early_khz=")).unwrap();
        assert!(!kernel.contains("tsc_early_khz=0 "));
    }

    #[test]
    fn counted_time_has_a_clock_of_one_count_a_nanosecond() {
        let counted = arguments(Accelerator::Tcg, Time::Instructions, None);
        assert!(counted.iter().any(|argument| argument == "-icount"));
        assert!(counted.iter().any(|argument| argument.contains("tsc_early_khz=1000000 ")));
        let outside = arguments(Accelerator::Tcg, Time::Outside, None);
        assert!(!outside.iter().any(|argument| argument == "-icount"));
    }

    #[test]
    fn root_is_read_only_and_the_share_is_not() {
        let arguments = arguments(Accelerator::Kvm, Time::Outside, Some(Path::new("/out,1")));
        let fsdev = |tag: &str| arguments.iter().find(|text| text.contains(tag)).unwrap();
        assert!(fsdev("id=root").ends_with("readonly=on"));
        assert!(fsdev("id=share").contains("path=/out,,1,"));
        assert!(!fsdev("id=share").contains("readonly"));
    }
}
