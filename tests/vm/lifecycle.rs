//! A machine comes up, obeys the control socket, and ends as it should.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_protocol::AGENT_PORT;
use bulkhead_tests::vm::{Options, TestVm};
use bulkhead_vmm::config::{DeviceConfig, Fd};
use bulkhead_vmm::control::{Ending, Reply, Request};

const BOOT: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_guest_boots_to_an_agent_that_accepts_a_stream() {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    vm.open_stream(AGENT_PORT, BOOT).unwrap();
    let (reply, _) = vm.call(Request::Statistics, &[]).unwrap();
    let Reply::Statistics(statistics) = reply else { panic!("{reply:?}") };
    assert!(statistics.vcpu_exits > 0);
    assert_eq!(statistics.devices.len(), 2);
    assert!(statistics.devices.iter().all(|device| !device.failed), "{statistics:?}");
}

#[test]
fn a_stream_to_a_port_where_nobody_listens_is_refused_in_time() {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    vm.open_stream(AGENT_PORT, BOOT).unwrap();
    let started = Instant::now();
    let error = vm.open_stream(9, Duration::from_millis(500)).unwrap_err();
    assert!(format!("{error:#}").contains("port 9"), "{error:#}");
    assert!(started.elapsed() < SOON, "took {:?}", started.elapsed());
}

#[test]
fn a_paused_guest_does_not_answer_and_a_resumed_one_does() {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    vm.open_stream(AGENT_PORT, BOOT).unwrap();
    for _ in 0..2 {
        assert_eq!(vm.call(Request::Pause, &[]).unwrap().0, Reply::Done);
    }
    vm.open_stream(AGENT_PORT, Duration::from_millis(300)).unwrap_err();
    assert_eq!(vm.call(Request::Resume, &[]).unwrap().0, Reply::Done);
    vm.open_stream(AGENT_PORT, BOOT).unwrap();
}

#[test]
fn a_panic_of_the_guest_is_reported_with_the_last_lines_of_its_console() {
    let options = Options { cmdline: "rdinit=/nowhere".into(), ..Options::default() };
    let vm = TestVm::boot(&options).unwrap();
    let event = vm.ending().unwrap();
    assert_eq!(event.ended, Ending::Panic);
    let tail = event.console_tail.join("\n");
    assert!(tail.contains("Kernel panic - not syncing"), "{tail}");
}

#[test]
fn stop_ends_the_monitor() {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    assert_eq!(vm.call(Request::Stop, &[]).unwrap().0, Reply::Done);
    assert!(vm.wait(SOON).unwrap().success());
}

#[test]
fn the_monitor_ends_when_its_supervisor_is_gone() {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    vm.hang_up();
    vm.wait(SOON).unwrap();
}

#[test]
fn a_monitor_that_is_never_configured_ends_with_its_supervisor() {
    let mut vm = TestVm::spawn().unwrap();
    vm.hang_up();
    assert!(!vm.wait(SOON).unwrap().success());
}

#[test]
fn a_configuration_that_cannot_be_used_is_refused_by_field() {
    let options = Options { spoil: Some(|config| config.vcpus = 0), ..Options::default() };
    let error = format!("{:#}", TestVm::boot(&options).unwrap_err());
    assert!(error.contains("field vcpus"), "{error}");
    let options = Options { spoil: Some(|config| config.kernel = Fd(0)), ..Options::default() };
    let error = format!("{:#}", TestVm::boot(&options).unwrap_err());
    assert!(error.contains("kernel"), "{error}");
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[0; 4096]).unwrap();
    let options = Options { kernel: Some(file.path().into()), ..Options::default() };
    let error = format!("{:#}", TestVm::boot(&options).unwrap_err());
    assert!(error.contains("cannot load the kernel"), "{error}");
}

