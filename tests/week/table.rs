//! The table of times, which is printed when the test program ends.

// UNSAFETY: only `atexit(3)` is called when the last test is over.
#![expect(unsafe_code, reason = "libtest has no hook that runs after the last test")]

use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A program, and how long it took under runc and under Bulkhead; nothing where it was not run.
type Row = (&'static str, [Option<Duration>; 2]);

static ROWS: Mutex<Vec<Row>> = Mutex::new(Vec::new());

/// Adds a row to the table.
pub(crate) fn add(program: &'static str, took: [Option<Duration>; 2]) {
    let mut rows = ROWS.lock().unwrap_or_else(PoisonError::into_inner);
    if rows.is_empty() {
        // SAFETY: `print` is a function without arguments that may be called at any time; that it
        // was accepted is checked.
        assert_eq!(unsafe { libc::atexit(print) }, 0, "atexit");
    }
    rows.push((program, took));
}

extern "C" fn print() {
    let rows = ROWS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut table = format!("\n{:>9}  {:>9}  seconds of\n", "runc", "bulkhead");
    for (program, [theirs, ours]) in rows.iter() {
        let [theirs, ours] = [theirs, ours]
            .map(|took| took.map_or("-".to_owned(), |took| format!("{:.1}", took.as_secs_f32())));
        table += &format!("{theirs:>9}  {ours:>9}  {program}\n");
    }
    // A panic must not leave a function that C calls, and nobody is left to be told.
    let _ = io::stdout().write_all(table.as_bytes());
}
