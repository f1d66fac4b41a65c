//! Seccomp filters: makes system calls for every action, operator, architecture and flag of a
//! profile. The same bundle runs under runc and under Bulkhead, and the results are compared call
//! by call.

use std::collections::BTreeSet;
use std::fs;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::{Value, json};

/// The program that makes system calls (`tests/syscalls`).
const PROGRAM: &str = env!("CARGO_BIN_EXE_syscalls");
/// Podman's profile; Docker's is made from the same list of names.
const PROFILE: &str = "/usr/share/containers/seccomp.json";
/// The error number that rules of these tests return, so that it cannot come from the kernel.
const MARK: u64 = 90;
/// The flags of clone(2) that make namespaces, which Docker's profile masks.
const NAMESPACES: u64 = 0x7e02_0000;

/// System calls that no C library makes by itself: tests pass arguments to them for the filter to
/// compare.
const QUIET: [(&str, u64); 14] = [
    ("getpgrp", 111),
    ("getegid", 108),
    ("munlockall", 152),
    ("inotify_init", 253),
    ("sched_get_priority_max", 146),
    ("sched_get_priority_min", 147),
    ("timer_getoverrun", 225),
    ("io_destroy", 207),
    ("epoll_create", 213),
    ("getsid", 124),
    ("getpgid", 121),
    ("inotify_rm_watch", 255),
    ("mq_notify", 244),
    ("timer_delete", 226),
];

/// An operator, and the function that computes it for an argument and a value.
type Operator = (&'static str, fn(u64, u64) -> bool);

const OPERATORS: [Operator; 6] = [
    ("NE", |argument, value| argument != value),
    ("LT", |argument, value| argument < value),
    ("LE", |argument, value| argument <= value),
    ("EQ", |argument, value| argument == value),
    ("GE", |argument, value| argument >= value),
    ("GT", |argument, value| argument > value),
];

/// The system calls that the test program itself needs after it has started.
const NEEDED: [&str; 29] = [
    "execve",
    "arch_prctl",
    "brk",
    "clone",
    "exit_group",
    "fork",
    "getrandom",
    "mmap",
    "mprotect",
    "munmap",
    "poll",
    "prlimit64",
    "readlink",
    "readlinkat",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "sched_getaffinity",
    "set_robust_list",
    "set_tid_address",
    "sigaltstack",
    "wait4",
    "write",
    "gettid",
    "openat",
    "read",
    "close",
    "newfstatat",
    "fstat",
];

/// The result of a bundle under one runtime: status, standard output, standard error.
type Told = (Option<i32>, String, String);

/// A bundle whose program makes system calls under a profile.
fn bundle(profile: &Value, no_new_privileges: bool, calls: &[String]) -> Bundle {
    let mut bundle = Bundle::new(&[]).unwrap();
    fs::copy(PROGRAM, bundle.rootfs().join("bin/syscalls")).unwrap();
    let mut words = vec!["/bin/syscalls".to_owned()];
    words.extend_from_slice(calls);
    bundle.spec["process"]["args"] = json!(words);
    bundle.spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
    bundle.spec["linux"]["seccomp"] = profile.clone();
    // Calls that the filter allows must not fail because a capability is missing.
    for set in ["bounding", "effective", "permitted"] {
        let set = bundle.spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.extend(["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"].map(|name| json!(name)));
    }
    bundle.write().unwrap();
    bundle
}

/// The result of system calls under a profile in a pod.
fn under(pod: &Pod, profile: &Value, no_new_privileges: bool, calls: &[String]) -> Told {
    told(&pod.run("filtered", &mut bundle(profile, no_new_privileges, calls)).unwrap())
}

/// Makes system calls under both runtimes, with and without no_new_privs. The results must be the
/// same; returns them, one for each line.
fn answers([ours, runc]: &[Pod; 2], profile: &Value, calls: &[String]) -> Vec<String> {
    let expected = under(runc, profile, true, calls);
    assert_eq!(expected.0, Some(0), "runc: {expected:?}");
    for no_new_privileges in [true, false] {
        let own = under(ours, profile, no_new_privileges, calls);
        let lines = own.1.lines().zip(expected.1.lines()).filter(|(own, theirs)| own != theirs);
        let lines: Vec<_> = lines.collect();
        assert!(lines.is_empty(), "ours and runc's: {lines:#?}");
        assert_eq!(own, expected, "noNewPrivileges {no_new_privileges}");
    }
    let lines = expected.1.lines().zip(calls);
    lines.map(|(line, call)| line.strip_prefix(&format!("{call} ")).unwrap().to_owned()).collect()
}

fn call(number: u64, arguments: &[u64]) -> String {
    let arguments: Vec<_> = arguments.iter().map(|argument| format!("{argument:#x}")).collect();
    format!("x86_64:{number}:{}", arguments.join(","))
}

fn allowing(rules: &[Value]) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
}

