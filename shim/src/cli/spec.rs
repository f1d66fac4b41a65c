//! `bulkhead spec`: writes a config.json to begin with, the one that runc writes on a host with
//! cgroup v2, because that is what a container sees, whatever its host has.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, bail};
#[cfg(test)]
use oci_spec::runtime;

use super::args::Spec;

/// What is written.
const DEFAULT: &str = include_str!("default-config.json");

pub(super) fn spec(spec: &Spec) -> anyhow::Result<()> {
    if spec.rootless {
        bail!(
            "--rootless is not supported: a rootless container shares the host's network, which one \
             in a machine of its own cannot; leave it out"
        );
    }
    let path = spec.bundle.as_deref().unwrap_or(Path::new("")).join("config.json");
    match File::create_new(&path) {
        Ok(mut file) => Ok(file.write_all(DEFAULT.as_bytes())?),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!("File {} exists. Remove it first", path.display())
        }
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// The default, for tests.
#[cfg(test)]
pub(crate) fn default_spec() -> runtime::Spec {
    serde_json::from_str(DEFAULT).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_that_exists_is_left_alone() {
        let bundle = tempfile::tempdir().unwrap();
        let options = Spec { bundle: Some(bundle.path().to_owned()), rootless: false };
        spec(&options).unwrap();
        let error = spec(&options).unwrap_err().to_string();
        assert!(error.contains("config.json exists. Remove it first"), "{error}");
    }

    #[test]
    fn the_default_has_what_a_container_needs() {
        let spec = default_spec();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_deref(), Some(&["sh".to_owned()][..]));
        assert_eq!(process.terminal(), Some(true));
    }
}
