//! The serial console: a 16550A (vm-superio) whose output goes to a log.
//!
//! The guest decides how much it writes, so the log is bounded: after [`LOG_BYTES_MAX`] only the
//! tail in memory is updated. There is no input: the guest never has a byte to read.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The first port of COM1.
pub(crate) const PORT_BASE: u16 = 0x3f8;
/// How many ports it has.
pub(crate) const PORT_COUNT: u16 = 8;
/// The most that is written to the log.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// The most bytes in the tail: the last lines, for the report of the machine's end. There is room
/// for two dumps of registers and stack, and the tail fits into one message as JSON, in which a
/// byte takes six at worst.
const TAIL_BYTES: usize = 8 << 10;
/// Where a line is cut.
const LINE_BYTES_MAX: usize = 512;
/// The text before the reason of a panic of Linux.
const PANIC_MARK: &str = "Kernel panic - not syncing";

/// The interrupt of the port.
#[derive(Debug)]
pub(crate) struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is full, so an interrupt is pending already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// The port and its output.
#[derive(Debug)]
pub(crate) struct Console {
    serial: Serial<Irq, NoEvents, Log>,
}

impl Console {
    /// A port that writes to `log`.
    pub(crate) fn new(log: File) -> io::Result<Self> {
        let irq = Irq(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self { serial: Serial::new(irq, Log::new(log)) })
    }

    /// The eventfd that raises the interrupt; KVM listens to it.
    pub(crate) fn irq(&self) -> &EventFd {
        &self.serial.interrupt_evt().0
    }

    /// A guest's read of a register, counted from [`PORT_BASE`].
    pub(crate) fn read(&mut self, register: u8) -> u8 {
        self.serial.read(register)
    }

    /// A guest's write to a register. If the log cannot be written, only its text is lost.
    pub(crate) fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.serial.write(register, value) {
            log::debug!("console: {error:?}");
        }
    }

    /// Bytes that the guest wrote.
    pub(crate) fn bytes(&self) -> u64 {
        self.serial.writer().bytes
    }

    /// Writes the unfinished line and returns the last lines.
    pub(crate) fn finish(&mut self) -> Vec<String> {
        let log = self.serial.writer_mut();
        log.end_line();
        log.tail.iter().cloned().collect()
    }

    /// Whether the guest kernel said that it panicked.
    pub(crate) fn panicked(&self) -> bool {
        self.serial.writer().panicked
    }
}

/// Splits bytes into lines for the log and the tail.
#[derive(Debug)]
struct Log {
    file: File,
    bytes: u64,
    logged: u64,
    line: Vec<u8>,
    tail: VecDeque<String>,
    tail_bytes: usize,
    panicked: bool,
}

impl Log {
    fn new(file: File) -> Self {
        let (line, tail) = (Vec::new(), VecDeque::new());
        Self { file, bytes: 0, logged: 0, line, tail, tail_bytes: 0, panicked: false }
    }

    fn push(&mut self, byte: u8) {
        self.bytes += 1;
        match byte {
            b'\n' => self.end_line(),
            b'\r' => {}
            _ => {
                self.line.push(byte);
                if self.line.len() == LINE_BYTES_MAX {
                    self.end_line();
                }
            }
        }
    }

    fn end_line(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let text = String::from_utf8_lossy(&self.line).into_owned();
        self.panicked |= text.contains(PANIC_MARK);
        if self.logged < LOG_BYTES_MAX {
            self.line.push(b'\n');
            self.logged += self.line.len() as u64;
            if self.logged >= LOG_BYTES_MAX {
                self.line.extend(b"(the console log is full; the guest goes on)\n");
            }
            if let Err(error) = self.file.write_all(&self.line) {
                log::debug!("console log: {error}");
            }
        }
        self.line.clear();
        self.tail_bytes += text.len();
        self.tail.push_back(text);
        while self.tail_bytes > TAIL_BYTES {
            self.tail_bytes -= self.tail.pop_front().map_or(self.tail_bytes, |line| line.len());
        }
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.push(*byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_last_lines_and_notices_a_panic() {
        let mut log = Log::new(tempfile::tempfile().unwrap());
        for number in 0..10_000 {
            writeln!(log, "line {number}").unwrap();
        }
        write!(log, "[    0.1] Kernel panic - not syncing: no init\r\nend").unwrap();
        log.end_line();
        let bytes: usize = log.tail.iter().map(String::len).sum();
        assert!(bytes == log.tail_bytes && bytes <= TAIL_BYTES && bytes > TAIL_BYTES / 2);
        assert_eq!(log.tail.back().unwrap(), "end");
        assert!(log.panicked);
    }

    #[test]
    fn a_guest_that_never_stops_talking_does_not_fill_the_disk() {
        let file = tempfile::tempfile().unwrap();
        let mut log = Log::new(file.try_clone().unwrap());
        let chunk = [b'x'; 4096];
        for _ in 0..2048 {
            log.write_all(&chunk).unwrap();
        }
        let len = file.metadata().unwrap().len();
        assert!(len < LOG_BYTES_MAX + 2 * LINE_BYTES_MAX as u64, "{len}");
        assert_eq!(log.bytes, 2048 * 4096);
    }
}
