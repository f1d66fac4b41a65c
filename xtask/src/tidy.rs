//! Checks the rules of the repository that a program can check, on the files that git tracks.
//!
//! Each rule is a function of text, so that it can be tested with text; only [`broken`] reads
//! files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cargo::{cargo, output, root};

/// The workspace members that each member may depend on. Tests may use all.
const DIRECTION: [(&str, &[&str]); 10] = [
    (
        "bulkhead",
        &[
            "bulkhead-hooks",
            "bulkhead-netlink",
            "bulkhead-protocol",
            "bulkhead-relay",
            "bulkhead-vmm",
        ],
    ),
    (
        "bulkhead-agent",
        &["bulkhead-hooks", "bulkhead-netlink", "bulkhead-protocol", "bulkhead-relay"],
    ),
    ("bulkhead-hooks", &[]),
    ("bulkhead-netlink", &[]),
    ("bulkhead-protocol", &[]),
    ("bulkhead-relay", &[]),
    ("bulkhead-vmm", &[]),
    ("guest-image", &[]),
    ("test-host", &["guest-image"]),
    ("xtask", &["guest-image"]),
];
/// The monitor and the file server are synchronous and parse no command line.
const NOT_IN_VMM: [&str; 5] = ["clap", "hyper", "prost", "tokio", "tonic"];

/// Every broken rule, as `file: what`.
pub(crate) fn broken() -> Result<Vec<String>> {
    let listing = output(Command::new("git").arg("ls-files").current_dir(root()))?;
    let files: BTreeSet<&str> = listing.lines().collect();
    let mut broken = Vec::new();
    for file in &files {
        // A tracked file that does not exist is being deleted.
        let Ok(bytes) = fs::read(root().join(file)) else { continue };
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let mut report = |what: Vec<String>| {
            broken.extend(what.into_iter().map(|what| format!("{file}: {what}")));
        };
        report(machine_paths(&text));
        if file.ends_with(".rs") {
            report(module_text(&text));
            report(unsafe_reason(&text));
        }
        if file.ends_with(".md") {
            report(dead_paths(&text, |path| exists(&files, path)));
        }
    }
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    broken.extend(directions(&serde_json::from_str(&metadata).context("cargo metadata")?));
    Ok(broken)
}

/// Whether a path is a tracked file, a directory of tracked files, or below `target`.
fn exists(files: &BTreeSet<&str>, path: &str) -> bool {
    let path = path.trim_end_matches('/');
    let below = format!("{path}/");
    path.starts_with("target") || files.iter().any(|file| *file == path || file.starts_with(&below))
}

fn module_text(text: &str) -> Vec<String> {
    if text.starts_with("//!") {
        return Vec::new();
    }
    vec!["opens without a //! text".to_owned()]
}

fn unsafe_reason(text: &str) -> Vec<String> {
    let mut previous = "";
    let mut broken = Vec::new();
    for line in text.lines() {
        if line.starts_with("#![expect(unsafe_code") && !previous.starts_with("//") {
            broken.push("opts in to unsafe code without an UNSAFETY comment above".to_owned());
        }
        previous = line;
    }
    broken
}

/// Finds absolute paths that exist on one machine only: this checkout's, and the usual place of
/// development checkouts. The latter is concatenated here so that this file passes.
fn machine_paths(text: &str) -> Vec<String> {
    let places = [["/wo", "rk/"].concat(), root().display().to_string()];
    let mut broken = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for place in &places {
            let own = |at: usize| {
                let before = line[..at].chars().next_back();
                !before.is_some_and(|sign| sign.is_alphanumeric() || "._-}/~)".contains(sign))
            };
            if line.match_indices(place.as_str()).any(|(at, _)| own(at)) {
                broken.push(format!("line {}: a path of one machine: {place}", index + 1));
                break;
            }
        }
    }
    broken
}

/// Finds back-ticked words that look like a path into the repository but are not one.
fn dead_paths(text: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let roots = tops();
    let mut broken = Vec::new();
    for word in text.split('`').skip(1).step_by(2) {
        let path = word.split([' ', ':', '#']).next().unwrap_or_default();
        let inside = roots.contains(path.split('/').next().unwrap_or_default());
        let plain = !path.contains(['*', '<', '{', '…', '$']);
        if path.contains('/') && inside && plain && !exists(path) {
            broken.push(format!("`{path}` does not exist"));
        }
    }
    broken
}

fn tops() -> BTreeSet<&'static str> {
    BTreeSet::from([
        "docs",
        "guest-agent",
        "guest-image",
        "hooks",
        "netlink",
        "protocol",
        "relay",
        "shim",
        "tests",
        "vmm",
        "xtask",
    ])
}

fn directions(metadata: &Value) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = DIRECTION.into_iter().collect();
    let packages: Vec<&Value> = metadata["packages"].as_array().into_iter().flatten().collect();
    let names: BTreeSet<&str> = packages.iter().filter_map(|it| it["name"].as_str()).collect();
    let mut broken = Vec::new();
    for package in &packages {
        let Some(name) = package["name"].as_str() else { continue };
        let dependencies = package["dependencies"].as_array().into_iter().flatten();
        for dependency in dependencies {
            let needed = dependency["name"].as_str().unwrap_or_default();
            let wrong = match allowed.get(name) {
                Some(allowed) => names.contains(needed) && !allowed.contains(&needed),
                None => false,
            };
            let banned = name == "bulkhead-vmm" && NOT_IN_VMM.contains(&needed);
            if wrong || banned {
                broken.push(format!("{name} depends on {needed}, which it must not"));
            }
        }
    }
    broken
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn file_without_opening_text_is_named() {
        assert!(module_text("//! What it is.\n").is_empty());
        assert_eq!(module_text("use std::fs;\n").len(), 1);
    }

    #[test]
    fn path_in_a_document_must_exist() {
        let text = "see `xtask/src/main.rs`, `xtask/src/gone.rs`, `cargo xtask` and `/proc/self`";
        assert_eq!(
            dead_paths(text, |path| root().join(path).exists()),
            ["`xtask/src/gone.rs` does not exist"]
        );
    }

    #[test]
    fn machine_path_is_found_and_a_relative_one_is_not() {
        let path = ["/wo", "rk/main"].concat();
        assert_eq!(machine_paths(&format!("cd {path}\n")).len(), 1);
        assert!(machine_paths(&format!("run{path}\n")).is_empty());
    }

    #[test]
    fn unsafe_code_needs_its_comment() {
        let line = "#![expect(unsafe_code, reason = \"mmap\")]\n";
        assert_eq!(unsafe_reason(line).len(), 1);
        assert!(unsafe_reason(&format!("// UNSAFETY: mmap\n{line}")).is_empty());
    }

    #[test]
    fn dependency_against_the_direction_is_named() {
        let package = |name: &str, needed: &str| json!({ "name": name, "dependencies": [{ "name": needed }] });
        let metadata = json!({ "packages": [
            package("bulkhead", "bulkhead-vmm"),
            package("bulkhead-vmm", "bulkhead-protocol"),
            package("bulkhead-protocol", "tonic"),
        ] });
        let broken = directions(&metadata);
        assert_eq!(broken, ["bulkhead-vmm depends on bulkhead-protocol, which it must not"]);
    }
}
