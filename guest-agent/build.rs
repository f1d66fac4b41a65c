//! How the agent is linked: it lives in every guest's memory, so its relocations are packed (a tenth
//! of it otherwise), and a release has no symbols, which Cargo leaves in when a package's
//! optimisation level is its own.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo::rustc-link-arg-bins=-Wl,--strip-all");
    }
}
