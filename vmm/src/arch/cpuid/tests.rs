//! The CPUID of guests on hosts of every kind.

use super::*;

const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";
const CENTAUR: &[u8; 12] = b"CentaurHauls";

/// The vendor leaf of a processor whose highest leaf is `last`.
fn vendor(name: &[u8; 12], last: u32) -> kvm_cpuid_entry2 {
    let part = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    kvm_cpuid_entry2 {
        function: VENDOR,
        eax: last,
        ebx: part(0),
        edx: part(4),
        ecx: part(8),
        ..Default::default()
    }
}

/// A leaf in which every bit is set, of a host that has and shows everything.
fn full(function: u32, index: u32) -> kvm_cpuid_entry2 {
    let all = u32::MAX;
    kvm_cpuid_entry2 {
        function,
        index,
        eax: all,
        ebx: all,
        ecx: all,
        edx: all,
        ..Default::default()
    }
}

/// The CPUID of one processor if KVM supports `entries`.
fn told(entries: &[kvm_cpuid_entry2], index: u8, of: u8) -> Vec<kvm_cpuid_entry2> {
    let supported = CpuId::from_entries(entries).unwrap();
    for_vcpu(&supported, Place { index, of }).unwrap().as_slice().to_vec()
}

/// The registers of one leaf of that CPUID.
fn leaf(name: &[u8; 12], entry: kvm_cpuid_entry2, index: u8, of: u8) -> [u32; 4] {
    let told = told(&[vendor(name, 0x1f), entry], index, of);
    let found = told.iter().find(|it| (it.function, it.index) == (entry.function, entry.index));
    found.map(|it| [it.eax, it.ebx, it.ecx, it.edx]).unwrap()
}

#[test]
fn each_processor_has_an_identity_and_a_hypervisor() {
    for name in [INTEL, AMD, CENTAUR] {
        let empty = kvm_cpuid_entry2 { function: FEATURES, ..Default::default() };
        let [_, ebx, ecx, edx] = leaf(name, empty, 3, 4);
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (3, 4));
        assert_eq!(ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        assert_eq!(edx, EDX_MULTI_THREADED);
        assert_eq!(leaf(name, full(FEATURES, 0), 0, 1)[3] & EDX_MULTI_THREADED, 0);
    }
}

/// The levels of a topology leaf in the CPUID of one processor.
fn told_levels(entries: &[kvm_cpuid_entry2], function: u32, index: u8, of: u8) -> Vec<[u32; 4]> {
    let told = told(entries, index, of);
    let levels: Vec<_> = told.iter().filter(|entry| entry.function == function).collect();
    for (number, entry) in (0..).zip(&levels) {
        assert_eq!((entry.index, entry.flags), (number, KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
    }
    levels.iter().map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]).collect()
}

#[test]
fn the_topology_is_whole_whatever_part_of_it_kvm_lists() {
    let listed = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
    for (of, bits) in [(1, 0), (2, 1), (3, 2), (5, 3), (64, 6)] {
        for function in [TOPOLOGY, TOPOLOGY_V2] {
            // KVM lists no level, the first one (since Linux 6.2), or those of the host (before).
            for entries in [
                vec![],
                vec![listed(function, 0)],
                vec![full(function, 0), full(function, 1), full(function, 2), full(function, 3)],
            ] {
                let entries = [vec![vendor(INTEL, 0x1f)], entries].concat();
                let id = of - 1;
                let expected = [
                    [0, 1, LEVEL_THREAD << 8, id.into()],
                    [bits, of.into(), LEVEL_CORE << 8 | 1, id.into()],
                    [0, 0, 2, id.into()],
                ];
                assert_eq!(told_levels(&entries, function, id, of), expected);
            }
        }
    }
}

#[test]
fn a_leaf_beyond_the_last_one_is_not_made_up() {
    for (last, leaves) in [(0xa, 0), (0xb, 3), (0x1e, 3), (0x1f, 6)] {
        let told = told(&[vendor(AMD, last)], 0, 2);
        let topology = |it: &&kvm_cpuid_entry2| matches!(it.function, TOPOLOGY | TOPOLOGY_V2);
        assert_eq!(told.iter().filter(topology).count(), leaves, "{last:#x}");
        assert_eq!(told[0].eax, last);
    }
}

#[test]
fn amd_counts_cores_in_leaves_of_its_own() {
    let hygon = b"HygonGenuine";
    for (of, bits) in [(1, 0), (2, 1), (5, 3), (64, 6)] {
        for name in [AMD, hygon] {
            let id = u32::from(of) - 1;
            assert_eq!(leaf(name, full(AMD_CORES, 0), 0, of)[2], bits << 12 | id);
            let [eax, ebx, ecx, _] = leaf(name, full(AMD_TOPOLOGY, 0), of - 1, of);
            assert_eq!([eax, ebx, ecx], [id, id, 0]);
            let cores = leaf(name, full(AMD_FEATURES, 0), 0, of)[2] & ECX_CORES != 0;
            assert_eq!(cores, of > 1);
        }
    }
    // On Intel's processors these registers are reserved.
    assert_eq!(leaf(INTEL, full(AMD_CORES, 0), 1, 4)[2], 0);
    assert_eq!(leaf(INTEL, full(AMD_TOPOLOGY, 0), 1, 4)[..3], [0; 3]);
}

