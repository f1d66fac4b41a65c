//! Reports faults of the agent's own instructions, signal(7): `SIGSEGV`, `SIGBUS`, `SIGILL`,
//! `SIGFPE`.
//!
//! A fault of PID 1 is the end of the machine, and nobody can examine it afterwards. So its memory
//! maps, the code around the instruction, the top of the stack and the registers go to the guest's
//! console, which the monitor keeps. The most telling lines come last, because only the last lines
//! become part of an error. Then the process dies of the signal, and the kernel writes its own
//! message. The same holds for the other lives of this program, until they execute their
//! container's own program.
//!
//! While it writes, the handler allocates nothing and takes no lock.

// UNSAFETY: std has no signal handlers, and a handler gets raw pointers.
#![expect(
    unsafe_code,
    reason = "sigaction(2), sigaltstack(2), and what the kernel hands a handler"
)]

use std::fmt::{self, Write as _};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;

use libc::{c_int, c_void, greg_t, siginfo_t, ucontext_t};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{pread, read, write};

const SIGNALS: [(c_int, &str); 4] = [
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGILL, "SIGILL"),
    (libc::SIGFPE, "SIGFPE"),
];
/// In the order of the kernel's own messages.
const REGISTERS: [(c_int, &str); 20] = [
    (libc::REG_RIP, "rip"),
    (libc::REG_RSP, "rsp"),
    (libc::REG_EFL, "eflags"),
    (libc::REG_RAX, "rax"),
    (libc::REG_RBX, "rbx"),
    (libc::REG_RCX, "rcx"),
    (libc::REG_RDX, "rdx"),
    (libc::REG_RSI, "rsi"),
    (libc::REG_RDI, "rdi"),
    (libc::REG_RBP, "rbp"),
    (libc::REG_R8, "r8"),
    (libc::REG_R9, "r9"),
    (libc::REG_R10, "r10"),
    (libc::REG_R11, "r11"),
    (libc::REG_R12, "r12"),
    (libc::REG_R13, "r13"),
    (libc::REG_R14, "r14"),
    (libc::REG_R15, "r15"),
    (libc::REG_TRAPNO, "trap"),
    (libc::REG_ERR, "error"),
];
/// How many bytes of code before the instruction are written, of [`CODE_BYTES`] in all.
const CODE_BEFORE: u64 = 32;
const CODE_BYTES: usize = 64;
const STACK_BYTES: usize = 128;
/// The most bytes of the maps that are written.
const MAPS_BYTES: usize = 6 << 10;
/// The size of the handler's own stack, for a fault that the normal stack has caused.
const HANDLER_STACK: usize = 64 << 10;

/// What the handler needs; reading it takes no lock.
static WATCHED: OnceLock<Watched> = OnceLock::new();

#[derive(Debug)]
struct Watched {
    life: &'static str,
    console: OwnedFd,
}

/// From now on, writes faults of PID 1 to its standard error, which is the console.
pub(crate) fn watch_init() {
    if let Ok(console) = io::stderr().as_fd().try_clone_to_owned() {
        watch("init", console);
    }
}

/// The same for another life of this program. Its streams are a container's, so faults are written
/// to the console, if there is one.
pub(crate) fn watch_life(life: &'static str) {
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
    if let Ok(console) = open("/dev/console", flags, Mode::empty()) {
        watch(life, console);
    }
}

fn watch(life: &'static str, console: OwnedFd) {
    WATCHED.get_or_init(|| Watched { life, console });
    give_stack();
    for (signal, _) in SIGNALS {
        set_action(signal, Some(note));
    }
}

type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// Gives the calling thread a stack for handlers. Other threads have std's, which is smaller.
fn give_stack() {
    let memory = Box::leak(Box::new([MaybeUninit::<u8>::uninit(); HANDLER_STACK]));
    let stack =
        libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: HANDLER_STACK };
    // SAFETY: the memory is as large as the structure says, and leaked, so that nothing else ever
    // uses it. If the kernel refuses, std's stack stays.
    unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) };
}

/// Sets the action of a signal: `handler`, or the default.
fn set_action(signal: c_int, handler: Option<Handler>) {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let address = handler.map_or(libc::SIG_DFL, |handler| handler as usize);
    // SAFETY: zeroes are a valid action: no flags, an empty mask, the default.
    let action = unsafe { action.assume_init_mut() };
    action.sa_sigaction = address;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the action is complete, and its handler makes only async-signal-safe calls. The call
    // fails for no signal of the list.
    unsafe { libc::sigaction(signal, &raw const *action, ptr::null_mut()) };
}

