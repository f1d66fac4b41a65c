//! The first process of a guest that tests how the agent crashes. It becomes the agent, and a child
//! traces it with ptrace(2), until the agent is where the argument says. Then the child makes the
//! agent jump to an unmapped address, or makes a system call fail that never fails.
//!
//! - `init`: the first process jumps when it waits for its first event;
//! - `panic`: the first process's wait for its first event fails;
//! - the first argument of a re-executed agent process: that process jumps once it has signal
//!   handlers.

// UNSAFETY: ptrace(2) has no safe wrapper.
#![expect(unsafe_code, reason = "ptrace(2), fork(2)")]

use std::env;
use std::ffi::c_void;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::ptr;

use anyhow::{Result, bail, ensure};
use libc::{pid_t, user_regs_struct};
use rustix::mount::{MountFlags, mount};

/// Where the agent is in the guest.
const AGENT: &str = "/init";
const AGENT_PID: pid_t = 1;
/// An address that no process has mapped.
const NOWHERE: u64 = 0xbad0;
/// Where this process mounts a procfs: the one that the agent mounts is not visible here.
const PROC: &str = "/processes";
/// The signal for which the agent sets its last handler.
const LAST_HANDLED: u64 = libc::SIGFPE as u64;

fn main() -> Result<()> {
    ensure!(std::process::id() == 1, "this is the first process of a guest");
    let victim = env::args().nth(1).unwrap_or_default();
    let (reader, writer) = io::pipe()?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", io::Error::last_os_error()),
        0 => {
            drop(reader);
            seize(is_another_life(&victim))?;
            drop(writer);
            harm(&victim)
        }
        _ => {
            drop(writer);
            // Waits for end-of-file, which comes when the child traces this process.
            io::copy(&mut &reader, &mut io::sink())?;
            drop(reader);
            Err(Command::new(AGENT).exec().into())
        }
    }
}

fn is_another_life(victim: &str) -> bool {
    !matches!(victim, "init" | "panic")
}

fn harm(victim: &str) -> Result<()> {
    if is_another_life(victim) {
        return harm_life(victim);
    }
    wait_for_events()?;
    if victim == "panic" {
        let mut registers = registers(AGENT_PID)?;
        registers.rax = i64::from(-libc::EBADF).cast_unsigned();
        set_registers(AGENT_PID, &mut registers)?;
    } else {
        send_nowhere(AGENT_PID)?;
    }
    // The kernel does not kill a first process that is traced.
    ptrace(libc::PTRACE_DETACH, AGENT_PID, 0, ptr::null_mut())?;
    loop {
        std::thread::park();
    }
}

/// Traces all processes that the agent starts. Makes the first one whose first argument is `life`
/// jump to an unmapped address once it has signal handlers.
fn harm_life(life: &str) -> Result<()> {
    fs::create_dir_all(PROC)?;
    mount("proc", PROC, "proc", MountFlags::empty(), None)?;
    let mut victim = None;
    let mut harmed = false;
    loop {
        let Some(stop) = Stop::wait(-1)? else { continue };
        if stop.event == libc::PTRACE_EVENT_EXEC && !harmed && is_life(stop.pid, life)? {
            victim = Some(stop.pid);
        }
        if stop.at_call && victim == Some(stop.pid) {
            let registers = registers(stop.pid)?;
            // True both at the start and at the end of the call.
            let call = u64::try_from(libc::SYS_rt_sigaction)?;
            if registers.orig_rax == call && registers.rdi == LAST_HANDLED {
                send_nowhere(stop.pid)?;
                (victim, harmed) = (None, true);
            }
        }
        let request =
            if victim == Some(stop.pid) { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
        stop.resume(request)?;
    }
}

/// Whether a process has this first argument.
fn is_life(pid: pid_t, life: &str) -> Result<bool> {
    let line = fs::read(format!("{PROC}/{pid}/cmdline"))?;
    Ok(line.split(|byte| *byte == 0).nth(1) == Some(life.as_bytes()))
}

/// Why a traced process has stopped.
struct Stop {
    pid: pid_t,
    signal: i32,
    event: i32,
    at_call: bool,
}

impl Stop {
    /// Waits for the next stop, of one process or of all; returns `None` if a process has ended.
    fn wait(pid: pid_t) -> Result<Option<Self>> {
        let mut status = 0;
        // SAFETY: the status is this function's own.
        let pid = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        ensure!(pid != -1, "waitpid: {}", io::Error::last_os_error());
        if !libc::WIFSTOPPED(status) {
            return Ok(None);
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        let at_call = signal == libc::SIGTRAP | 0x80;
        Ok(Some(Self { pid, signal, event, at_call }))
    }

    /// Continues the process, and delivers its signal if that was the reason.
    fn resume(&self, request: libc::c_uint) -> Result<()> {
        let signal = if self.at_call || self.event != 0 { 0 } else { self.signal };
        let signal = usize::try_from(signal)?;
        ptrace(request, self.pid, 0, ptr::without_provenance_mut(signal))
    }
}

fn ptrace(request: libc::c_uint, pid: pid_t, address: u64, data: *mut c_void) -> Result<()> {
    // SAFETY: the traced process is another one, and `data` is what the request needs.
    let done = unsafe { libc::ptrace(request, pid, address, data) };
    ensure!(done != -1, "ptrace {request:#x}: {}", io::Error::last_os_error());
    Ok(())
}

/// Traces the agent, and optionally the processes that it starts.
fn seize(children_too: bool) -> Result<()> {
    let mut options = libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_TRACESYSGOOD;
    if children_too {
        options |= libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_TRACECLONE;
    }
    let options = usize::try_from(options)?;
    ptrace(libc::PTRACE_SEIZE, AGENT_PID, 0, ptr::without_provenance_mut(options))
}

/// Lets the agent run until its first wait for events returns, which is when it serves.
fn wait_for_events() -> Result<()> {
    let mut serves = false;
    loop {
        let Some(stop) = Stop::wait(AGENT_PID)? else { bail!("the agent has ended") };
        let waiting = u64::try_from(libc::SYS_epoll_wait)?;
        if stop.at_call && registers(AGENT_PID)?.orig_rax == waiting {
            if serves {
                return Ok(());
            }
            // The next stop is at the end of this call.
            serves = true;
        }
        stop.resume(libc::PTRACE_SYSCALL)?;
    }
}

fn registers(pid: pid_t) -> Result<user_regs_struct> {
    let mut registers = MaybeUninit::<user_regs_struct>::zeroed();
    ptrace(libc::PTRACE_GETREGS, pid, 0, registers.as_mut_ptr().cast())?;
    // SAFETY: zeroes are valid numbers, and the kernel has filled them in.
    Ok(unsafe { registers.assume_init() })
}

fn set_registers(pid: pid_t, registers: &mut user_regs_struct) -> Result<()> {
    ptrace(libc::PTRACE_SETREGS, pid, 0, (&raw mut *registers).cast())
}

/// Makes a process continue at an unmapped address.
fn send_nowhere(pid: pid_t) -> Result<()> {
    let mut registers = registers(pid)?;
    registers.rip = NOWHERE;
    registers.r12 = 0x0123_4567_89ab_cdef;
    set_registers(pid, &mut registers)
}
