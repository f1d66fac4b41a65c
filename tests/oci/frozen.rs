//! A volume whose disk does not answer blocks nothing that does not need it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::{Runtime, comes_true, output, told};
use tempfile::TempDir;

/// More than the file server has threads.
const WRITERS: usize = 8;
const FILES: usize = 50;
/// Far longer than an `exec` takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A file system of its own, which can be frozen: writers to it then wait.
struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (image, mounted) = (directory.path().join("image"), directory.path().join("mounted"));
        fs::create_dir(&mounted).unwrap();
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        run("/sbin/mkfs.ext4", &["-q", text(&image)]);
        run("mount", &["-o", "loop", text(&image), text(&mounted)]);
        let disk = Self(directory);
        for writer in 1..=WRITERS {
            fs::write(disk.file(writer), "").unwrap();
        }
        disk
    }

    fn mounted(&self) -> std::path::PathBuf {
        self.0.path().join("mounted")
    }

    fn file(&self, writer: usize) -> std::path::PathBuf {
        self.mounted().join(format!("file-{writer}"))
    }

    fn freeze(&self, flag: &str) {
        run("/sbin/fsfreeze", &[flag, text(&self.mounted())]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mounted = self.mounted();
        // Fails when the file system is not frozen any more.
        let mut thaw = Command::new("/sbin/fsfreeze");
        let _ = thaw.arg("-u").arg(&mounted).stderr(Stdio::null()).status();
        let _ = Command::new("umount").arg("-l").arg(&mounted).status();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, args: &[&str]) {
    let (status, _, errors) = told(&output(Command::new(program).args(args)).unwrap());
    assert_eq!(status, Some(0), "{program}: {errors}");
}

/// Has the container read and list files that its machine has not cached yet. Returns how long it
/// took and its output; `None` if it did not end in time.
fn look(runtime: &Runtime, bundle: &Bundle, name: &str) -> (Duration, Option<String>) {
    for number in 0..FILES {
        let path = bundle.rootfs().join(format!("{name}-{number}"));
        fs::write(path, number.to_string()).unwrap();
    }
    let script = format!("cat /{name}-*; ls -l / | grep -c {name}-");
    let started = Instant::now();
    let mut command = runtime.command(&["exec", "c", "sh", "-c", &script]);
    let mut looking = command.stdout(Stdio::piped()).spawn().unwrap();
    let in_time = comes_true(PATIENCE, || looking.try_wait().unwrap().is_some());
    let took = started.elapsed();
    let _ = looking.kill();
    let seen = looking.wait_with_output().unwrap();
    (took, in_time.then(|| String::from_utf8(seen.stdout).unwrap()))
}

/// The output that [`look`] should return.
fn expected() -> String {
    let mut numbers: Vec<_> = (0..FILES).map(|number| number.to_string()).collect();
    numbers.sort();
    numbers.concat() + &format!("{FILES}\n")
}

#[test]
#[ignore = "long: --suite oci_long"]
fn writers_that_wait_for_a_disk_do_not_delay_those_who_read_elsewhere() {
    let disk = Disk::new();
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
    let bundle = bundle.mount(bind(&disk.mounted(), "/data", &["rw"])).unwrap();
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    let (ordinary, seen) = look(&runtime, &bundle, "before");
    assert_eq!(seen, Some(expected()));
    disk.freeze("-f");
    let write = format!("for n in $(seq {WRITERS}); do echo x >> /data/file-$n & done; wait");
    let mut writing = runtime.command(&["exec", "c", "sh", "-c", &write]).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let (meanwhile, seen) = look(&runtime, &bundle, "meanwhile");
    let waiting = (1..=WRITERS).all(|writer| fs::metadata(disk.file(writer)).unwrap().len() == 0);
    disk.freeze("-u");
    println!(
        "{FILES} files were read and listed in {ordinary:?}, while writers wait in {meanwhile:?}"
    );
    assert_eq!(seen, Some(expected()), "nothing was read while the disk did not answer");
    assert!(waiting, "nobody waited");
    assert!(comes_true(PATIENCE, || writing.try_wait().unwrap().is_some()));
    assert!((1..=WRITERS).all(|writer| fs::read(disk.file(writer)).unwrap() == b"x\n"));
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}