#[test]
fn a_device_is_attached_to_a_placeholder_and_detached_again() {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let attach = |slot| Request::Attach {
        slot,
        device: DeviceConfig::Blk { disk: Fd(0), read_only: false, serial: "late".into() },
    };
    assert_eq!(vm.call(attach(9), &[disk.as_fd()]).unwrap().0, Reply::Done);
    let taken = vm.call(attach(9), &[disk.as_fd()]).unwrap_err();
    assert!(format!("{taken:#}").contains("slot"), "{taken:#}");
    assert_eq!(vm.call(Request::Detach { slot: 9 }, &[]).unwrap().0, Reply::Done);
    vm.call(Request::Detach { slot: 9 }, &[]).unwrap_err();
    assert_eq!(vm.call(attach(9), &[disk.as_fd()]).unwrap().0, Reply::Done);
}

#[test]
fn an_attach_that_fails_changes_nothing() {
    const FREE: u8 = 9;
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    vm.open_stream(AGENT_PORT, BOOT).unwrap();
    let refused = |vm: &mut TestVm, slot, device, expected: &str| {
        let error = vm.call(Request::Attach { slot, device }, &[]).unwrap_err();
        let words = format!("{error:#}");
        assert!(words.contains(expected), "{words}");
    };
    // A slot that holds a device already, and one that does not exist.
    for slot in [0, 17] {
        let reason = if slot == 0 { "holds a device" } else { "no such slot" };
        refused(&mut vm, slot, DeviceConfig::Vsock { guest_cid: 4 }, reason);
        refused(&mut vm, slot, DeviceConfig::Balloon, reason);
        refused(&mut vm, slot, DeviceConfig::Mem { region_mib: 128 }, reason);
    }
    // A machine has only one vsock device.
    refused(&mut vm, FREE, DeviceConfig::Vsock { guest_cid: 4 }, "has a vsock device");
    vm.open_stream(AGENT_PORT, BOOT).unwrap();
    let (reply, _) = vm.call(Request::Statistics, &[]).unwrap();
    let Reply::Statistics(statistics) = reply else { panic!("{reply:?}") };
    assert_eq!(statistics.devices.iter().map(|it| it.slot).collect::<Vec<_>>(), [0, 1]);
    assert_eq!((statistics.balloon_mib, statistics.plugged_mib), (None, None));
    vm.call(Request::Plug { target_mib: 128 }, &[]).unwrap_err();
    vm.call(Request::Balloon { target_mib: 1 }, &[]).unwrap_err();
    // A slot in which a device could not be made can be used again.
    let disk = |fd| DeviceConfig::Blk { disk: Fd(fd), read_only: false, serial: "late".into() };
    let directory = std::fs::File::open("/").unwrap();
    let attach = Request::Attach { slot: FREE, device: disk(0) };
    vm.call(attach.clone(), &[directory.as_fd()]).unwrap_err();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    vm.call(attach, &[file.as_fd()]).unwrap();
    for (slot, device) in
        [(FREE + 1, DeviceConfig::Balloon), (FREE + 2, DeviceConfig::Mem { region_mib: 128 })]
    {
        vm.call(Request::Attach { slot, device }, &[]).unwrap();
    }
    refused(&mut vm, FREE + 3, DeviceConfig::Balloon, "has a balloon");
    refused(&mut vm, FREE + 3, DeviceConfig::Mem { region_mib: 1 }, "has a memory device");
}

#[test]
fn what_a_detached_device_did_is_refused() {
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    vm.call(Request::Attach { slot: 9, device: DeviceConfig::Balloon }, &[]).unwrap();
    vm.call(Request::Balloon { target_mib: 0 }, &[]).unwrap();
    vm.call(Request::Detach { slot: 9 }, &[]).unwrap();
    let error = format!("{:#}", vm.call(Request::Balloon { target_mib: 0 }, &[]).unwrap_err());
    assert!(error.contains("no balloon"), "{error}");
    vm.call(Request::Attach { slot: 10, device: DeviceConfig::Balloon }, &[]).unwrap();
    vm.call(Request::Balloon { target_mib: 0 }, &[]).unwrap();
    vm.call(Request::Detach { slot: 0 }, &[]).unwrap();
    let error = format!("{:#}", vm.open_stream(AGENT_PORT, BOOT).unwrap_err());
    assert!(error.contains("no vsock device"), "{error}");
}
