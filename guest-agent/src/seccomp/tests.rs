//! What compiled profiles answer to system calls, by an interpreter in this file. In
//! `tests/oci/seccomp.rs` the kernel answers.

use serde_json::{Value, json};

use super::*;

const ALLOW: u32 = 0x7fff_0000;
const KILL_THREAD: u32 = 0;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;
const CLONE: u32 = 56;
const GETPGRP: u32 = 111;

fn profile(json: Value) -> LinuxSeccomp {
    serde_json::from_value(json).unwrap()
}

fn compiled(json: Value) -> Filter {
    Filter::compile(&profile(json)).unwrap()
}

/// What a filter answers to a call: bpf(4), as far as seccomp(2) takes it.
fn answer(filter: &Filter, audit: u32, number: u32, arguments: &[u64]) -> u32 {
    let mut data = [0; 64];
    data[0..4].copy_from_slice(&number.to_ne_bytes());
    data[4..8].copy_from_slice(&audit.to_ne_bytes());
    for (place, argument) in data[16..].chunks_mut(8).zip(arguments) {
        place.copy_from_slice(&argument.to_ne_bytes());
    }
    let word = |offset: u32| {
        let offset = offset as usize;
        u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap())
    };
    let (mut accumulator, mut at) = (0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = filter.program[at];
        at += 1;
        let branch = |holds: bool| usize::from(if holds { jt } else { jf });
        match code {
            0x20 => accumulator = word(k),
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            0x45 => at += branch(accumulator & k != 0),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn rule(names: &[&str], action: &str, arguments: Value) -> Value {
    json!({"names": names, "action": action, "args": arguments})
}

#[test]
fn a_masked_comparison_has_the_mask_first() {
    let namespaces = 0x7e02_0000_u64;
    let argument = json!([
        {"index": 0, "value": namespaces, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"},
    ]);
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [rule(&["clone", "pwritev2"], "SCMP_ACT_ALLOW", argument)],
    }));
    let answers = |flags: u64| answer(&filter, AUDIT_X86_64, CLONE, &[flags]);
    assert_eq!(answers(0x11), ALLOW);
    assert_eq!(answers(0x11 | 0x1000_0000), EPERM);
    assert_eq!(answers(namespaces), EPERM);
    assert_eq!(answers(0x7e02_0000_0000_0000), ALLOW);
}

#[test]
fn what_is_newer_than_a_profile_is_not_there() {
    let rules = json!([rule(&["getpgrp"], "SCMP_ACT_ALLOW", json!([]))]);
    let answers = |action: &str, number| {
        let filter = compiled(json!({"defaultAction": action, "syscalls": rules}));
        answer(&filter, AUDIT_X86_64, number, &[])
    };
    assert_eq!(answers("SCMP_ACT_ERRNO", GETPGRP), ALLOW);
    assert_eq!(answers("SCMP_ACT_ERRNO", GETPGRP - 1), EPERM);
    assert_eq!(answers("SCMP_ACT_ERRNO", GETPGRP + 1), ENOSYS);
    assert_eq!(answers("SCMP_ACT_KILL", GETPGRP - 1), KILL_THREAD);
    assert_eq!(answers("SCMP_ACT_KILL", GETPGRP + 1), ENOSYS);
    // ptrace(2) uses this number to skip a call; it is not that of a new one.
    assert_eq!(answers("SCMP_ACT_ERRNO", u32::MAX), EPERM);
    for permissive in ["SCMP_ACT_LOG", "SCMP_ACT_TRACE"] {
        assert_ne!(answers(permissive, GETPGRP + 1), ENOSYS, "{permissive}");
    }
}

#[test]
fn a_profile_without_rules_has_no_newest_call() {
    let filter = compiled(json!({"defaultAction": "SCMP_ACT_ERRNO"}));
    assert_eq!(answer(&filter, AUDIT_X86_64, 9999, &[]), EPERM);
}

#[test]
fn each_abi_has_its_own_newest_call() {
    let names = ["read", "getpgrp"];
    let filter = |architectures: Value| {
        compiled(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": architectures,
            "syscalls": [rule(&names, "SCMP_ACT_ALLOW", json!([]))],
        }))
    };
    let all = filter(json!(["SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_X32"]));
    // getpgrp has number 65 there.
    assert_eq!(answer(&all, AUDIT_I386, 65, &[]), ALLOW);
    assert_eq!(answer(&all, AUDIT_I386, 66, &[]), ENOSYS);
    assert_eq!(answer(&all, AUDIT_X86_64, GETPGRP + 1, &[]), ENOSYS);
    assert_eq!(answer(&all, AUDIT_X86_64, X32_BIT | GETPGRP, &[]), ALLOW);
    assert_eq!(answer(&all, AUDIT_X86_64, X32_BIT | (GETPGRP + 1), &[]), ENOSYS);
    // Calls of an ABI that is not listed kill.
    let own = filter(json!([]));
    assert_eq!(answer(&own, AUDIT_X86_64, GETPGRP + 1, &[]), ENOSYS);
    assert_eq!(answer(&own, AUDIT_X86_64, X32_BIT | GETPGRP, &[]), KILL_THREAD);
    assert_eq!(answer(&own, AUDIT_X86_64, X32_BIT | 9999, &[]), KILL_THREAD);
    assert_eq!(answer(&own, AUDIT_I386, 9999, &[]), KILL_THREAD);
}

#[test]
fn comparisons_of_one_argument_are_alternatives_and_of_several_all_hold() {
    let compare =
        |index: usize, value: u64| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
    let filter = |arguments: Value| {
        compiled(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [rule(&["getpgrp"], "SCMP_ACT_ERRNO", arguments)],
        }))
    };
    let alternatives = filter(json!([compare(0, 1), compare(0, 2)]));
    let answers = |first, second| answer(&alternatives, AUDIT_X86_64, GETPGRP, &[first, second]);
    assert_eq!([answers(1, 0), answers(2, 0), answers(3, 0)], [EPERM, EPERM, ALLOW]);
    let together = filter(json!([compare(0, 1), compare(1, 2)]));
    let answers = |first, second| answer(&together, AUDIT_X86_64, GETPGRP, &[first, second]);
    assert_eq!([answers(1, 2), answers(1, 1), answers(2, 2)], [EPERM, ALLOW, ALLOW]);
}

#[test]
fn what_is_not_known_is_left_out_and_what_is_not_supported_refused() {
    let rules = json!([
        rule(&["no_such_call", "getpgrp"], "SCMP_ACT_ERRNO", json!([])),
        rule(&["sync"], "SCMP_ACT_ALLOW", json!([])),
    ]);
    let filter = compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}));
    assert_eq!(answer(&filter, AUDIT_X86_64, GETPGRP, &[]), EPERM);
    let refused = |json: Value| Filter::compile(&profile(json)).unwrap_err().to_string();
    let rules = json!([rule(&["sync"], "SCMP_ACT_NOTIFY", json!([]))]);
    let error = refused(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}));
    assert_eq!(error, "linux.seccomp: SCMP_ACT_NOTIFY is not supported");
    let flags = ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"];
    let error = refused(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": flags}));
    assert_eq!(error, "linux.seccomp: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is not supported");
}

#[test]
fn flags_are_the_kernels() {
    let flags = ["LOG", "SPEC_ALLOW", "TSYNC"].map(|flag| format!("SECCOMP_FILTER_FLAG_{flag}"));
    assert_eq!(compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": flags})).flags, 6);
    assert_eq!(compiled(json!({"defaultAction": "SCMP_ACT_ALLOW"})).flags, 0);
}
