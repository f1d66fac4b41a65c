//! What the guest's `cpuid` instruction returns: what KVM supports, with this machine's topology,
//! and without what the guest must not see.
//!
//! The topology is one package of cores with one thread each. The leaves that describe it are made
//! or corrected here, because KVM lists the host's topology in some of them and nothing in others.
//! Removed are features that would show the host to the guest or whose state is costly to save
//! (performance counters, tracing), features for which this monitor sets nothing up (enclaves,
//! memory encryption), and nested virtualization, which no container needs and every guest could
//! attack. Leaf numbers are those of the Intel SDM volume 2A and the AMD APM volume 3.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmm_sys_util::fam;

const VENDOR: u32 = 0x0;
const FEATURES: u32 = 0x1;
const INTEL_CACHES: u32 = 0x4;
const MORE_FEATURES: u32 = 0x7;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_CORES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaves that read as zeroes in the guest.
const HIDDEN: [u32; 14] = [
    0xa,         // performance counters
    0xf,         // monitoring of caches and memory
    0x10,        // allocation of caches and memory
    0x12,        // enclaves
    0x14,        // processor trace
    0x1c,        // last branch records
    0x23,        // performance counters
    0x8000_000a, // nested virtualization (SVM)
    0x8000_001b, // instruction-based sampling
    0x8000_001c, // lightweight profiling
    0x8000_001f, // memory encryption
    0x8000_0020, // monitoring and allocation of caches and memory
    0x8000_0022, // performance counters
    0x8000_0026, // topology again, which no guest needs beside the other leaves
];

/// Feature bits that the guest does not see, in a leaf's EAX, EBX, ECX and EDX.
const HIDDEN_FEATURES: [((u32, u32), [u32; 4]); 4] = [
    // DTES64, DS-CPL, VMX, SMX, PDCM; DS: debug store and performance counters, virtualization.
    ((FEATURES, 0), [0, 0, 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 15, 1 << 21]),
    // SGX, PQM, PQE, Intel PT; SGX_LC; architectural LBR.
    ((MORE_FEATURES, 0), [0, 1 << 2 | 1 << 12 | 1 << 15 | 1 << 25, 1 << 30, 1 << 19]),
    // ArchPerfmonExt.
    ((MORE_FEATURES, 1), [1 << 8, 0, 0, 0]),
    // SVM, IBS, SKINIT, LWP, NodeId, and the performance counters of core, northbridge, time stamp
    // and last-level cache.
    (
        (AMD_FEATURES, 0),
        [0, 0, 1 << 2 | 1 << 10 | 1 << 12 | 1 << 15 | 1 << 19 | 0b11 << 23 | 0b11 << 27, 0],
    ),
];

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MULTI_THREADED: u32 = 1 << 28;
/// `CmpLegacy`: the logical processors of the package are cores, not threads.
const ECX_CORES: u32 = 1 << 1;
/// Cache lines of 64 bytes, in units of 8, at bit 8.
const EBX_CLFLUSH: u32 = 8 << 8;
/// The field of a cache's type; type 0 follows the last cache.
const CACHE_TYPE: u32 = 0x1f;
/// Number of threads that share a cache, minus one; on Intel also of cores in the package.
const SHARING: u32 = 0xfff << 14;
const CORES: u32 = 0x3f << 26;
/// Level types of the topology leaves.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// One processor of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Its number, which is also its APIC ID.
    pub(crate) index: u8,
    /// The most processors that the machine can have.
    pub(crate) of: u8,
}

impl Place {
    fn id(self) -> u32 {
        self.index.into()
    }

    fn cores(self) -> u32 {
        self.of.into()
    }

    /// How many bits of an APIC ID number the cores.
    fn core_bits(self) -> u32 {
        self.cores().next_power_of_two().trailing_zeros()
    }
}

