//! Runs cargo and other programs, and describes their failures.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A program of the workspace that cargo built.
#[derive(Debug)]
pub(crate) struct Artifact {
    /// The target's name: `vm` of the package `bulkhead-tests`.
    pub(crate) target: String,
    pub(crate) package: String,
    /// The directory of the package, where cargo would run it.
    pub(crate) directory: PathBuf,
    pub(crate) executable: PathBuf,
    /// Whether it was built to run the tests of its target.
    pub(crate) is_test: bool,
}

/// The root of the checkout.
pub(crate) fn root() -> &'static Path {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    directory.parent().unwrap_or(directory)
}

/// A cargo command without arguments, in the root of the checkout.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command that must succeed.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("run {program}"))?;
    let arguments: Vec<_> = command.get_args().map(|text| text.to_string_lossy()).collect();
    ensure!(status.success(), "{program} {} failed ({status})", arguments.join(" "));
    Ok(())
}

/// Runs a command that must succeed and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("run {program}"))?;
    ensure!(output.status.success(), "{program} failed ({})", output.status);
    String::from_utf8(output.stdout).with_context(|| format!("output of {program}"))
}

/// Builds with these arguments and lists the resulting executables.
pub(crate) fn build(arguments: &[&str]) -> Result<Vec<Artifact>> {
    artifacts(cargo().args(arguments))
}

/// Runs a cargo command that builds, and lists the resulting executables.
pub(crate) fn artifacts(cargo: &mut Command) -> Result<Vec<Artifact>> {
    let text = output(cargo.args(["--message-format", "json-render-diagnostics"]))?;
    let mut artifacts = Vec::new();
    for line in text.lines() {
        let message: Value = serde_json::from_str(line).context("message of cargo")?;
        artifacts.extend(artifact(&message));
    }
    Ok(artifacts)
}

fn artifact(message: &Value) -> Option<Artifact> {
    let executable = message["executable"].as_str()?.into();
    let directory = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let target = message["target"]["name"].as_str()?.to_owned();
    // A package ID is …/path#name@version, or …/name#version if directory and name are the same.
    let (path, fragment) = message["package_id"].as_str()?.rsplit_once('#')?;
    let package = match fragment.split_once('@') {
        Some((name, _)) => name,
        None => path.rsplit('/').next()?,
    };
    let is_test = message["profile"]["test"].as_bool()?;
    Some(Artifact { target, package: package.to_owned(), directory, executable, is_test })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_forms_of_a_package_id_give_the_name() {
        for (id, name) in [
            ("path+file:///src/tests#bulkhead-tests@0.1.0", "bulkhead-tests"),
            ("path+file:///src/protocol#0.1.0", "protocol"),
        ] {
            let message = json!({
                "package_id": id,
                "manifest_path": "/src/x/Cargo.toml",
                "target": { "name": "vm" },
                "executable": "/target/vm-1",
                "profile": { "test": true },
            });
            assert_eq!(artifact(&message).unwrap().package, name);
        }
    }

    #[test]
    fn library_without_an_executable_is_no_artifact() {
        assert!(artifact(&json!({ "reason": "compiler-artifact", "executable": null })).is_none());
    }
}
