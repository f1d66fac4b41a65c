//! Guided by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bulkhead_vmm::fuzzing::queue(bytes));
