//! What is wrong with a policy: where, what, and what would be right.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::trusted::Distrust;

/// Why there is no policy to follow.
#[derive(Debug, Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("cannot read {}", .0.display())]
    Unreadable(PathBuf, #[source] io::Error),
    /// The file is larger than any policy.
    #[error("{} is larger than {max} bytes; a policy needs less", .0.display(), max = super::trusted::BYTES_MAX)]
    TooLarge(PathBuf),
    /// Somebody other than root could have written the file.
    #[error("cannot trust {}: {distrust}", .file.display())]
    Untrusted {
        /// The file.
        file: PathBuf,
        /// Who, and what ends it.
        distrust: Distrust,
    },
    /// Something in the file.
    #[error("{}:{line}:{column}: {what}", .file.display())]
    Wrong {
        /// The file.
        file: PathBuf,
        /// From 1.
        line: usize,
        /// From 1, in bytes.
        column: usize,
        /// What is there, and what would be right.
        what: String,
    },
    /// The value of an environment variable.
    #[error("{variable}={value:?} means nothing; write {right}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        right: &'static str,
    },
    /// The runtime is called by a name that the file does not have.
    #[error(
        "{} has no section [runtime.{name}] for the runtime that is called so{others}; write one, \
         which may be empty, or call it by another name", .file.display()
    )]
    NoSection {
        /// The file.
        file: PathBuf,
        /// The name.
        name: String,
        /// The sections that there are.
        others: String,
    },
}
