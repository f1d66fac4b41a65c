//! What `cpuid` reports to a guest.

use bulkhead_vmm::config::VCPUS_MAX;

use crate::devices::Probe;

/// Leaves of the `cpuid` instruction.
const VENDOR: u32 = 0;
const FEATURES: u32 = 1;
const PMU: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const EXTENDED: u32 = 0x8000_0000;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const AMD_CORES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PMU: u32 = 0x8000_0022;

/// EAX, EBX, ECX, EDX.
fn cpuid(probe: &mut Probe, processor: u32, leaf: u32, subleaf: u32) -> [u32; 4] {
    let said = probe.task(&format!("cpuid {processor} {leaf:x} {subleaf:x}"));
    let registers: Result<Vec<u32>, _> =
        said.split(' ').map(|word| u32::from_str_radix(word, 16)).collect();
    registers.unwrap_or_else(|_| panic!("{said}")).try_into().unwrap()
}

fn topology(probe: &mut Probe, processor: u32, name: &str) -> String {
    probe.task(&format!("show /sys/devices/system/cpu/cpu{processor}/topology/{name}"))
}

#[test]
fn processors_are_cores_of_one_package() {
    const PROCESSORS: u32 = 3;
    let mut probe = Probe::boot_with(|config| {
        config.vcpus = 3;
        config.vcpus_max = 5;
    });
    for processor in 1..PROCESSORS {
        let online = format!("write /sys/devices/system/cpu/cpu{processor}/online 1");
        assert_eq!(probe.task(&online), "done");
    }
    assert_eq!(probe.task("show /sys/devices/system/cpu/online"), "0-2");
    assert_eq!(probe.task("show /sys/devices/system/cpu/possible"), "0-4");
    for processor in 0..PROCESSORS {
        let own = processor.to_string();
        for (name, expected) in [
            ("physical_package_id", "0"),
            ("die_id", "0"),
            ("core_id", own.as_str()),
            ("core_cpus_list", own.as_str()),
            ("package_cpus_list", "0-2"),
        ] {
            assert_eq!(topology(&mut probe, processor, name), expected, "{name} of {processor}");
        }
    }
}

#[test]
fn every_leaf_tells_the_same_of_a_processor() {
    let mut probe = Probe::boot_with(|config| {
        config.vcpus = 2;
        config.vcpus_max = 5;
    });
    assert_eq!(probe.task("write /sys/devices/system/cpu/cpu1/online 1"), "done");
    let extended = cpuid(&mut probe, 0, EXTENDED, 0)[0];
    let amd = cpuid(&mut probe, 0, VENDOR, 0)[1] == u32::from_le_bytes(*b"Auth");
    for id in 0..2 {
        let [_, ebx, ..] = cpuid(&mut probe, id, FEATURES, 0);
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (id, 5), "identity, and logical processors");
        // One thread for each core; five cores, whose number takes three bits; then no further
        // level.
        let levels = [[0, 1, 0x100, id], [3, 5, 0x201, id], [0, 0, 2, id]];
        for (level, expected) in (0..).zip(levels) {
            assert_eq!(cpuid(&mut probe, id, TOPOLOGY, level), expected, "level {level}");
        }
        if amd && extended >= AMD_CORES {
            assert_eq!(cpuid(&mut probe, id, AMD_CORES, 0)[2] & 0xf0ff, 0x3004);
        }
        if amd && extended >= AMD_TOPOLOGY {
            assert_eq!(cpuid(&mut probe, id, AMD_TOPOLOGY, 0), [id, id, 0, 0]);
        }
    }
}

#[test]
fn there_are_as_many_processors_as_can_be_declared() {
    let mut probe = Probe::boot_with(|config| config.vcpus_max = VCPUS_MAX);
    let possible = probe.task("show /sys/devices/system/cpu/possible");
    assert_eq!(possible, format!("0-{}", VCPUS_MAX - 1));
}

#[test]
fn no_counters_of_performance_and_no_machines_in_the_machine() {
    let mut probe = Probe::boot();
    let [.., ecx, _] = cpuid(&mut probe, 0, FEATURES, 0);
    let (pdcm, vmx, hypervisor) = (1 << 15, 1 << 5, 1 << 31);
    assert_eq!(ecx & (pdcm | vmx | hypervisor), hypervisor);
    assert_eq!(cpuid(&mut probe, 0, PMU, 0), [0; 4]);
    assert_eq!(cpuid(&mut probe, 0, AMD_PMU, 0), [0; 4]);
    let [.., ecx, _] = cpuid(&mut probe, 0, EXTENDED_FEATURES, 0);
    let (svm, ibs, counters) = (1 << 2, 1 << 10, 1 << 23 | 1 << 24 | 1 << 28);
    assert_eq!(ecx & (svm | ibs | counters), 0, "{ecx:#x}");
    // What the guest's kernel has found.
    let devices = probe.task("list /sys/bus/event_source/devices");
    assert!(devices.split(' ').all(|device| !device.starts_with("cpu")), "{devices}");
}
