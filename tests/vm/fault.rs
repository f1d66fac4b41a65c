//! An agent that faults leaves enough on the guest's console to tell why.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_tests::vm::{Options, TestVm, dist};
use bulkhead_vmm::control::Ending;

/// The agent's initramfs with the program that makes it fault beside it, at `/fault`.
fn initramfs(directory: &Path) -> PathBuf {
    let program = directory.join("fault");
    fs::copy(env!("CARGO_BIN_EXE_fault"), &program).unwrap();
    let stripped = Command::new("strip").arg(&program).status().unwrap();
    assert!(stripped.success());
    let list = directory.join("list");
    fs::write(&list, "fault\n").unwrap();
    let archive = directory.join("archive");
    let mut cpio = Command::new("/bin/busybox");
    cpio.args(["cpio", "-o", "-H", "newc"]).current_dir(directory);
    cpio.stdin(File::open(&list).unwrap()).stdout(File::create(&archive).unwrap());
    assert!(cpio.stderr(Stdio::null()).status().unwrap().success());
    // The kernel unpacks one archive after the other.
    let mut both = fs::read(dist().join("share/bulkhead/initramfs.cpio")).unwrap();
    both.resize(both.len().next_multiple_of(4), 0);
    both.extend(fs::read(&archive).unwrap());
    let path = directory.join("initramfs.cpio");
    fs::write(&path, both).unwrap();
    path
}

#[test]
fn a_fault_of_the_agent_is_on_the_console_with_registers_code_and_maps() {
    let directory = tempfile::tempdir().unwrap();
    let vm = TestVm::boot(&Options {
        cmdline: "rdinit=/fault".to_owned(),
        initramfs: Some(initramfs(directory.path())),
        ..Options::default()
    });
    let vm = vm.unwrap();
    let event = vm.ending().unwrap();
    let console = vm.console_text();
    assert_eq!(event.ended, Ending::Panic, "{console}");
    for words in [
        "bulkhead-agent: init [1] faults: SIGSEGV (code 1) at 0xbad0",
        "bulkhead-agent: rip 0xbad0 rsp 0x",
        "r12 0x123456789abcdef ",
        "bulkhead-agent: code at 0xbab0: cannot be read, error 5",
        "bulkhead-agent: stack at 0x",
        " r-xp ",
        "/init\n",
        "[stack]",
        "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
    ] {
        assert!(console.contains(words), "{words:?}: {console}");
    }
    // What becomes part of the supervisor's error has it too.
    let tail = event.console_tail.join("\n");
    assert!(tail.contains("faults: SIGSEGV") && tail.contains("rip 0xbad0"), "{tail}");
}
