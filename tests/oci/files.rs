//! The root file system through virtio-fs, as a workload uses it.
//!
//! Single requests are tested in the file server's package, without a virtual machine. These tests
//! cover what needs a guest: its page cache, many requests in flight, the relay under load.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::Runtime;

/// Runs a script that must succeed, and returns its output.
fn run(bundle: &Bundle) -> String {
    let runtime = Runtime::new().unwrap();
    let output = runtime.run("files", bundle).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    runtime.assert_clean().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_kind_of_file_is_made_and_found() {
    let script = "set -e; mkdir -p /w/d && cd /w; echo text > d/file; ln d/file same; \
        ln -s d/file link; mkfifo fifo; mknod device c 1 3; chmod 6755 d/file; touch -d @1000 d; \
        dd if=/dev/zero of=sparse bs=1 count=1 seek=1048575 2> /dev/null; \
        test \"$(cat link)\" = text; test \"$(cat same)\" = text; echo in > device; \
        mv same moved; rm link; ls -a d | tr '\\n' ' '";
    let bundle = Bundle::script(script).unwrap();
    assert_eq!(run(&bundle), ". .. file ");
    let of = |name: &str| fs::symlink_metadata(bundle.rootfs().join("w").join(name)).unwrap();
    assert_eq!((of("d/file").mode() & 0o7777, of("d/file").nlink()), (0o6755, 2));
    assert_eq!(of("moved").ino(), of("d/file").ino());
    assert_eq!(of("d").mtime(), 1000);
    assert!(of("fifo").file_type().is_fifo());
    assert_eq!(of("device").rdev(), 0x103);
    assert_eq!(of("sparse").len(), 1 << 20);
    assert!(of("sparse").blocks() < 2048);
    assert!(!bundle.rootfs().join("w/link").exists());
}

#[test]
#[ignore = "long: --suite oci_long"]
fn many_processes_write_and_read_at_once() {
    let script = "set -e; mkdir /w; cd /w; \
        one() { dd if=/dev/urandom of=$1 bs=300k count=20 2> /dev/null; cp $1 $1.copy; \
                cmp $1 $1.copy; mv $1.copy $1.done; } ; \
        pids=; for n in 1 2 3 4 5 6 7 8; do one $n & pids=\"$pids $!\"; done; \
        for pid in $pids; do wait $pid; done; sha256sum *.done";
    let bundle = Bundle::script(script).unwrap();
    let seen = run(&bundle);
    assert_eq!(seen.lines().count(), 8);
    for line in seen.lines() {
        let (sum, name) = line.split_once("  ").unwrap();
        let host = std::process::Command::new("sha256sum")
            .arg(bundle.rootfs().join("w").join(name))
            .output()
            .unwrap();
        assert!(String::from_utf8(host.stdout).unwrap().starts_with(sum), "{name}");
    }
}

#[test]
#[ignore = "long: --suite oci_long"]
fn a_tree_is_packed_unpacked_and_walked() {
    let script = "set -e; mkdir -p /w/tree; cd /w; \
        for d in 0 1 2 3 4 5 6 7 8 9; do mkdir tree/$d; \
          for f in 0 1 2 3 4 5 6 7 8 9; do echo $d$f > tree/$d/$f; ln -s $f tree/$d/link-$f; done; \
        done; tar cf tree.tar tree; mkdir out; tar xf tree.tar -C out; \
        diff -r tree out/tree; find out | wc -l; rm -r tree; ls";
    let bundle = Bundle::script(script).unwrap();
    assert_eq!(run(&bundle), "212\nout\ntree.tar\n");
}

#[test]
fn files_of_two_volumes_are_not_taken_for_one() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(one.path().join("file"), "one").unwrap();
    // Volumes on different file systems, whose inode numbers may be the same.
    let script = "set -e; cp /one/file /two/file; cat /two/file; test ! /one/file -ef /two/file";
    let bundle = Bundle::script(script).unwrap();
    let bundle = bundle.mount(bind(one.path(), "/one", &["rw"])).unwrap();
    let bundle = bundle.mount(bind(two.path(), "/two", &["rw"])).unwrap();
    assert_eq!(run(&bundle), "one");
    assert_eq!(fs::read_to_string(two.path().join("file")).unwrap(), "one");
}
