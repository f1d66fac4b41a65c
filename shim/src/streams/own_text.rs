//! The program itself, as this process has it mapped: its code and constants, which nobody writes.
//!
//! A static program of 1.4 MB is mostly the C library and the standard library, and coming up touches
//! a little of all of it. The kernel maps 16 pages around each that is touched, so that nearly the
//! whole file stays mapped in a process that then does nothing but wait.

// UNSAFETY: madvise(2) changes memory behind the compiler's back, and the ends of the program are
// symbols of the linker.
#![expect(unsafe_code, reason = "madvise(2) on the range that the linker names")]

use rustix::mm::{Advice, madvise};

/// Of x86-64.
const PAGE: usize = 4096;

// SAFETY: the linkers of binutils and LLVM define both; only their addresses are taken.
unsafe extern "C" {
    /// The first byte of the program in memory.
    static __ehdr_start: u8;
    /// The first byte after its code.
    static etext: u8;
}

/// Unmaps all of it; what is needed again comes back from the page cache as it is needed.
pub(crate) fn give_back() {
    let (start, end) = ((&raw const __ehdr_start).cast_mut(), (&raw const etext).addr());
    let length = end.saturating_sub(start.addr()) / PAGE * PAGE;
    // SAFETY: the range is mapped read-only from the program's file and never written, so that every
    // page has the same bytes when it is mapped again.
    let given = unsafe { madvise(start.cast(), length, Advice::LinuxDontNeed) };
    // Where that fails, everything is as it was.
    let _ = given;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_back_comes_again() {
        let constant = std::hint::black_box("a constant of the program");
        give_back();
        assert_eq!(constant.len(), 25);
        assert!(constant.ends_with("program"));
    }
}
