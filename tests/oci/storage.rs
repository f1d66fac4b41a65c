//! Root file system and mounts.

use std::fs;
use std::os::unix::fs::MetadataExt;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::Runtime;
use serde_json::json;

fn run(bundle: &Bundle) -> String {
    let runtime = Runtime::new().unwrap();
    let output = runtime.run("storage", bundle).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    runtime.assert_clean().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_the_container_writes_is_in_the_rootfs_with_owner_and_mode() {
    let bundle =
        Bundle::script("echo kept > /root/file; chown 12:34 /root/file; chmod 4640 /root/file")
            .unwrap();
    run(&bundle);
    let file = bundle.rootfs().join("root/file");
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "kept\n");
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (12, 34, 0o4640));
}

#[test]
fn a_read_only_rootfs_cannot_be_written() {
    let bundle = Bundle::script("touch /root/file 2>&1; test ! -e /root/file").unwrap();
    let bundle = bundle.with(|spec| spec["root"]["readonly"] = json!(true)).unwrap();
    let output = run(&bundle);
    assert!(output.contains("Read-only file system"), "{output}");
    assert!(!bundle.rootfs().join("root/file").exists());
}

#[test]
fn a_directory_is_bound_and_written_through() {
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("from-host"), "hello").unwrap();
    let bundle = Bundle::script("cat /data/from-host; echo back > /data/from-guest").unwrap();
    let bundle = bundle.mount(bind(volume.path(), "/data", &["rw"])).unwrap();
    assert_eq!(run(&bundle), "hello");
    assert_eq!(fs::read_to_string(volume.path().join("from-guest")).unwrap(), "back\n");
}

#[test]
fn a_directory_bound_read_only_stays_as_it_is() {
    let volume = tempfile::tempdir().unwrap();
    let bundle = Bundle::script("touch /data/new 2>&1; test ! -e /data/new").unwrap();
    let bundle = bundle.mount(bind(volume.path(), "/data", &["ro"])).unwrap();
    assert!(run(&bundle).contains("Read-only file system"));
    assert_eq!(fs::read_dir(volume.path()).unwrap().count(), 0);
}

#[test]
fn a_file_is_bound_over_a_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "nameserver 10.0.0.1\n").unwrap();
    let bundle = Bundle::script("cat /etc/resolv.conf").unwrap();
    let bundle = bundle.mount(bind(file.path(), "/etc/resolv.conf", &["ro"])).unwrap();
    assert_eq!(run(&bundle), "nameserver 10.0.0.1\n");
}

#[test]
fn a_tmpfs_has_its_size_and_leaves_nothing_on_the_host() {
    let script = "dd if=/dev/zero of=/mnt/big bs=64k count=32 2>&1; stat -c %s /mnt/big";
    let bundle = Bundle::script(script).unwrap();
    let tmpfs = json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs",
                       "options": ["size=1m", "mode=1777"]});
    let output = run(&bundle.mount(tmpfs).unwrap());
    assert!(output.contains("No space left"), "{output}");
    assert!(output.ends_with("1048576\n"), "{output}");
}

#[test]
fn another_container_s_files_are_not_in_the_share() {
    let bundle = Bundle::script("find / -xdev -name marker").unwrap();
    let neighbour = Bundle::script("true").unwrap();
    fs::write(neighbour.rootfs().join("marker"), "").unwrap();
    assert_eq!(run(&bundle), "");
}
