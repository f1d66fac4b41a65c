//! Load: many pods at once, many in sequence, and full disks.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::memory::pss_kib;
use bulkhead_tests::runtime::{Runtime, comes_true, finish};
use bulkhead_tests::soak;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A file system of 256 KiB on a directory; it is unmounted when this is dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn on(directory: &'a Path) -> Self {
        mount("tmpfs", directory, "tmpfs", MountFlags::empty(), Some(c"size=256k")).unwrap();
        Self(directory)
    }

    fn fill(&self) {
        fs::write(self.0.join("filler"), vec![0; 1 << 20]).unwrap_err();
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        // Fails only when it is already unmounted.
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[test]
#[ignore = "long: --suite oci_long"]
fn ten_at_once_come_back_each_with_its_own() {
    let runtime = Runtime::new().unwrap();
    let start = |number: usize| {
        let bundle = Bundle::script(&format!("echo pod {number}; exit {number}")).unwrap();
        let mut command = runtime.run_command(&format!("pod-{number}"), &bundle);
        // Ten pods share one emulated processor.
        command.env("BULKHEAD_BOOT_TIMEOUT", "110");
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        (number, child, bundle)
    };
    let pods: Vec<_> = (0..10).map(start).collect();
    for (number, child, _bundle) in pods {
        let output = finish(child).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), i32::try_from(number).ok(), "{errors}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("pod {number}\n"));
    }
    runtime.assert_clean().unwrap();
}

/// `cargo xtask bench --only soak` repeats this often enough to notice small leaks.
#[test]
#[ignore = "long: --suite oci_long"]
fn lives_and_processes_leave_nothing_behind() {
    soak::lives(3).unwrap();
    soak::processes(15, 30).unwrap();
}

#[test]
fn whoever_stands_for_a_container_takes_little_memory() {
    let runtime = Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("output");
    let bundle = Bundle::script("echo up; sleep 1000").unwrap();
    let mut create = runtime.command(&["create", "--bundle"]);
    create.arg(bundle.path()).arg("small");
    // A stand-in with two streams to copy, each with a thread.
    create.stdout(File::create(&path).unwrap()).stderr(File::create(&path).unwrap());
    assert!(create.status().unwrap().success());
    runtime.ok(&["start", "small"]).unwrap();
    let written = || fs::read_to_string(&path).unwrap() == "up\n";
    assert!(comes_true(Duration::from_secs(60), written), "nothing was copied");
    let pids = runtime.processes("bulkhead-stand-in").unwrap();
    let kib = || pss_kib(pids[0]).unwrap().0;
    // It gives its code back a second after it has its streams.
    assert!(comes_true(Duration::from_secs(10), || kib() <= 768.0), "{} KiB", kib());
    runtime.ok(&["delete", "--force", "small"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_full_disk_is_an_error_of_the_write_and_passes() {
    let directory = tempfile::tempdir().unwrap();
    let _disk = SmallDisk::on(directory.path());
    let script = "dd if=/dev/zero of=/data/fill bs=4k 2>/root/words && exit 9; \
        grep -q 'No space left' /root/words && rm /data/fill && echo room > /data/small && \
        cat /data/small";
    let bundle = Bundle::script(script).unwrap();
    let bundle = bundle.mount(bind(directory.path(), "/data", &["rw"])).unwrap();
    let runtime = Runtime::new().unwrap();
    let output = runtime.run("full", &bundle).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "room\n");
    runtime.assert_clean().unwrap();
}

#[test]
fn a_full_state_directory_is_named_and_left_as_it_was() {
    let runtime = Runtime::new().unwrap();
    let disk = SmallDisk::on(runtime.root());
    disk.fill();
    let output = runtime.run("full", &Bundle::new(&["/bin/true"]).unwrap()).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("state.json") && errors.contains("No space left"), "{errors}");
    let left: Vec<_> =
        fs::read_dir(runtime.root()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["filler"]);
}