/// Adapts the entries that KVM supports to one processor.
///
/// # Errors
/// When KVM lists so many entries that those of the topology do not fit.
pub(crate) fn for_vcpu(supported: &CpuId, place: Place) -> Result<CpuId, fam::Error> {
    let supported = supported.as_slice();
    let amd = is_amd(supported);
    let made_here = [TOPOLOGY, TOPOLOGY_V2];
    let mut entries: Vec<_> =
        supported.iter().filter(|entry| !made_here.contains(&entry.function)).copied().collect();
    for entry in &mut entries {
        hide(entry);
        place_in_package(entry, place, amd);
    }
    let last = supported.iter().find(|entry| entry.function == VENDOR).map_or(0, |entry| entry.eax);
    for leaf in made_here.into_iter().filter(|leaf| *leaf <= last) {
        entries.extend(levels(leaf, place));
    }
    CpuId::from_entries(&entries)
}

/// Whether the leaves are those of AMD's processors; Hygon's have the same ones.
fn is_amd(supported: &[kvm_cpuid_entry2]) -> bool {
    let name = |entry: &kvm_cpuid_entry2| [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
    let vendor = supported.iter().find(|entry| entry.function == VENDOR).map(name);
    vendor.is_some_and(|name| matches!(&name.concat()[..], b"AuthenticAMD" | b"HygonGenuine"))
}

/// Clears what the guest must not see.
fn hide(entry: &mut kvm_cpuid_entry2) {
    if HIDDEN.contains(&entry.function) {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
    }
    let leaf = (entry.function, entry.index);
    for (_, [eax, ebx, ecx, edx]) in HIDDEN_FEATURES.iter().filter(|(of, _)| *of == leaf) {
        entry.eax &= !eax;
        entry.ebx &= !ebx;
        entry.ecx &= !ecx;
        entry.edx &= !edx;
    }
}

/// Sets the number of the core, how many there are, and which caches it shares.
fn place_in_package(entry: &mut kvm_cpuid_entry2, place: Place, amd: bool) {
    let (id, cores) = (place.id(), place.cores());
    match entry.function {
        FEATURES => {
            entry.ebx &= 0xff;
            entry.ebx |= EBX_CLFLUSH | cores << 16 | id << 24;
            // KVM does not list the TSC deadline timer (KVM_CAP_TSC_DEADLINE_TIMER), but the
            // in-kernel APIC has it.
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            set(&mut entry.edx, EDX_MULTI_THREADED, cores > 1);
        }
        INTEL_CACHES | AMD_CACHES if entry.eax & CACHE_TYPE != 0 => {
            // All cores share the last-level cache; each core has the other levels for itself.
            let level = entry.eax >> 5 & 7;
            entry.eax &= !SHARING;
            if level == 3 {
                entry.eax |= (cores - 1) << 14;
            }
            if entry.function == INTEL_CACHES {
                entry.eax = entry.eax & !CORES | (cores - 1) << 26;
            }
        }
        AMD_FEATURES if amd => set(&mut entry.ecx, ECX_CORES, cores > 1),
        AMD_CORES => {
            entry.ecx = if amd { place.core_bits() << 12 | (cores - 1) } else { 0 };
        }
        AMD_TOPOLOGY => {
            (entry.eax, entry.ebx, entry.ecx) = if amd { (id, id, 0) } else { (0, 0, 0) };
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !bit | if on { bit } else { 0 };
}

/// The entries of a topology leaf: threads, cores, and the one that ends the list.
fn levels(leaf: u32, place: Place) -> [kvm_cpuid_entry2; 3] {
    let kinds = [(0, 1, LEVEL_THREAD), (place.core_bits(), place.cores(), LEVEL_CORE), (0, 0, 0)];
    let mut index = 0..;
    kinds.map(|(shift, logical_processors, kind)| {
        let index = index.next().unwrap_or(0);
        kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: logical_processors,
            ecx: kind << 8 | index,
            edx: place.id(),
            ..Default::default()
        }
    })
}

#[cfg(test)]
mod tests;
