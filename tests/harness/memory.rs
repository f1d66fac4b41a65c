//! Memory of a process, as the host's kernel counts it.

use std::fs;

use anyhow::Result;

/// The proportional set size of a process without guest memory, and that of guest memory, which is
/// the one mapping of at least `GUEST_KIB`.
///
/// # Errors
/// When there is no such process.
pub fn pss_kib(pid: u32) -> Result<(f64, f64)> {
    const GUEST_KIB: f64 = 64.0 * 1024.0;
    let (mut process, mut guest, mut size) = (0.0, 0.0, 0.0);
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next().and_then(|word| word.parse().ok()));
        match (name, value) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("Pss:"), Some(kib)) if size >= GUEST_KIB => guest += kib,
            (Some("Pss:"), Some(kib)) => process += kib,
            _ => {}
        }
    }
    Ok((process, guest))
}
