//! What the guest's `cpuid` instruction says: what KVM supports, with this machine's topology.
//!
//! Topology is one package of one-thread cores. Leaf numbers are those of the Intel SDM volume 2A
//! and the AMD APM volume 3.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const FEATURES: u32 = 0x1;
const INTEL_CACHES: u32 = 0x4;
const PMU: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_CORES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MULTI_THREADED: u32 = 1 << 28;
/// Cache lines of 64 bytes, in units of 8, at bit 8.
const EBX_CLFLUSH: u32 = 8 << 8;
/// The topology leaves' level types.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Adapts what KVM supports to one processor of a machine with `vcpus` of them.
pub(crate) fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adapt(entry, u32::from(index), u32::from(vcpus));
    }
    cpuid
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u32, vcpus: u32) {
    match entry.function {
        FEATURES => {
            entry.ebx &= 0xff;
            entry.ebx |= EBX_CLFLUSH | vcpus << 16 | index << 24;
            // KVM_CAP_TSC_DEADLINE_TIMER is not in the supported set but in the in-kernel APIC.
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            if vcpus > 1 {
                entry.edx |= EDX_MULTI_THREADED;
            }
        }
        INTEL_CACHES => {
            // Cores per package, and threads that share this cache.
            entry.eax &= 0x3fff;
            let (cores, level) = (vcpus - 1, entry.eax >> 5 & 7);
            entry.eax |= cores << 26;
            if level == 3 {
                entry.eax |= cores << 14;
            }
        }
        // Performance counters would show the host's microarchitecture and cost state to save.
        PMU => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        TOPOLOGY | TOPOLOGY_V2 => {
            let (shift, threads, kind) = match entry.index {
                0 => (0, 1, LEVEL_THREAD),
                1 => (vcpus.next_power_of_two().trailing_zeros(), vcpus, LEVEL_CORE),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = threads;
            entry.ecx = kind << 8 | entry.index & 0xff;
            entry.edx = index;
        }
        AMD_CORES => {
            entry.ecx = vcpus.next_power_of_two().trailing_zeros() << 12 | (vcpus - 1);
        }
        AMD_TOPOLOGY => {
            entry.eax = index;
            entry.ebx = index;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, sub: u32, index: u8, vcpus: u8) -> kvm_cpuid_entry2 {
        let entry = kvm_cpuid_entry2 { function, index: sub, ..Default::default() };
        let supported = CpuId::from_entries(&[entry]).unwrap();
        for_vcpu(&supported, index, vcpus).as_slice()[0]
    }

    #[test]
    fn each_vcpu_sees_its_own_apic_id_and_the_hypervisor() {
        let entry = adapted(FEATURES, 0, 3, 4);
        assert_eq!(entry.ebx >> 24, 3);
        assert_eq!(entry.ebx >> 16 & 0xff, 4);
        assert_ne!(entry.ecx & ECX_HYPERVISOR, 0);
        assert_eq!(adapted(TOPOLOGY, 1, 3, 4).edx, 3);
    }

    #[test]
    fn performance_counters_are_hidden() {
        let entry = adapted(PMU, 0, 0, 1);
        assert_eq!((entry.eax, entry.ebx, entry.ecx, entry.edx), (0, 0, 0, 0));
    }
}
