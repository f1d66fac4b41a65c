//! Large things: many files, large directories, large files, and what they cost.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use crate::pod::Pod;

/// Files of one directory.
const FILES: usize = 100;

fn status_kib(pod: &Pod, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", pod.server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

fn descriptors(pod: &Pod) -> usize {
    fs::read_dir(format!("/proc/{}/fd", pod.server.child.id())).unwrap().count()
}

fn walk(root: &Path) -> usize {
    let (mut count, mut todo) = (0, vec![root.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            count += 1;
            if entry.metadata().unwrap().is_dir() {
                todo.push(entry.path());
            }
        }
    }
    count
}

#[test]
fn fifty_thousand_files_are_walked() {
    let pod = Pod::new();
    // Where nobody may raise limits, there may be too few descriptors for that many.
    let limit = getrlimit(Resource::Nofile).maximum.filter(|_| !can_raise()).unwrap_or(u64::MAX);
    let directories = 500.min(usize::try_from(limit - 1000).unwrap() / (FILES + 1));
    for directory in 0..directories {
        let directory = pod.host.join(format!("directory-{directory}"));
        fs::create_dir(&directory).unwrap();
        for file in 0..FILES {
            File::create(directory.join(format!("file-{file}"))).unwrap();
        }
    }
    let before = status_kib(&pod, "VmRSS");
    let start = Instant::now();
    let needed = directories * (FILES + 1);
    assert_eq!(walk(&pod.guest), needed);
    let took = start.elapsed();
    let (after, held) = (status_kib(&pod, "VmRSS"), descriptors(&pod));
    println!("walked {needed} names in {took:?}: {before} -> {after} KiB, {held} descriptors");
    // The server drops what the guest forgets.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let start = Instant::now();
    while descriptors(&pod) > needed / 10 {
        assert!(start.elapsed().as_secs() < 10, "{} descriptors", descriptors(&pod));
        thread::sleep(Duration::from_millis(20));
    }
    println!("forgotten: {} KiB, {} descriptors", status_kib(&pod, "VmRSS"), descriptors(&pod));
}

fn can_raise() -> bool {
    // CAP_SYS_RESOURCE, bit 24 of the effective set.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap() & 1 << 24 != 0
}

#[test]
fn files_that_came_and_went_leave_nothing_behind() {
    let pod = Pod::new();
    let come_and_go = |from: usize| {
        for number in from..from + 5000 {
            let path = pod.guest.join(format!("file-{number}"));
            drop(File::create(&path).unwrap());
            fs::remove_file(&path).unwrap();
        }
    };
    come_and_go(0);
    let before = status_kib(&pod, "VmRSS");
    come_and_go(5000);
    let after = status_kib(&pod, "VmRSS");
    assert!(after < before + 64, "{before} -> {after} KiB");
    assert!(descriptors(&pod) < 32);
}

#[test]
fn a_huge_directory_is_listed_whole_and_emptied() {
    let pod = Pod::new();
    let directory = pod.guest.join("huge");
    fs::create_dir(&directory).unwrap();
    // Names of all lengths, so that entries end everywhere in a message.
    for number in 0..8000_usize {
        let padding = "x".repeat(number % 200);
        File::create(pod.host.join("huge").join(format!("{number}-{padding}"))).unwrap();
    }
    let mut names: Vec<_> =
        fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 8000);
    fs::remove_dir_all(&directory).unwrap();
    assert!(!pod.host.join("huge").exists());
}

#[test]
fn a_gibibyte_is_written_read_back_and_compared() {
    const CHUNK: usize = 1 << 20;
    let pod = Pod::new();
    let mut chunk: Vec<u8> = (0..CHUNK).map(|index| (index * 31 % 251) as u8).collect();
    let mut stamp = |number: usize| {
        chunk[..8].copy_from_slice(&(number as u64).to_le_bytes());
        chunk.clone()
    };
    let path = pod.guest.join("large");
    let start = Instant::now();
    let mut file = File::create(&path).unwrap();
    for number in 0..1024 {
        file.write_all(&stamp(number)).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let written = start.elapsed();
    let start = Instant::now();
    let mut file = File::open(&path).unwrap();
    let mut seen = vec![0; CHUNK];
    for number in 0..1024 {
        file.read_exact(&mut seen).unwrap();
        assert!(seen == stamp(number), "chunk {number}");
    }
    assert_eq!(file.read(&mut seen).unwrap(), 0);
    println!(
        "1 GiB written in {written:?}, read and compared in {:?}; file server {} KiB",
        start.elapsed(),
        status_kib(&pod, "VmHWM")
    );
}

/// How often the file server's threads have gone to sleep.
fn sleeps(pod: &Pod) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", pod.server.child.id())).unwrap();
    tasks
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.unwrap().trim().parse::<u64>().unwrap()
        })
        .sum()
}

#[test]
fn memory_that_reads_and_writes_took_goes_back_and_an_idle_server_sleeps() {
    let pod = Pod::new();
    // Every thread serves something small first, so that its stack is there.
    for number in 0..300 {
        fs::write(pod.guest.join(format!("small-{number}")), b"small").unwrap();
    }
    let before = status_kib(&pod, "RssAnon");
    let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(16 << 20).collect();
    for round in 0..2 {
        let (written, read) = (format!("written-{round}"), format!("read-{round}"));
        fs::write(pod.guest.join(&written), &bytes).unwrap();
        fs::write(pod.host.join(&read), &bytes).unwrap();
        assert!(fs::read(pod.guest.join(&read)).unwrap() == bytes);
        assert!(fs::read(pod.host.join(&written)).unwrap() == bytes);
        assert!(status_kib(&pod, "RssAnon") > before + 100, "round {round}: no buffer was used");
        let deadline = Instant::now() + Duration::from_secs(20);
        while status_kib(&pod, "RssAnon") > before + 96 {
            let now = status_kib(&pod, "RssAnon");
            assert!(Instant::now() < deadline, "round {round}: {before} KiB grew to {now} KiB");
            thread::sleep(Duration::from_millis(100));
        }
    }
    // Others may wait with a timeout still, once.
    thread::sleep(Duration::from_secs(3));
    let asleep = sleeps(&pod);
    thread::sleep(Duration::from_secs(5));
    assert_eq!(sleeps(&pod), asleep, "an idle server woke up");
}
