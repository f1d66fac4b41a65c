//! The first process of a guest that tests devices: it carries out requests over vsock.
//!
//! Each port has a behaviour: 1 echoes, 2 sends as many bytes as requested, 3 counts bytes until
//! end-of-file, 4 carries out a task given in words, 5 closes at once. Streams carry [`pattern`],
//! so that lost, duplicated or reordered bytes are noticed at either end.

use std::arch::x86_64::__cpuid_count;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mount::{MountFlags, mount};
use rustix::thread::{CpuSet, sched_setaffinity};
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

mod network;
// The whole harness would not fit into the guest's memory.
#[path = "../harness/ping.rs"]
pub mod ping;

/// What to do with a stream.
type Behaviour = fn(VsockStream) -> Result<()>;

fn main() -> Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, place, kind, MountFlags::empty(), None).context(place)?;
    }
    let behaviours: [(u32, Behaviour); 5] =
        [(1, echo), (2, send), (3, count), (4, task), (5, |_| Ok(()))];
    for (port, behaviour) in behaviours {
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Errors are ignored: that the host disconnects is part of the tests.
                thread::spawn(move || behaviour(stream));
            }
        });
    }
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn pattern(at: u64) -> u8 {
    u8::try_from(at % 251).unwrap_or(0)
}

fn echo(mut stream: VsockStream) -> Result<()> {
    let mut bytes = vec![0; 0x1_0000];
    loop {
        let count = stream.read(&mut bytes)?;
        if count == 0 {
            return Ok(stream.shutdown(Shutdown::Write)?);
        }
        stream.write_all(&bytes[..count])?;
    }
}

fn send(mut stream: VsockStream) -> Result<()> {
    let mut wanted = [0; 8];
    stream.read_exact(&mut wanted)?;
    let mut left = u64::from_le_bytes(wanted);
    let bytes: Vec<u8> = (0..251 * 256).map(pattern).collect();
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        stream.write_all(&bytes[..now])?;
        left -= now as u64;
    }
    Ok(())
}

fn count(mut stream: VsockStream) -> Result<()> {
    let counted = expect_pattern(&mut stream)?;
    Ok(stream.write_all(&counted.to_le_bytes())?)
}

/// Reads to the end and returns how many bytes came.
fn expect_pattern(source: &mut impl Read) -> Result<u64> {
    let mut bytes = vec![0; 0x1_0000];
    let mut at = 0;
    loop {
        let count = source.read(&mut bytes)?;
        if count == 0 {
            return Ok(at);
        }
        for byte in &bytes[..count] {
            ensure!(*byte == pattern(at), "byte {at} is {byte}");
            at += 1;
        }
    }
}

fn task(mut stream: VsockStream) -> Result<()> {
    let mut words = String::new();
    stream.read_to_string(&mut words)?;
    let words: Vec<&str> = words.split(' ').collect();
    let answer = carry_out(&words).unwrap_or_else(|error| format!("failed: {error:#}"));
    Ok(stream.write_all(answer.as_bytes())?)
}

fn carry_out(words: &[&str]) -> Result<String> {
    match words {
        ["show", path] => Ok(fs::read_to_string(path)?.trim().into()),
        ["list", path] => {
            let names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name()));
            let mut names = names.collect::<io::Result<Vec<_>>>()?;
            names.sort();
            Ok(names.join(" ".as_ref()).to_string_lossy().into_owned())
        }
        ["write", path, text] => fs::write(path, text).map(|()| "done".into()).context("write"),
        ["random"] => {
            let mut bytes = [0; 32];
            File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
            Ok(format!("{bytes:x?}"))
        }
        ["use", mib] => {
            // Written, so that it takes memory of the host too.
            std::hint::black_box(vec![1_u8; mib.parse::<usize>()? << 20]);
            Ok("done".into())
        }
        ["read", disk] => {
            let read = expect_pattern(&mut File::open(disk)?)?;
            Ok(read.to_string())
        }
        ["change", disk] => change(disk).map(|()| "done".into()).context("change"),
        ["cpuid", processor, leaf, subleaf] => {
            let number = |word: &str| u32::from_str_radix(word, 16);
            cpuid(processor.parse()?, number(leaf)?, number(subleaf)?)
        }
        ["network", words @ ..] => network::carry_out(words),
        _ => bail!("no such task: {words:?}"),
    }
}

/// The result of `cpuid` on a processor: EAX, EBX, ECX, EDX.
fn cpuid(processor: usize, leaf: u32, subleaf: u32) -> Result<String> {
    let mut set = CpuSet::new();
    set.set(processor);
    sched_setaffinity(None, &set).context("run there")?;
    let said = __cpuid_count(leaf, subleaf);
    Ok(format!("{:x} {:x} {:x} {:x}", said.eax, said.ebx, said.ecx, said.edx))
}

/// Writes the second 4 KiB of a disk, and fills the third and fourth with zeroes in two ways.
fn change(disk: &str) -> io::Result<()> {
    let mut disk = File::options().read(true).write(true).open(disk)?;
    disk.seek(SeekFrom::Start(4096))?;
    disk.write_all(&[0xee; 4096])?;
    disk.sync_all()?;
    let keep = FallocateFlags::KEEP_SIZE;
    fallocate(&disk, FallocateFlags::ZERO_RANGE | keep, 2 * 4096, 4096)?;
    Ok(fallocate(&disk, FallocateFlags::PUNCH_HOLE | keep, 3 * 4096, 4096)?)
}
