//! Makes system calls in a container, to test its seccomp filter: `syscalls CALL…` makes each call
//! in a child process and prints the result.
//!
//! A CALL is `[HOW/]ABI:NUMBER[:ARGUMENT,…]`. The ABI is `x86_64`, `x32` or `i386` (by `int 0x80`). HOW is
//! `caught`, to catch the signal of a trap, or `thread`, to make the call in a second thread. Numbers
//! are decimal, or hexadecimal after `0x`.

// UNSAFETY: the purpose of this program is to make raw system calls with any numbers.
#![expect(unsafe_code, reason = "raw system calls, fork(2), a signal handler")]

use std::arch::asm;
use std::env;
use std::io::{self, Write as _};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// The bit that marks a system call number as one of x32.
const X32: u64 = 0x4000_0000;
/// Values that no system call returns: the other results of a child.
const NOTHING: i64 = i64::MAX;
const TRAPPED: i64 = i64::MAX - 1;
/// How long a killed thread may take to end, or to end its process.
const PATIENCE: Duration = Duration::from_millis(300);

/// Where a child stores what its call returned.
static SAID: OnceLock<&AtomicI64> = OnceLock::new();

/// One requested call.
#[derive(Clone, Copy, Debug)]
struct Call {
    how: How,
    abi: Abi,
    number: u64,
    arguments: [u64; 6],
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Plain,
    Caught,
    Thread,
}

#[derive(Clone, Copy, Debug)]
enum Abi {
    X86_64,
    X32,
    I386,
}

fn main() -> Result<()> {
    let said = shared()?;
    SAID.get_or_init(|| said);
    for word in env::args().skip(1) {
        let call = parse(&word).with_context(|| word.clone())?;
        let came = attempt(call, said)?;
        writeln!(io::stdout(), "{word} {came}")?;
    }
    Ok(())
}

fn parse(word: &str) -> Result<Call> {
    let (how, call) = word.split_once('/').unwrap_or(("", word));
    let how = match how {
        "" => How::Plain,
        "caught" => How::Caught,
        "thread" => How::Thread,
        other => bail!("{other:?} is no way to make a call"),
    };
    let mut parts = call.split(':');
    let abi = match parts.next() {
        Some("x86_64") => Abi::X86_64,
        Some("x32") => Abi::X32,
        Some("i386") => Abi::I386,
        _ => bail!("no ABI"),
    };
    let number = number(parts.next().context("no number")?)?;
    let mut arguments = [0; 6];
    for (place, word) in arguments.iter_mut().zip(parts.next().unwrap_or("0").split(',')) {
        *place = self::number(word)?;
    }
    Ok(Call { how, abi, number, arguments })
}

fn number(word: &str) -> Result<u64> {
    match word.strip_prefix("0x") {
        Some(digits) => Ok(u64::from_str_radix(digits, 16)?),
        None => Ok(word.parse::<i64>().map(i64::cast_unsigned).or_else(|_| word.parse())?),
    }
}

/// Makes a call in a child process and describes the result.
fn attempt(call: Call, said: &AtomicI64) -> Result<String> {
    said.store(NOTHING, Ordering::SeqCst);
    // SAFETY: this process has one thread, so the child may do anything.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork: {}", io::Error::last_os_error());
    if child == 0 {
        make(call);
    }
    let mut status = 0;
    // SAFETY: the status is this function's own.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(waited == child, "waitpid: {}", io::Error::last_os_error());
    let returned = match said.load(Ordering::SeqCst) {
        NOTHING => "did not return".to_owned(),
        TRAPPED => "was trapped".to_owned(),
        returned @ -4095..0 => format!("errno {}", -returned),
        _ => "ok".to_owned(),
    };
    let ended = match (libc::WIFSIGNALED(status), libc::WTERMSIG(status)) {
        (true, signal) => format!(", signal {signal}"),
        (false, _) => String::new(),
    };
    Ok(returned + &ended)
}

/// The child: makes the call and stores its result.
fn make(call: Call) -> ! {
    if call.how == How::Caught {
        let handler = caught as extern "C" fn(libc::c_int);
        // SAFETY: the handler only stores a number and exits.
        unsafe { libc::signal(libc::SIGSYS, handler as libc::sighandler_t) };
    }
    if call.how == How::Thread {
        thread::spawn(move || say(raw(call)));
        thread::sleep(PATIENCE);
    } else {
        say(raw(call));
    }
    end()
}

extern "C" fn caught(_: libc::c_int) {
    say(TRAPPED);
    end()
}

fn say(what: i64) {
    if let Some(said) = SAID.get() {
        said.store(what, Ordering::SeqCst);
    }
}

fn end() -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

fn raw(call: Call) -> i64 {
    match call.abi {
        Abi::X86_64 => syscall(call.number, call.arguments),
        Abi::X32 => syscall(call.number | X32, call.arguments),
        Abi::I386 => interrupt(call.number, call.arguments),
    }
}

fn syscall(number: u64, arguments: [u64; 6]) -> i64 {
    let [rdi, rsi, rdx, r10, r8, r9] = arguments;
    let returned: i64;
    // SAFETY: whatever the kernel does affects only a child that ends right afterwards.
    unsafe {
        asm!("syscall", inlateout("rax") number.cast_signed() => returned, in("rdi") rdi,
             in("rsi") rsi, in("rdx") rdx, in("r10") r10, in("r8") r8, in("r9") r9,
             lateout("rcx") _, lateout("r11") _);
    }
    returned
}

/// Makes a system call as 32-bit programs do, with only four arguments: the compiler reserves one
/// register.
fn interrupt(number: u64, arguments: [u64; 6]) -> i64 {
    let [rbx, rcx, rdx, rsi, ..] = arguments;
    let returned: i64;
    // SAFETY: as above.
    unsafe {
        asm!("xchg rbx, {rbx}", "int 0x80", "xchg rbx, {rbx}", rbx = inout(reg) rbx => _,
             inlateout("rax") number.cast_signed() => returned, in("rcx") rcx, in("rdx") rdx,
             in("rsi") rsi, lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _);
    }
    // The result has 32 bits.
    i64::from(u32::try_from(returned & 0xffff_ffff).unwrap_or_default().cast_signed())
}

/// A number in memory that children share with this process.
fn shared() -> Result<&'static AtomicI64> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let kind = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: maps new memory.
    let page = unsafe { libc::mmap(ptr::null_mut(), 4096, access, kind, -1, 0) };
    ensure!(page != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
    // SAFETY: the memory stays mapped, is aligned to a page, and zeroes are a valid number.
    Ok(unsafe { &*page.cast() })
}
