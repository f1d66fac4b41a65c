//! The programs of createContainer hooks: files of the host that run in the container's namespaces,
//! which are in the guest.
//!
//! A script or a statically linked program is shared with the guest as a file. A dynamically linked
//! program would need the host's loader and libraries, so the container's own file at the same path
//! runs instead.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use elf::ElfStream;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;
use elf::parse::ParseError;
use oci_spec::runtime::{Hook, Hooks};

use super::refuse::refuse;
use super::{BundleError, FileKind, Shared};

/// Returns the hooks that run in the guest, with the paths of their programs there, and the files
/// that are shared for them. `in_guest` converts a path in the share to a path in the guest.
pub(super) fn of_guest(
    hooks: &Hooks,
    in_guest: impl Fn(&Path) -> PathBuf,
) -> Result<(Hooks, Vec<Shared>), BundleError> {
    let mut shared = Vec::new();
    let mut create_container = hooks.create_container().clone();
    for (number, hook) in create_container.iter_mut().flatten().enumerate() {
        let target = Path::new("hooks").join(number.to_string());
        let Some(program) = share(hook, target)? else { continue };
        // `argv[0]` stays the original path.
        let own_name = || vec![hook.path().to_string_lossy().into_owned()];
        hook.set_args(Some(hook.args().clone().unwrap_or_else(own_name)));
        hook.set_path(in_guest(&program.target));
        shared.push(program);
    }
    let mut of_guest = Hooks::default();
    of_guest.set_create_container(create_container);
    of_guest.set_start_container(hooks.start_container().clone());
    Ok((of_guest, shared))
}

/// The file that is shared at `target` for a hook; `None` if the container's own file runs.
fn share(hook: &Hook, target: PathBuf) -> Result<Option<Shared>, BundleError> {
    let path = hook.path();
    if !path.is_absolute() {
        let what = format!("hooks.createContainer has the relative path {}", path.display());
        return Err(refuse(what, "begin it with '/'").into());
    }
    let unusable = |source| BundleError::Source {
        what: "program of a createContainer hook",
        path: path.clone(),
        source,
    };
    let shared = Shared {
        read_only: true,
        read_only_below: true,
        ..Shared::new(path.clone(), target, FileKind::File)
    };
    Ok((!needs_loader(path).map_err(unusable)?).then_some(shared))
}

fn needs_loader(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    match ElfStream::<AnyEndian, _>::open_stream(file) {
        Ok(program) => Ok(program.segments().iter().any(|segment| segment.p_type == PT_INTERP)),
        Err(ParseError::IOError(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(error)
        }
        // A script, or a file that the guest's kernel cannot run either.
        Err(_) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn shared(path: &str) -> Result<Option<Shared>, BundleError> {
        let mut hook = Hook::default();
        hook.set_path(path.into());
        share(&hook, "hooks/0".into())
    }

    #[test]
    fn scripts_and_static_programs_go_along_and_others_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script");
        for text in ["#!/bin/sh\n", ""] {
            fs::write(&script, text).unwrap();
            let program = shared(script.to_str().unwrap()).unwrap().unwrap();
            assert!(program.read_only && program.source == script);
        }
        assert!(shared("/bin/busybox").unwrap().is_some());
        assert!(shared("/bin/sh").unwrap().is_none());
    }

    #[test]
    fn a_program_that_cannot_be_used_is_named() {
        let error = shared("/no/such/hook").unwrap_err().to_string();
        assert_eq!(error, "cannot use program of a createContainer hook /no/such/hook");
        assert!(shared("/dev").is_err());
        let error = shared("hook").unwrap_err().to_string();
        assert_eq!(error, "hooks.createContainer has the relative path hook; begin it with '/'");
    }
}