/// The handler.
extern "C" fn note(signal: c_int, about: *mut siginfo_t, context: *mut c_void) {
    // First, so that a fault in here ends the process too. So does the instruction itself, when
    // this returns to it.
    set_action(signal, None);
    // SAFETY: the kernel passes both to a handler with SA_SIGINFO, and nothing else has them
    // meanwhile.
    let about = unsafe { &*about };
    // SAFETY: as above.
    let context = unsafe { &*context.cast::<ucontext_t>() };
    if let Some(watched) = WATCHED.get() {
        report(watched, (signal, about), context.uc_mcontext.gregs);
    }
    // A signal that a process has sent does not come again with the instruction.
    if about.si_code <= 0 {
        // SAFETY: sends a signal to this thread.
        unsafe { libc::raise(signal) };
    }
}

fn report(watched: &Watched, (signal, about): (c_int, &siginfo_t), registers: [greg_t; 23]) {
    let console = watched.console.as_fd();
    let register = |which: c_int| {
        let value = usize::try_from(which).ok().and_then(|which| registers.get(which));
        value.copied().unwrap_or_default().cast_unsigned()
    };
    let mut line = Line::new();
    write_maps(console);
    let code = register(libc::REG_RIP).wrapping_sub(CODE_BEFORE);
    line.send(console, |line| memory::<CODE_BYTES>(line, "code", code));
    line.send(console, |line| memory::<STACK_BYTES>(line, "stack", register(libc::REG_RSP)));
    for some in REGISTERS.chunks(5) {
        line.send(console, |line| {
            some.iter()
                .try_for_each(|(which, name)| write!(line, "{name} {:#x} ", register(*which)))
        });
    }
    let name = SIGNALS.iter().find(|(number, _)| *number == signal).map_or("signal", |it| it.1);
    // SAFETY: the kernel fills it in for each of these signals, or the sender's numbers in its
    // place.
    let address = unsafe { about.si_addr() }.addr();
    line.send(console, |line| {
        let process = std::process::id();
        let code = about.si_code;
        write!(line, "{} [{process}] faults: {name} (code {code}) at {address:#x}", watched.life)
    });
}

/// The memory at an address, byte by byte, lowest first; the kernel says whether it can be read.
fn memory<const BYTES: usize>(line: &mut Line, name: &str, address: u64) -> fmt::Result {
    write!(line, "{name} at {address:#x}:")?;
    let mut bytes = [0; BYTES];
    let own = open("/proc/self/mem", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    match own.and_then(|own| pread(own, &mut bytes, address)) {
        Ok(count) => bytes.iter().take(count).try_for_each(|byte| write!(line, " {byte:02x}")),
        Err(error) => write!(line, " cannot be read, error {}", error.raw_os_error()),
    }
}

/// Writes the memory maps, proc_pid_maps(5).
fn write_maps(console: BorrowedFd<'_>) {
    let own = open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let Ok(own) = own else { return };
    let mut left = MAPS_BYTES;
    let mut bytes = [0; 512];
    while let Ok(count @ 1..) = read(&own, &mut bytes) {
        let count = count.min(left);
        left -= count;
        if !write_all(console, bytes.get(..count).unwrap_or_default()) || left == 0 {
            break;
        }
    }
    write_all(console, b"\n");
}

/// Writes all bytes; returns whether that succeeded.
fn write_all(console: BorrowedFd<'_>, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match write(console, bytes) {
            Ok(count @ 1..) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            _ => return false,
        }
    }
    true
}

/// One line, in memory of its own.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: [0; 512], length: 0 }
    }

    /// Writes a line, cut where it is too long.
    fn send(&mut self, console: BorrowedFd<'_>, compose: impl FnOnce(&mut Self) -> fmt::Result) {
        self.length = 0;
        let _ = self.write_str("bulkhead-agent: ");
        // Fails only when the line is full.
        let _ = compose(self);
        write_all(console, self.bytes.get(..self.length).unwrap_or_default());
        write_all(console, b"\n");
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let count = room.len().min(text.len());
        for (to, from) in room.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        self.length += count;
        if count == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}
