//! How the agent is linked: it lives in every guest's memory and is copied there at every boot, so
//! its relocations are packed (a tenth of it otherwise), and a release has neither tables for
//! unwinding nor symbols, which Cargo leaves in when a package's optimisation level is its own.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    if env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
        println!("cargo::rustc-link-arg-bins=-Wl,--strip-all,--no-eh-frame-hdr,-T,{script}");
    }
}
