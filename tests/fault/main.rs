//! The first process of a guest that tests how the agent dies: it becomes the agent, and a child of it
//! watches as a debugger does, until the agent waits for its first event. Then it sends it to an
//! address where nothing is.

// UNSAFETY: ptrace(2) has no safe wrapper.
#![expect(unsafe_code, reason = "ptrace(2), fork(2)")]

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::ptr;

use anyhow::{Result, bail, ensure};

/// Where the agent is in the guest.
const AGENT: &str = "/init";
const AGENT_PID: libc::pid_t = 1;
/// No code is there, in any process.
const NOWHERE: u64 = 0xbad0;

fn main() -> Result<()> {
    ensure!(std::process::id() == 1, "this is the first process of a guest");
    let (reader, writer) = io::pipe()?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", io::Error::last_os_error()),
        0 => {
            drop(reader);
            seize()?;
            drop(writer);
            wait_for_events()?;
            send_nowhere()
        }
        _ => {
            drop(writer);
            // Its end comes when the child watches.
            io::copy(&mut &reader, &mut io::sink())?;
            drop(reader);
            Err(Command::new(AGENT).exec().into())
        }
    }
}

fn ptrace(request: libc::c_uint, address: u64, data: *mut c_void) -> Result<()> {
    // SAFETY: the process that is watched is another one, and `data` is what the request wants.
    let done = unsafe { libc::ptrace(request, AGENT_PID, address, data) };
    ensure!(done != -1, "ptrace {request:#x}: {}", io::Error::last_os_error());
    Ok(())
}

fn seize() -> Result<()> {
    let options = libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_TRACESYSGOOD;
    let options = usize::try_from(options)?;
    ptrace(libc::PTRACE_SEIZE, 0, ptr::without_provenance_mut(options))
}

/// Lets the agent run until it waits for events, which it does when it serves.
fn wait_for_events() -> Result<()> {
    let mut serves = false;
    loop {
        let mut status = 0;
        // SAFETY: the status is this function's own.
        let stopped = unsafe { libc::waitpid(AGENT_PID, &raw mut status, libc::__WALL) };
        ensure!(stopped == AGENT_PID, "waitpid: {}", io::Error::last_os_error());
        ensure!(libc::WIFSTOPPED(status), "the agent has ended: {status:#x}");
        let mut signal = libc::WSTOPSIG(status);
        let at_call = signal == libc::SIGTRAP | 0x80;
        if at_call || status >> 16 != 0 {
            signal = 0;
        }
        if at_call && registers()?.orig_rax == u64::try_from(libc::SYS_epoll_wait)? {
            if serves {
                return Ok(());
            }
            // The next stop is at its end.
            serves = true;
        }
        let signal = usize::try_from(signal)?;
        ptrace(libc::PTRACE_SYSCALL, 0, ptr::without_provenance_mut(signal))?;
    }
}

fn registers() -> Result<libc::user_regs_struct> {
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    ptrace(libc::PTRACE_GETREGS, 0, registers.as_mut_ptr().cast())?;
    // SAFETY: zeroes are numbers, and the kernel has filled them in.
    Ok(unsafe { registers.assume_init() })
}

/// Lets the agent go on at an address where nothing is.
fn send_nowhere() -> Result<()> {
    let mut registers = registers()?;
    registers.rip = NOWHERE;
    registers.r12 = 0x0123_4567_89ab_cdef;
    ptrace(libc::PTRACE_SETREGS, 0, (&raw mut registers).cast())?;
    ptrace(libc::PTRACE_DETACH, 0, ptr::null_mut())?;
    loop {
        std::thread::park();
    }
}
