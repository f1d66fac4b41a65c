//! Block devices of the host reach a container as disks of its machine.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, output, told};
use rustix::fs::{major, minor};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

/// A block device of the host around a file of 8 MiB.
struct Loop {
    file: NamedTempFile,
    device: PathBuf,
}

impl Loop {
    fn new(first: &[u8]) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        file.as_file().write_all_at(first, 0).unwrap();
        let mut command = Command::new("/sbin/losetup");
        let (status, name, errors) =
            told(&output(command.args(["--find", "--show"]).arg(file.path())).unwrap());
        assert_eq!(status, Some(0), "{errors}");
        Self { file, device: name.trim().into() }
    }

    fn number(&self) -> (u32, u32) {
        let number = fs::metadata(&self.device).unwrap().rdev();
        (major(number), minor(number))
    }

    /// The entry of `linux.devices` and the device rule for it.
    fn given(&self, path: &str, access: &str) -> (Value, Value) {
        let (major, minor) = self.number();
        let device = json!({"path": path, "type": "b", "major": major, "minor": minor,
            "fileMode": 0o640, "uid": 5, "gid": 6});
        let rule =
            json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access});
        (device, rule)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("/sbin/losetup").arg("--detach").arg(&self.device).status();
    }
}

fn bundle(script: &str, disks: &[(Value, Value)]) -> Bundle {
    let bundle = Bundle::script(script).unwrap();
    bundle
        .with(|spec| {
            let (devices, mut rules): (Vec<_>, Vec<_>) = disks.iter().cloned().unzip();
            rules.insert(0, json!({"allow": false, "access": "rwm"}));
            spec["linux"]["devices"] = devices.into();
            spec["linux"]["resources"] = json!({"devices": rules});
        })
        .unwrap()
}

#[test]
fn disks_are_read_and_written_as_far_as_the_rules_say() {
    let runtime = Runtime::new().unwrap();
    let (data, fixed) = (Loop::new(b"first disk\n"), Loop::new(b"second disk\n"));
    let script = "head -c 11 /dev/data; head -c 12 /dev/disks/fixed; stat -c '%A %u %g' /dev/data; \
        echo written | dd of=/dev/data bs=512 seek=9 conv=fsync 2>/dev/null; echo $?; \
        echo no | dd of=/dev/disks/fixed 2>/dev/null; echo $?; \
        dd if=/dev/data of=/dev/null bs=1M 2>&1 | grep -c '8+0 records in'";
    let disks = [data.given("/dev/data", "rwm"), fixed.given("/dev/disks/fixed", "r")];
    let (status, out, errors) = told(&runtime.run("c", &bundle(script, &disks)).unwrap());
    let expected = "first disk\nsecond disk\nbrw-r----- 5 6\n0\n1\n1\n";
    assert_eq!((status, out.as_str()), (Some(0), expected), "{errors}");
    // The data was written to the right place.
    let at = |file: &File, offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    assert_eq!(at(data.file.as_file(), 9 * 512, 8), b"written\n");
    assert_eq!(at(fixed.file.as_file(), 0, 12), b"second disk\n");
    runtime.assert_clean().unwrap();
}

#[test]
fn a_disk_stays_when_limits_change() {
    let runtime = Runtime::new().unwrap();
    let disk = Loop::new(b"still here\n");
    let bundle = bundle("exec sleep 1000", &[disk.given("/dev/data", "rw")]);
    runtime.create("c", &bundle).unwrap();
    runtime.ok(&["start", "c"]).unwrap();
    let read = || runtime.ok(&["exec", "c", "head", "-c", "11", "/dev/data"]).unwrap();
    assert_eq!(read(), "still here\n");
    runtime.ok(&["update", "--pids-limit", "50", "c"]).unwrap();
    assert_eq!(read(), "still here\n");
    runtime.ok(&["delete", "--force", "c"]).unwrap();
    runtime.assert_clean().unwrap();
}

#[test]
fn a_disk_that_is_not_there_is_named() {
    let runtime = Runtime::new().unwrap();
    let device = json!({"path": "/dev/gone", "type": "b", "major": 7, "minor": 99});
    let rule = json!({"allow": true, "type": "b", "major": 7, "minor": 99, "access": "rwm"});
    let (status, _, errors) = told(&runtime.run("c", &bundle("true", &[(device, rule)])).unwrap());
    assert_eq!(status, Some(1));
    assert!(errors.contains("/dev/gone (7:99), which the host does not have"), "{errors}");
    let disk = Loop::new(b"");
    let many: Vec<_> = (0..9).map(|number| disk.given(&format!("/dev/d{number}"), "r")).collect();
    let (status, _, errors) = told(&runtime.run("c", &bundle("true", &many)).unwrap());
    assert_eq!(status, Some(1));
    assert!(errors.contains("9 block devices in linux.devices and 0 disks"), "{errors}");
    runtime.assert_clean().unwrap();
}

