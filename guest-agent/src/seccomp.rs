//! System call filters, seccomp(2): a profile of the OCI runtime-spec ("Seccomp") becomes a program that
//! the kernel runs at each system call of a container.
//!
//! libseccomp makes the program. As in runc, some instructions come before it: a system call that
//! is newer than all those in the profile fails with `ENOSYS`, so that C libraries fall back to an
//! older one instead of taking a profile's `EPERM` for the kernel's answer ([`newer_calls`]).
//!
//! A program is compiled while errors can still be reported ([`Filter::compile`]). Loading it is
//! one system call and allocates no memory ([`Filter::load`]), so that it can be the last step
//! before execve(2).

// UNSAFETY: there is no safe wrapper of seccomp(2).
#![expect(unsafe_code, reason = "seccomp(2) with a program that this module owns")]

use std::fs::File;
use std::io::{self, Read as _, Seek as _};

use libc::{sock_filter, sock_fprog};
use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use rustix::fs::{MemfdFlags, memfd_create};

/// `struct seccomp_data` of linux/seccomp.h: where a program finds the number of a call, and its ABI.
const NUMBER_OFFSET: u32 = 0;
const ABI_OFFSET: u32 = 4;
/// `AUDIT_ARCH_*` of linux/audit.h.
const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_I386: u32 = 0x4000_0003;
/// The bit that tells a call of x32 from one of x86-64, asm/unistd.h.
const X32_BIT: u32 = 0x4000_0000;
/// The error number of a profile's actions that name none.
const ERRNO_DEFAULT: u32 = libc::EPERM.cast_unsigned();

/// A profile that cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilterError {
    #[error("linux.seccomp: SCMP_ACT_NOTIFY is not supported")]
    Notify,
    #[error("linux.seccomp: {0} is not supported")]
    Flag(LinuxSeccompFilterFlag),
    #[error("linux.seccomp: {0} cannot be the default action")]
    Default(LinuxSeccompAction, #[source] SeccompError),
    #[error("linux.seccomp: cannot add architecture {0}")]
    Architecture(Arch, #[source] SeccompError),
    #[error("linux.seccomp: cannot add the rule for {0}")]
    Rule(String, #[source] SeccompError),
    #[error("linux.seccomp: cannot generate the filter")]
    Generate(#[source] SeccompError),
    #[error("linux.seccomp: cannot read the filter")]
    Read(#[source] io::Error),
    #[error("linux.seccomp: the filter has {0} instructions, more than the kernel takes")]
    TooLong(usize),
}

/// A compiled profile.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    program: Vec<sock_filter>,
    length: u16,
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles a profile.
    ///
    /// # Errors
    /// See [`FilterError`]. Names of system calls that libseccomp does not know are no error: they are
    /// of other architectures, or newer than it.
    pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Self, FilterError> {
        let flags = flags(profile)?;
        let mut program = match profile.default_action() {
            // A profile that lets everything else pass lets new calls pass too.
            LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace => Vec::new(),
            _ => newer_calls(profile),
        };
        program.extend(export(&context(profile)?)?);
        let length = u16::try_from(program.len())
            .ok()
            .filter(|length| i32::from(*length) <= libc::BPF_MAXINSNS)
            .ok_or(FilterError::TooLong(program.len()))?;
        Ok(Self { program, length, flags })
    }

    /// Makes it the filter of this thread and of everything that it starts and executes, for ever.
    /// This is one system call and allocates no memory.
    ///
    /// # Errors
    /// The caller has neither `CAP_SYS_ADMIN` nor `no_new_privs`.
    pub(crate) fn load(&self) -> io::Result<()> {
        // The kernel only reads it.
        let filter = self.program.as_ptr().cast_mut();
        let program = sock_fprog { len: self.length, filter };
        let operation = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the program points to as many instructions as it says, and both outlive the call.
        let loaded =
            unsafe { libc::syscall(libc::SYS_seccomp, operation, self.flags, &raw const program) };
        if loaded == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// `SECCOMP_FILTER_FLAG_*` of linux/seccomp.h.
fn flags(profile: &LinuxSeccomp) -> Result<libc::c_ulong, FilterError> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            // The process that loads a filter here has one thread.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            // This is about a listener, which is not supported.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(FilterError::Flag(*flag));
            }
        };
    }
    Ok(flags)
}

/// The profile as libseccomp has it.
fn context(profile: &LinuxSeccomp) -> Result<ScmpFilterContext, FilterError> {
    let (default, number) = (profile.default_action(), profile.default_errno_ret());
    let failed = |error| FilterError::Default(default, error);
    let default_action = action(default, number)?;
    let mut context = ScmpFilterContext::new(default_action).map_err(failed)?;
    for arch in profile.architectures().iter().flatten() {
        let added = context.add_arch(architecture(*arch));
        added.map_err(|error| FilterError::Architecture(*arch, error))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        // libseccomp refuses a rule that changes nothing.
        if action != default_action {
            add(&mut context, rule, action)?;
        }
    }
    Ok(context)
}

/// Adds one rule, for each of its names.
fn add(
    context: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    action: ScmpAction,
) -> Result<(), FilterError> {
    let arguments = rule.args().as_deref().unwrap_or_default();
    let conditions: Vec<_> = arguments.iter().map(condition).collect();
    for name in rule.names() {
        let Ok(call) = ScmpSyscall::from_name(name) else { continue };
        let added = if repeats(arguments) {
            // libseccomp compares an argument once in a rule. As in runc, each comparison then is a rule
            // of its own, and one that holds is enough.
            conditions
                .iter()
                .try_for_each(|one| context.add_rule_conditional(action, call, &[*one]).map(drop))
        } else {
            context.add_rule_conditional(action, call, &conditions).map(drop)
        };
        added.map_err(|error| FilterError::Rule(name.clone(), error))?;
    }
    Ok(())
}

/// Whether an argument is compared more than once.
fn repeats(arguments: &[LinuxSeccompArg]) -> bool {
    let mut rest = arguments;
    while let Some((first, after)) = rest.split_first() {
        if after.iter().any(|other| other.index() == first.index()) {
            return true;
        }
        rest = after;
    }
    false
}

fn action(action: LinuxSeccompAction, number: Option<u32>) -> Result<ScmpAction, FilterError> {
    // The kernel has 16 bits for it.
    let number = number.unwrap_or(ERRNO_DEFAULT) & 0xffff;
    let number = u16::try_from(number).unwrap_or(u16::MAX);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(number.into()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(number),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => return Err(FilterError::Notify),
    })
}

