//! The build cache: outside the checkout, one directory per hash of the inputs.
//!
//! An entry is made under a lock, in a temporary directory that is renamed when it is complete. So
//! a reader sees all of it or nothing, and two builders never do the same work.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::source::hex;

/// A held lock; it is released when this is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The cache directory: `$BULKHEAD_CACHE`, else `$XDG_CACHE_HOME/bulkhead`, else `~/.cache/bulkhead`.
///
/// # Errors
/// When none of the three variables is set.
pub fn directory() -> Result<PathBuf> {
    if let Some(path) = env::var_os("BULKHEAD_CACHE") {
        return Ok(path.into());
    }
    if let Some(path) = env::var_os("XDG_CACHE_HOME") {
        return Ok(Path::new(&path).join("bulkhead"));
    }
    match env::var_os("HOME") {
        Some(home) => Ok(Path::new(&home).join(".cache/bulkhead")),
        None => bail!("no cache directory: set BULKHEAD_CACHE, XDG_CACHE_HOME or HOME"),
    }
}

/// The hash of these inputs in hexadecimal digits, for the name of an entry.
#[must_use]
pub fn key<'a>(inputs: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update(input.len().to_le_bytes());
        hash.update(input);
    }
    hex(&hash.finalize())
}

/// Waits for the lock of that name and takes it; `waiting` is called once if another process holds
/// it.
///
/// # Errors
/// When the lock file cannot be made or locked.
pub fn lock(directory: &Path, name: &str, waiting: impl FnOnce()) -> Result<Lock> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let path = directory.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    if file.try_lock().is_err() {
        waiting();
        file.lock().with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}

/// Makes `entry` by filling a directory beside it and renaming that directory. Files of an
/// interrupted run are removed first. The caller holds the entry's lock.
///
/// # Errors
/// With those of `fill`, or when a directory cannot be made, removed or renamed.
pub fn publish(entry: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = entry.with_extension("partial");
    remove(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("create {}", partial.display()))?;
    fill(&partial)?;
    fs::rename(&partial, entry)
        .with_context(|| format!("rename {} to {}", partial.display(), entry.display()))
}

/// Removes a directory if it is there.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_fill_publishes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let entry = directory.path().join("entry");
        assert!(publish(&entry, |_| bail!("half done")).is_err());
        assert!(!entry.exists());
    }

    #[test]
    fn leftovers_of_an_interrupted_fill_are_not_published() {
        let directory = tempfile::tempdir().unwrap();
        let entry = directory.path().join("entry");
        fs::create_dir(directory.path().join("entry.partial")).unwrap();
        fs::write(directory.path().join("entry.partial/old"), "").unwrap();
        publish(&entry, |path| Ok(fs::write(path.join("new"), "")?)).unwrap();
        assert!(entry.join("new").exists());
        assert!(!entry.join("old").exists());
    }

    #[test]
    fn key_tells_where_an_input_ends() {
        assert_eq!(key(["ab", "c"]), key(["ab", "c"]));
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
    }

    #[test]
    fn second_holder_waits_for_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let first = lock(directory.path(), "x", || panic!("nobody holds it")).unwrap();
        let path = directory.path().to_owned();
        let (tell, told) = std::sync::mpsc::channel();
        let second = std::thread::spawn(move || {
            lock(&path, "x", || tell.send(()).unwrap()).unwrap();
        });
        told.recv().unwrap();
        drop(first);
        second.join().unwrap();
    }
}
