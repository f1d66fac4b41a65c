//! A machine that gets more memory while it runs, and the cost of processors that it may get.

use bulkhead_vmm::config::DeviceConfig;
use bulkhead_vmm::control::Request;

use crate::devices::{ECHO, Probe, echo, wait_for};

/// The slot of the memory device, which is attached late; Linux gives its platform device the same
/// number.
const SLOT: u8 = 15;
const BIND: &str = "write /sys/bus/platform/drivers/virtio-mmio/bind virtio-mmio.15";

/// The memory of the guest's kernel, in MiB.
fn total(probe: &mut Probe) -> u64 {
    total_kb(probe) / 1024
}

fn total_kb(probe: &mut Probe) -> u64 {
    let meminfo = probe.task("show /proc/meminfo");
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn plug(probe: &mut Probe, target_mib: u32, plugged: u32) {
    probe.vm.call(Request::Plug { target_mib }, &[]).unwrap();
    wait_for("plugging", || probe.statistics().plugged_mib == Some(plugged));
}

#[test]
fn memory_is_plugged_in_steps_and_comes_back_when_it_is_free() {
    let mut probe = Probe::boot();
    // The probe answers, so the guest has already probed all slots.
    let before = total(&mut probe);
    let device = || DeviceConfig::Mem { region_mib: 1000 };
    let refused = probe.vm.call(Request::Plug { target_mib: 1 }, &[]).unwrap_err();
    assert!(format!("{refused:#}").contains("no device"), "{refused:#}");
    assert_eq!(probe.statistics().plugged_mib, None);
    probe.vm.call(Request::Attach { slot: SLOT, device: device() }, &[]).unwrap();
    assert_eq!(probe.task(BIND), "done");
    assert_eq!(probe.statistics().plugged_mib, Some(0));

    let resident = probe.resident();
    // Rounded up to the step that the guest's kernel plugs.
    plug(&mut probe, 1, 128);
    wait_for("onlining", || total(&mut probe) == before + 128);
    plug(&mut probe, 384, 384);
    wait_for("onlining", || total(&mut probe) == before + 384);
    // When the requested size is lowered, the guest gives back memory that it has not used.
    plug(&mut probe, 256, 256);
    plug(&mut probe, 384, 384);
    wait_for("onlining", || total(&mut probe) == before + 384);
    let plugged = probe.resident() - resident;
    assert!(plugged < 40_000, "384 MiB that nobody uses cost {plugged} kB");

    // More memory than it has booted with is usable, also for devices.
    assert_eq!(probe.task("use 360"), "done");
    let used = probe.resident() - resident;
    assert!(used > 300_000, "{used} kB");
    echo(probe.open(ECHO), 3 << 20);
    wait_for("giving back", || probe.resident() - resident < 80_000);
    assert!(probe.statistics().devices.iter().all(|device| !device.failed));

    let refused = probe.vm.call(Request::Plug { target_mib: 1025 }, &[]).unwrap_err();
    assert!(format!("{refused:#}").contains("room for 1024 MiB"), "{refused:#}");
    let refused = probe.vm.call(Request::Detach { slot: SLOT }, &[]).unwrap_err();
    assert!(format!("{refused:#}").contains("cannot unplug memory"), "{refused:#}");
    let second = Request::Attach { slot: SLOT - 1, device: device() };
    let refused = probe.vm.call(second, &[]).unwrap_err();
    assert!(format!("{refused:#}").contains("has a memory device"), "{refused:#}");
    plug(&mut probe, 1024, 1024);
    wait_for("onlining", || total(&mut probe) == before + 1024);
}

#[test]
fn a_processor_that_is_only_declared_costs_little() {
    let one = total_kb(&mut Probe::boot());
    let eight = total_kb(&mut Probe::boot_with(|config| config.vcpus_max = 8));
    let each = (one - eight) / 7;
    println!("{each} kB of the guest's memory for each processor that is declared");
    assert!((1..300).contains(&each), "{one} kB with one, {eight} kB with eight");
}