#[test]
fn caches_are_shared_by_the_cores_of_this_machine_not_of_the_host() {
    for (name, function) in [(INTEL, INTEL_CACHES), (AMD, AMD_CACHES)] {
        for (level, sharing) in [(1, 0), (2, 0), (3, 4)] {
            let entry = kvm_cpuid_entry2 {
                function,
                index: level,
                eax: 1 | level << 5 | SHARING | CORES,
                ebx: 0x1c0_003f,
                ..Default::default()
            };
            let [eax, ebx, ..] = leaf(name, entry, 0, 5);
            assert_eq!(eax >> 14 & 0xfff, sharing, "level {level}");
            assert_eq!((eax & 0x3fff, ebx), (1 | level << 5, 0x1c0_003f));
            let cores = if function == INTEL_CACHES { 4 } else { 0x3f };
            assert_eq!(eax >> 26, cores);
        }
        // The entry behind the last cache.
        let none = kvm_cpuid_entry2 { function, index: 4, ..Default::default() };
        assert_eq!(leaf(name, none, 0, 5), [0; 4]);
    }
}

#[test]
fn what_the_guest_shall_not_have_is_hidden() {
    for name in [INTEL, AMD] {
        for function in [
            0xa,
            0xf,
            0x10,
            0x12,
            0x14,
            0x1c,
            0x23,
            0x8000_000a,
            0x8000_001b,
            0x8000_001c,
            0x8000_001f,
            0x8000_0020,
            0x8000_0022,
            0x8000_0026,
        ] {
            for index in [0, 1, 2] {
                assert_eq!(leaf(name, full(function, index), 0, 2), [0; 4], "{function:#x}");
            }
        }
    }
    // Name, leaf and index, register, bit.
    let features = [
        ("DTES64", FEATURES, 0, 2, 2),
        ("DS-CPL", FEATURES, 0, 2, 4),
        ("VMX", FEATURES, 0, 2, 5),
        ("SMX", FEATURES, 0, 2, 6),
        ("PDCM", FEATURES, 0, 2, 15),
        ("DS", FEATURES, 0, 3, 21),
        ("SGX", 7, 0, 1, 2),
        ("PQM", 7, 0, 1, 12),
        ("PQE", 7, 0, 1, 15),
        ("Intel PT", 7, 0, 1, 25),
        ("SGX_LC", 7, 0, 2, 30),
        ("Arch LBR", 7, 0, 3, 19),
        ("ArchPerfmonExt", 7, 1, 0, 8),
        ("SVM", AMD_FEATURES, 0, 2, 2),
        ("IBS", AMD_FEATURES, 0, 2, 10),
        ("SKINIT", AMD_FEATURES, 0, 2, 12),
        ("LWP", AMD_FEATURES, 0, 2, 15),
        ("NodeId", AMD_FEATURES, 0, 2, 19),
        ("PerfCtrExtCore", AMD_FEATURES, 0, 2, 23),
        ("PerfCtrExtNB", AMD_FEATURES, 0, 2, 24),
        ("PerfTsc", AMD_FEATURES, 0, 2, 27),
        ("PerfCtrExtLLC", AMD_FEATURES, 0, 2, 28),
    ];
    for (feature, function, index, register, bit) in features {
        let said = leaf(AMD, full(function, index), 0, 2)[register];
        assert_eq!(said & 1 << bit, 0, "{feature}");
    }
    // Nothing else is cleared: the number of missing bits is the same.
    for (function, index, register) in
        [(7, 0, 1), (7, 0, 2), (7, 0, 3), (7, 1, 0), (AMD_FEATURES, 0, 2)]
    {
        let hidden = features.iter().filter(|it| (it.1, it.2, it.3) == (function, index, register));
        let said = leaf(AMD, full(function, index), 0, 2)[register];
        assert_eq!(said.count_zeros() as usize, hidden.count(), "{function:#x} {register}");
    }
    assert_eq!(leaf(AMD, full(7, 2), 0, 2), [u32::MAX; 4]);
}

#[test]
fn what_kvm_supports_beside_stays_as_it_is() {
    let other =
        [full(0x6, 0), full(0xd, 0), full(0xd, 1), full(0x4000_0001, 0), full(0x8000_0021, 0)];
    for entry in other {
        assert_eq!(leaf(INTEL, entry, 1, 2), [u32::MAX; 4], "{:#x}", entry.function);
    }
}
