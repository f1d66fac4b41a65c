//! The program's own mapping in this process: its code and constants, which are never written.
//!
//! A static program of 1.4 MB is mostly the C library and the standard library, and starting it
//! touches a little of all of it. The kernel maps 16 pages around each page that is touched, so
//! that nearly the whole file stays mapped in a process that then does nothing but wait.

// UNSAFETY: madvise(2) changes memory behind the compiler's back, and the ends of the program are
// symbols of the linker.
#![expect(unsafe_code, reason = "madvise(2) on the range that the linker names")]

use rustix::mm::{Advice, madvise};

/// The page size of x86-64.
const PAGE: usize = 4096;

// SAFETY: the linkers of binutils and LLVM define both; only their addresses are taken.
unsafe extern "C" {
    /// The first byte of the program in memory.
    static __ehdr_start: u8;
    /// The first byte after its code.
    static etext: u8;
}

/// Unmaps all of it; pages that are needed again come back from the page cache.
pub(crate) fn give_back() {
    let (start, end) = ((&raw const __ehdr_start).cast_mut(), (&raw const etext).addr());
    let length = end.saturating_sub(start.addr()) / PAGE * PAGE;
    // SAFETY: the range is mapped read-only from the program's file and never written, so that every
    // page has the same bytes when it is mapped again.
    let given = unsafe { madvise(start.cast(), length, Advice::LinuxDontNeed) };
    // If this fails, the pages stay mapped.
    let _ = given;
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Kilobytes of the program that are mapped where it runs: proc(5), `smaps`. A backtrace maps its file
    /// once more.
    fn mapped() -> u64 {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let program = (&raw const __ehdr_start).addr()..(&raw const etext).addr();
        let (mut own, mut sum) = (false, 0);
        for line in smaps.lines() {
            let start = line.split_once('-').and_then(|(it, _)| usize::from_str_radix(it, 16).ok());
            if let Some(start) = start {
                own = program.contains(&start);
            } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| own) {
                sum += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
        }
        sum
    }

    /// A sum over every page, so that each is mapped.
    fn read_all() -> u64 {
        let (start, end) = (&raw const __ehdr_start, (&raw const etext).addr());
        let pages = (0..end - start.addr()).step_by(PAGE);
        // SAFETY: the whole range is mapped and never written; a volatile read keeps the compiler from
        // knowing that.
        pages.map(|at| u64::from(unsafe { start.wrapping_add(at).read_volatile() })).sum()
    }

    /// Alone in its process: other threads would map the program again.
    #[test]
    #[ignore = "needs the test host"]
    fn what_was_given_back_comes_again() {
        let sum = read_all();
        let all = mapped();
        give_back();
        let left = mapped();
        assert!(left < all / 2, "{left} of {all} kB are mapped");
        assert_eq!(read_all(), sum);
        assert!(mapped() > left);
    }
}