fn condition(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    // A call has six arguments, and libseccomp refuses a seventh.
    let index = u32::try_from(argument.index()).unwrap_or(u32::MAX);
    let (first, second) = (argument.value(), argument.value_two().unwrap_or(0));
    let (operator, compared) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, first),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, first),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, first),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, first),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, first),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, first),
        // The first value is the mask, the second is compared with the masked argument.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(first), second),
    };
    ScmpArgCompare::new(index, operator, compared)
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// The instructions that libseccomp makes.
fn export(context: &ScmpFilterContext) -> Result<Vec<sock_filter>, FilterError> {
    let file = memfd_create("seccomp", MemfdFlags::CLOEXEC);
    let mut file = File::from(file.map_err(|error| FilterError::Read(error.into()))?);
    context.export_bpf(&file).map_err(FilterError::Generate)?;
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(FilterError::Read)?;
    // struct sock_filter of linux/filter.h, as the machine stores numbers.
    let (instructions, _) = bytes.as_chunks::<{ size_of::<sock_filter>() }>();
    let instruction = |[c0, c1, jt, jf, k0, k1, k2, k3]: &[u8; 8]| sock_filter {
        code: u16::from_ne_bytes([*c0, *c1]),
        jt: *jt,
        jf: *jf,
        k: u32::from_ne_bytes([*k0, *k1, *k2, *k3]),
    };
    Ok(instructions.iter().map(instruction).collect())
}

/// An ABI by which programs of this machine call the kernel, and how a filter recognises its calls.
#[derive(Clone, Copy)]
struct Abi {
    arch: ScmpArch,
    audit: u32,
    /// Whether its numbers have [`X32_BIT`], where that tells it from another ABI.
    x32: Option<bool>,
}

const ABIS: [Abi; 3] = [
    Abi { arch: ScmpArch::X8664, audit: AUDIT_X86_64, x32: Some(false) },
    Abi { arch: ScmpArch::X32, audit: AUDIT_X86_64, x32: Some(true) },
    Abi { arch: ScmpArch::X86, audit: AUDIT_I386, x32: None },
];

/// Fails a call with `ENOSYS` if its number is higher than that of every call that the profile names,
/// for each ABI of the profile. The calls of other ABIs go on to libseccomp's own instructions, which
/// kill.
///
/// libseccomp cannot express this, because it does not compare numbers of calls.
fn newer_calls(profile: &LinuxSeccomp) -> Vec<sock_filter> {
    let listed = profile.architectures().as_deref().unwrap_or_default();
    // libseccomp adds the machine's own by itself.
    let is_listed = |abi: &Abi| {
        abi.arch == ScmpArch::X8664 || listed.iter().any(|it| architecture(*it) == abi.arch)
    };
    let abis = ABIS.into_iter().filter(is_listed);
    abis.filter_map(|abi| Some(above(abi, newest(profile, abi.arch)?))).flatten().collect()
}

/// The highest number of a call that the profile names.
fn newest(profile: &LinuxSeccomp, arch: ScmpArch) -> Option<u32> {
    let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
    let numbers = names.filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok());
    // Calls that the ABI does not have are negative.
    let numbers = numbers.filter_map(|call| u32::try_from(call.as_raw_syscall()).ok());
    numbers.max().filter(|newest| *newest != 0)
}

/// Instructions that answer `ENOSYS` to the calls of one ABI above a number; other calls go on
/// after them.
fn above(abi: Abi, newest: u32) -> Vec<sock_filter> {
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let mut rest = vec![jump(libc::BPF_JGT, newest, 0, 1), statement(libc::BPF_RET, enosys)];
    let past = |rest: &[sock_filter]| u8::try_from(rest.len()).unwrap_or(u8::MAX);
    match abi.x32 {
        Some(true) => rest.insert(0, jump(libc::BPF_JSET, X32_BIT, 0, past(&rest))),
        Some(false) => rest.insert(0, jump(libc::BPF_JSET, X32_BIT, past(&rest), 0)),
        None => {}
    }
    rest.insert(0, load(NUMBER_OFFSET));
    rest.insert(0, jump(libc::BPF_JEQ, abi.audit, 0, past(&rest)));
    rest.insert(0, load(ABI_OFFSET));
    rest
}

fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

/// Skips so many instructions if the comparison holds, and so many if not.
fn jump(comparison: u32, with: u32, holds: u8, fails: u8) -> sock_filter {
    let instruction = statement(libc::BPF_JMP | comparison | libc::BPF_K, with);
    sock_filter { jt: holds, jf: fails, ..instruction }
}

fn statement(code: u32, k: u32) -> sock_filter {
    // The codes of linux/bpf_common.h have eight bits.
    sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests;