/// An image of the host, empty unless something was written to it.
fn image(megabytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(megabytes << 20).unwrap();
    file
}

/// A mount of the file system on a disk.
fn volume(source: &Path, options: &[&str]) -> Value {
    json!({"destination": "/data", "type": "ext4", "source": source, "options": options})
}

fn with_volume(script: &str, mount: Value) -> Bundle {
    Bundle::script(script).unwrap().mount(mount).unwrap()
}

#[test]
fn a_volume_is_a_disk_with_a_file_system_of_its_own() {
    let runtime = Runtime::new().unwrap();
    let image = image(64);
    let run = |script: &str, mount: Value| {
        let result = told(&runtime.run("c", &with_volume(script, mount)).unwrap());
        runtime.assert_clean().unwrap();
        result
    };
    // Nothing is on it, and nothing is made unasked.
    let (status, _, errors) = run("true", volume(image.path(), &[]));
    assert_eq!(status, Some(1));
    assert!(errors.contains("cannot mount the ext4 on the disk for /data"), "{errors}");
    let made = volume(image.path(), &["x-bulkhead.makefs", "noatime", "nosuid", "data=ordered"]);
    let script = "grep -o ' /data [a-z,]*' /proc/self/mountinfo; grep -o 'ext4 .*' \
        /proc/self/mountinfo | wc -l; ls /data; echo kept > /data/file; ls /dev | grep vd; \
        [ $(stat -c %d /) = $(stat -c %d /data) ] || echo another device";
    let (status, out, errors) = run(script, made.clone());
    let expected = " /data rw,nosuid,noatime\n1\nlost+found\nanother device\n";
    assert_eq!((status, out.as_str()), (Some(0), expected), "{errors}");
    // What was written is there in the next machine, without a sync(1).
    assert_eq!(run("cat /data/file", made).1, "kept\n");
    let script = "cat /data/file; echo x > /data/no || echo read-only";
    let (_, out, _) = run(script, volume(image.path(), &["ro"]));
    assert_eq!(out, "kept\nread-only\n");
}

#[test]
fn a_volume_belongs_to_one_machine() {
    let runtime = Runtime::new().unwrap();
    let image = image(32);
    let mount = || volume(image.path(), &["x-bulkhead.makefs"]);
    let first = with_volume("echo mine > /data/file; exec sleep 1000", mount());
    runtime.create("first", &first).unwrap();
    runtime.ok(&["start", "first"]).unwrap();
    for options in [&[][..], &["ro"]] {
        let second = with_volume("true", volume(image.path(), options));
        let (status, _, errors) = told(&runtime.run("second", &second).unwrap());
        assert_eq!(status, Some(1));
        assert!(errors.contains("another machine or program uses it"), "{errors}");
    }
    // Killed in the middle: the journal says what was done.
    let dirty = "dd if=/dev/zero of=/data/zeros bs=1M count=4 2> /dev/null; sync; echo done";
    assert_eq!(runtime.ok(&["exec", "first", "sh", "-c", dirty]).unwrap(), "done\n");
    runtime.ok(&["delete", "--force", "first"]).unwrap();
    let read = with_volume("cat /data/file; wc -c < /data/zeros", mount());
    let (status, out, errors) = told(&runtime.run("third", &read).unwrap());
    assert_eq!((status, out.as_str()), (Some(0), "mine\n4194304\n"), "{errors}");
    runtime.assert_clean().unwrap();
}

#[test]
fn an_annotation_makes_a_bind_mount_a_volume() {
    let runtime = Runtime::new().unwrap();
    let image = image(32);
    let bind = bulkhead_tests::bundle::bind(image.path(), "/data", &["rbind", "rprivate"]);
    // overlayfs takes it for its upper directory, as Docker inside a container asks for.
    let script = "mkdir -p /data/up /data/work /data/low /merged; \
        mount -t overlay -o lowerdir=/data/low,upperdir=/data/up,workdir=/data/work o /merged; \
        echo layered > /merged/file; cat /data/up/file";
    let bundle = with_volume(script, bind).with_capability("CAP_SYS_ADMIN").unwrap();
    let bundle = bundle
        .with(|spec| spec["annotations"] = json!({"bulkhead.disks": "/data=ext4,makefs"}))
        .unwrap();
    let (status, out, errors) = told(&runtime.run("c", &bundle).unwrap());
    assert_eq!((status, out.as_str()), (Some(0), "layered\n"), "{errors}");
    runtime.assert_clean().unwrap();
}