fn rule(name: &str, action: &str) -> Value {
    json!({"names": [name], "action": format!("SCMP_ACT_{action}")})
}

fn compare(index: usize, operator: &str, value: u64, second: u64) -> Value {
    json!({"index": index, "op": format!("SCMP_CMP_{operator}"), "value": value, "valueTwo": second})
}

fn marked(name: &str, comparisons: &[Value]) -> Value {
    json!({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": MARK, "args": comparisons})
}

fn is_marked(answer: &str) -> bool {
    answer == format!("errno {MARK}")
}

/// A profile built like Docker's: it allows every system call that Podman's allows without
/// capabilities, returns `EPERM` for the others, and checks the flags of clone(2). The names in
/// `left_out` are not allowed.
fn ordinary(left_out: &[&str]) -> Value {
    let profile: Value = serde_json::from_slice(&fs::read(PROFILE).unwrap()).unwrap();
    let mut rules = Vec::new();
    for mut rule in profile["syscalls"].as_array().unwrap().clone() {
        let includes = &rule["includes"];
        let here = includes["arches"].as_array().is_none_or(|all| all.contains(&json!("amd64")));
        if rule["action"] != "SCMP_ACT_ALLOW" || !here || !includes["caps"].is_null() {
            continue;
        }
        let names = rule["names"].as_array_mut().unwrap();
        let masked = ["clone", "clone3", "unshare", "mount", "umount", "umount2"];
        names.retain(|name| !masked.iter().chain(left_out).any(|it| name == it));
        rules.push(json!({
            "names": names, "action": rule["action"], "args": rule["args"],
        }));
    }
    rules.push(json!({
        "names": ["clone"], "action": "SCMP_ACT_ALLOW",
        "args": [compare(0, "MASKED_EQ", NAMESPACES, 0)],
    }));
    rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}

#[test]
fn profiles_are_as_under_runc() {
    Pod::share_beside_runc(&[
        every_comparison_is_the_one_that_is_asked_for,
        a_masked_comparison_masks_the_argument_by_the_first_value,
        comparisons_of_several_arguments_all_hold_and_of_one_argument_are_alternatives,
        every_action_is_what_becomes_of_a_call,
        every_default_action_is_what_becomes_of_other_calls,
        a_call_that_is_newer_than_the_profile_is_not_there,
        a_call_that_is_newer_is_not_there_whatever_the_default_kills,
        calls_of_other_architectures_are_killed_unless_the_profile_has_them,
        names_that_nobody_knows_are_left_out,
        a_rule_that_says_the_same_as_the_default_changes_nothing,
        a_profile_need_not_allow_what_the_runtime_does,
        an_ordinary_profile_keeps_a_container_from_making_namespaces,
        nothing_but_the_program_comes_after_the_filter,
        an_error_number_that_the_kernel_does_not_have_is_refused_as_by_runc,
    ])
    .unwrap();
}

fn every_comparison_is_the_one_that_is_asked_for(pods: &[Pod; 2]) {
    let datums = [5, 0x1_0000_0005];
    let arguments =
        [0, 4, 5, 6, 0x1_0000_0004, 0x1_0000_0005, 0x1_0000_0006, 0x2_0000_0005, u64::MAX];
    let cases = datums.iter().flat_map(|datum| OPERATORS.map(|operator| (operator, *datum)));
    let cases: Vec<_> = cases.zip(QUIET).collect();
    let rules = cases.iter().map(|(((operator, _), datum), (name, _))| {
        marked(name, &[compare(2, operator, *datum, 0)])
    });
    let calls: Vec<(String, bool, String)> = cases
        .iter()
        .flat_map(|(((operator, holds), datum), (_, number))| {
            arguments.map(|argument| {
                let words = format!("{argument:#x} {operator} {datum:#x}");
                (call(*number, &[0, 0, argument]), holds(argument, *datum), words)
            })
        })
        .collect();
    let made: Vec<_> = calls.iter().map(|(call, _, _)| call.clone()).collect();
    let answers = answers(pods, &allowing(&rules.collect::<Vec<_>>()), &made);
    for ((_, holds, words), answer) in calls.iter().zip(answers) {
        assert_eq!(is_marked(&answer), *holds, "{words}: {answer}");
    }
}

fn a_masked_comparison_masks_the_argument_by_the_first_value(pods: &[Pod; 2]) {
    let cases = [
        (NAMESPACES, 0),
        (0xff00, 0x1200),
        (0xff_0000_0000, 0x12_0000_0000),
        (0xff_0000_ff00, 0x12_0000_3400),
        (u64::MAX, 7),
    ];
    let arguments = [
        0,
        7,
        0x11,
        NAMESPACES,
        0x1000_0000,
        0x1200,
        0x1234,
        0x1300,
        0x12_0000_0000,
        0x12_0000_3400,
        0x12_7777_3477,
        0x13_0000_3400,
        0x99_0000_1299,
        u64::MAX,
    ];
    let rules: Vec<_> = cases
        .iter()
        .zip(QUIET)
        .map(|((mask, value), (name, _))| marked(name, &[compare(0, "MASKED_EQ", *mask, *value)]))
        .collect();
    let mut calls = Vec::new();
    let mut expected = Vec::new();
    for ((mask, value), (_, number)) in cases.iter().zip(QUIET) {
        for argument in arguments {
            calls.push(call(number, &[argument]));
            expected.push((argument & mask == *value, format!("{argument:#x} & {mask:#x}")));
        }
    }
    for (answer, (holds, words)) in answers(pods, &allowing(&rules), &calls).iter().zip(expected) {
        assert_eq!(is_marked(answer), holds, "{words}: {answer}");
    }
}

fn comparisons_of_several_arguments_all_hold_and_of_one_argument_are_alternatives(pods: &[Pod; 2]) {
    let rules = [
        // All conditions of one rule must hold.
        marked(
            "getpgrp",
            &[compare(0, "EQ", 1, 0), compare(1, "GT", 5, 0), compare(5, "NE", 9, 0)],
        ),
        // Several rules for one call.
        marked("getegid", &[compare(0, "EQ", 1, 0)]),
        marked("getegid", &[compare(1, "EQ", 2, 0), compare(2, "EQ", 3, 0)]),
        // Two conditions for the same argument.
        marked("munlockall", &[compare(0, "EQ", 1, 0), compare(0, "EQ", 2, 0)]),
    ];
    let cases: [(u64, &[u64], bool); 10] = [
        (111, &[1, 6, 0, 0, 0, 0], true),
        (111, &[1, 5, 0, 0, 0, 0], false),
        (111, &[2, 6, 0, 0, 0, 0], false),
        (111, &[1, 6, 0, 0, 0, 9], false),
        (108, &[1, 0, 0], true),
        (108, &[0, 2, 3], true),
        (108, &[0, 2, 2], false),
        (152, &[1], true),
        (152, &[2], true),
        (152, &[3], false),
    ];
    let calls: Vec<_> =
        cases.iter().map(|(number, arguments, _)| call(*number, arguments)).collect();
    for (answer, case) in answers(pods, &allowing(&rules), &calls).iter().zip(cases) {
        assert_eq!(is_marked(answer), case.2, "{case:?}: {answer}");
    }
}

fn every_action_is_what_becomes_of_a_call(pods: &[Pod; 2]) {
    let rules = [
        rule("getpgrp", "KILL"),
        rule("getegid", "KILL_THREAD"),
        rule("munlockall", "KILL_PROCESS"),
        rule("inotify_init", "TRAP"),
        rule("sched_get_priority_max", "TRACE"),
        rule("sched_get_priority_min", "LOG"),
        rule("timer_getoverrun", "ERRNO"),
        json!({"names": ["io_destroy"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0}),
        json!({"names": ["epoll_create"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4000}),
        json!({"names": ["getpgid"], "action": "SCMP_ACT_TRACE", "errnoRet": 7}),
    ];
    let expected = [
        ("x86_64:111", "did not return, signal 31"),
        ("x86_64:108", "did not return, signal 31"),
        ("x86_64:152", "did not return, signal 31"),
        // Kills one of two threads, or both.
        ("thread/x86_64:111", "did not return"),
        ("thread/x86_64:108", "did not return"),
        ("thread/x86_64:152", "did not return, signal 31"),
        ("x86_64:253", "did not return, signal 31"),
        ("caught/x86_64:253", "was trapped"),
        ("caught/x86_64:152", "did not return, signal 31"),
        // Without a tracer, the call returns ENOSYS.
        ("x86_64:146:0", "errno 38"),
        ("x86_64:121", "errno 38"),
        ("x86_64:147:0", "ok"),
        ("x86_64:225", "errno 1"),
        ("x86_64:207", "ok"),
        ("x86_64:213:1", "errno 4000"),
        ("x86_64:39", "ok"),
    ];
    let calls: Vec<_> = expected.iter().map(|(call, _)| (*call).to_owned()).collect();
    let answers = answers(pods, &allowing(&rules), &calls);
    for (answer, (call, expected)) in answers.iter().zip(expected) {
        assert_eq!(answer, expected, "{call}");
    }
}

fn every_default_action_is_what_becomes_of_other_calls(pods: &[Pod; 2]) {
    let mut profile = ordinary(&["getpgrp", "getegid"]);
    let calls = ["x86_64:111", "thread/x86_64:108", "caught/x86_64:111", "x86_64:39"];
    let calls = calls.map(str::to_owned);
    for (action, number, expected) in [
        ("ERRNO", None, ["errno 1", "errno 1", "errno 1", "ok"]),
        ("ERRNO", Some(MARK), ["errno 90", "errno 90", "errno 90", "ok"]),
        ("TRACE", None, ["errno 38", "errno 38", "errno 38", "ok"]),
        ("LOG", None, ["ok"; 4]),
        ("ALLOW", None, ["ok"; 4]),
    ] {
        profile["defaultAction"] = json!(format!("SCMP_ACT_{action}"));
        profile["defaultErrnoRet"] = json!(number);
        assert_eq!(answers(pods, &profile, &calls), expected, "{action} {number:?}");
    }
    let killed = "did not return, signal 31";
    for (action, expected) in [
        ("KILL", [killed, "did not return", killed, "ok"]),
        ("KILL_PROCESS", [killed, killed, killed, "ok"]),
        ("TRAP", [killed, killed, "was trapped", "ok"]),
    ] {
        profile["defaultAction"] = json!(format!("SCMP_ACT_{action}"));
        profile["defaultErrnoRet"] = Value::Null;
        assert_eq!(answers(pods, &profile, &calls), expected, "{action}");
    }
}

fn a_call_that_is_newer_than_the_profile_is_not_there(pods: &[Pod; 2]) {
    let numbers = [425, 435, 439, 449, 450, 451, 460, 470, 500, 600, 1000, 0x3fff_ffff];
    let abis = ["x86_64", "x32"];
    let calls = abis.iter().flat_map(|abi| numbers.map(|number| format!("{abi}:{number}")));
    let mut calls: Vec<_> = calls.collect();
    calls.push("x86_64:-1".to_owned());
    let answers = answers(pods, &ordinary(&[]), &calls);
    for number in [460, 470, 500, 1000] {
        let at = calls.iter().position(|call| *call == format!("x86_64:{number}")).unwrap();
        assert_eq!(answers[at], "errno 38", "{number}");
    }
}

fn a_call_that_is_newer_is_not_there_whatever_the_default_kills(pods: &[Pod; 2]) {
    let calls = ["x86_64:600".to_owned(), "x86_64:111".to_owned()];
    let mut profile = ordinary(&["getpgrp"]);
    for action in ["KILL_PROCESS", "TRAP", "KILL"] {
        profile["defaultAction"] = json!(format!("SCMP_ACT_{action}"));
        let expected = ["errno 38", "did not return, signal 31"];
        assert_eq!(answers(pods, &profile, &calls), expected, "{action}");
    }
    // If a profile names no architecture, runc 1.1 does not filter the native one; runc 1.2 does.
    profile["defaultAction"] = json!("SCMP_ACT_ERRNO");
    profile["architectures"] = json!([]);
    let told = under(&pods[0], &profile, true, &calls);
    let expected = "x86_64:600 errno 38\nx86_64:111 errno 1\n";
    assert_eq!(told, (Some(0), expected.to_owned(), String::new()));
}

fn calls_of_other_architectures_are_killed_unless_the_profile_has_them(pods: &[Pod; 2]) {
    let calls = ["x86_64:111", "x32:111", "x32:39", "x32:600"].map(str::to_owned);
    // The test host's kernel has no entry for 32-bit system calls, the guest's has.
    let short_calls = ["i386:65", "i386:20", "i386:600"].map(str::to_owned);
    let all = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"];
    let lists: [&[&str]; 6] = [&[], &all[..1], &all[..2], &[all[0], all[2]], &all[..3], &all];
    for list in lists {
        let mut profile = allowing(&[marked("getpgrp", &[])]);
        profile["architectures"] = json!(list);
        let answers = answers(pods, &profile, &calls);
        assert_eq!(answers[0], "errno 90", "{list:?}");
        let x32 =
            if list.contains(&"SCMP_ARCH_X32") { "errno 90" } else { "did not return, signal 31" };
        assert_eq!(answers[1], x32, "{list:?}");
        let short = match list.contains(&"SCMP_ARCH_X86") {
            true => "i386:65 errno 90\ni386:20 ok\ni386:600 errno 38\n".to_owned(),
            false => short_calls
                .each_ref()
                .map(|call| format!("{call} did not return, signal 31\n"))
                .concat(),
        };
        assert_eq!(under(&pods[0], &profile, true, &short_calls).1, short, "{list:?}");
    }
}

#[test]
#[ignore = "long: --suite oci_long"]
fn flags_are_taken_as_by_crun() {
    // Debian's runc does not support this yet, so crun is used.
    let pods = [Runtime::new(), Runtime::crun()].map(|runtime| Pod::of(runtime.unwrap()).unwrap());
    let calls = ["x86_64:111".to_owned(), "x86_64:39".to_owned()];
    let known = ["LOG", "SPEC_ALLOW", "TSYNC"].map(|flag| format!("SECCOMP_FILTER_FLAG_{flag}"));
    let mut profile = allowing(&[marked("getpgrp", &[])]);
    for flags in [&known[..1], &known[1..2], &known[2..], &known] {
        profile["flags"] = json!(flags);
        let expected = "x86_64:111 errno 90\nx86_64:39 ok\n";
        for no_new_privileges in [true, false] {
            let told = pods.each_ref().map(|pod| under(pod, &profile, no_new_privileges, &calls));
            let expected = (Some(0), expected.to_owned(), String::new());
            assert_eq!(told, [expected.clone(), expected], "{flags:?}");
        }
    }
    // The flag needs a listener, which is not supported. runc does not know the flag.
    let flag = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";
    profile["flags"] = json!([flag]);
    let (status, output, errors) = under(&pods[0], &profile, true, &calls);
    assert_eq!(status, Some(1), "{output}{errors}");
    assert!(errors.contains(flag), "{errors}");
    Pod::end_all(pods).unwrap();
}

fn an_error_number_that_the_kernel_does_not_have_is_refused_as_by_runc(pods: &[Pod; 2]) {
    let rule = json!({"names": ["getpgrp"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5000});
    for pod in pods {
        let calls = ["x86_64:111".to_owned()];
        let (status, output, errors) =
            under(pod, &allowing(std::slice::from_ref(&rule)), true, &calls);
        assert_eq!(status, Some(1), "{output}");
        assert!(errors.contains("getpgrp"), "{errors}");
    }
}

fn names_that_nobody_knows_are_left_out(pods: &[Pod; 2]) {
    let names =
        json!(["no_such_call", "getpgrp", "renamed_by_nobody2", "s390_pci_mmio_read", "waitpid"]);
    let rule = json!({"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": MARK});
    let calls = ["x86_64:111".to_owned(), "x86_64:39".to_owned()];
    assert_eq!(answers(pods, &allowing(&[rule]), &calls), ["errno 90", "ok"]);
}

fn a_rule_that_says_the_same_as_the_default_changes_nothing(pods: &[Pod; 2]) {
    let rules = [rule("getpgrp", "ALLOW"), marked("getegid", &[])];
    let calls = ["x86_64:111".to_owned(), "x86_64:108".to_owned()];
    assert_eq!(answers(pods, &allowing(&rules), &calls), ["ok", "errno 90"]);
}

fn a_profile_need_not_allow_what_the_runtime_does(pods: &[Pod; 2]) {
    // System calls that runc does not need.
    let left_out = [
        "faccessat",
        "faccessat2",
        "access",
        "statx",
        "memfd_create",
        "accept",
        "accept4",
        "close_range",
        "recvfrom",
        "sendto",
        "socket",
        "socketpair",
        "bind",
        "listen",
        "connect",
        "shutdown",
    ];
    let calls = ["x86_64:439".to_owned(), "x86_64:39".to_owned()];
    assert_eq!(answers(pods, &ordinary(&left_out), &calls), ["errno 1", "ok"]);
}

fn nothing_but_the_program_comes_after_the_filter(pods: &[Pod; 2]) {
    let profile = json!({
        "defaultAction": "SCMP_ACT_KILL_PROCESS",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": NEEDED, "action": "SCMP_ACT_ALLOW"}],
    });
    for no_new_privileges in [true, false] {
        let told = under(&pods[0], &profile, no_new_privileges, &["x86_64:39".to_owned()]);
        let expected = "x86_64:39 did not return, signal 31\n";
        assert_eq!(told, (Some(0), expected.to_owned(), String::new()), "{no_new_privileges}");
    }
}

fn an_ordinary_profile_keeps_a_container_from_making_namespaces(pods: &[Pod; 2]) {
    let child = 0x11;
    let new =
        [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
    let mut calls: Vec<_> = new.iter().map(|flag| call(56, &[flag | child])).collect();
    calls.extend(new.iter().map(|flag| call(272, &[*flag])));
    let refused = calls.len();
    calls.push(call(56, &[child]));
    // clone3, mount, umount2, ptrace, keyctl, add_key, request_key, bpf, setns, open_by_handle_at,
    // perf_event_open, userfaultfd, init_module, kexec_load, reboot, swapon, personality
    let others =
        [435, 165, 166, 101, 250, 248, 249, 321, 308, 304, 298, 323, 175, 246, 169, 167, 135];
    calls.extend(others.map(|number| call(number, &[0xffff_fffe])));
    let answers = answers(pods, &ordinary(&[]), &calls);
    assert_eq!(answers[..refused], vec!["errno 1"; refused]);
    assert_eq!(answers[refused..refused + 2], ["ok", "errno 38"]);
    assert_eq!(answers.last().unwrap(), "errno 1", "personality");
}

#[test]
fn a_further_process_has_the_containers_filter() {
    let mut profile = ordinary(&["getpgrp", "faccessat2"]);
    profile["architectures"] = json!(["SCMP_ARCH_X86_64"]);
    let mut all = Vec::new();
    for runtime in [Runtime::new().unwrap(), Runtime::runc().unwrap()] {
        for no_new_privileges in [true, false] {
            let mut bundle = bundle(&profile, no_new_privileges, &[]);
            bundle.spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
            bundle.write().unwrap();
            runtime.create("filtered", &bundle).unwrap();
            runtime.ok(&["start", "filtered"]).unwrap();
            let clone = call(56, &[0x1000_0011]);
            let exec = ["exec", "filtered", "/bin/syscalls", "x86_64:111", "x86_64:600", &clone];
            let user: Vec<&str> =
                ["exec", "--user", "1000"].into_iter().chain(exec[1..].iter().copied()).collect();
            all.push([told(&runtime.call(&exec).unwrap()), told(&runtime.call(&user).unwrap())]);
            runtime.ok(&["delete", "--force", "filtered"]).unwrap();
        }
        runtime.assert_clean().unwrap();
    }
    let expected = "x86_64:111 errno 1\nx86_64:600 errno 38\nx86_64:56:0x10000011 errno 1\n";
    let expected = (Some(0), expected.to_owned(), String::new());
    assert_eq!(all, vec![[expected.clone(), expected]; 4]);
}

#[test]
fn hooks_of_the_container_have_its_filter_and_its_capabilities() {
    let hook = "#!/bin/sh\ngrep -E '^(Seccomp:|Cap|NoNewPrivs)' /proc/self/status >> /hook\n";
    let mut all = BTreeSet::new();
    for runtime in [Runtime::new().unwrap(), Runtime::runc().unwrap()] {
        let profile = allowing(&[marked("getpgrp", &[])]);
        let mut bundle = bundle(&profile, false, &["x86_64:111".to_owned()]);
        let path = bundle.rootfs().join("bin/hook");
        fs::write(&path, hook).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        bundle.spec["hooks"] = json!({"startContainer": [{"path": "/bin/hook"}]});
        bundle.write().unwrap();
        let told = told(&runtime.run("filtered", &bundle).unwrap());
        assert_eq!((told.0, told.1.as_str()), (Some(0), "x86_64:111 errno 90\n"), "{told:?}");
        all.insert(fs::read_to_string(bundle.rootfs().join("hook")).unwrap());
        runtime.assert_clean().unwrap();
    }
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(all.first().unwrap().contains("Seccomp:\t2"), "{all:?}");
}

#[test]
fn a_listener_is_refused_by_its_name() {
    let runtime = Runtime::new().unwrap();
    let bundle = bundle(&allowing(&[rule("getpgrp", "NOTIFY")]), true, &[]);
    let mut bundle = bundle;
    bundle.spec["process"]["args"] = json!(["/bin/true"]);
    bundle.write().unwrap();
    let (status, _, errors) = told(&runtime.run("filtered", &bundle).unwrap());
    assert_ne!(status, Some(0));
    assert!(errors.contains("SCMP_ACT_NOTIFY"), "{errors}");
    runtime.assert_clean().unwrap();
}
