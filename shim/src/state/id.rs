//! The name of a container, checked once.
//!
//! Names that runc accepts are accepted. A name becomes a directory on the host and a cgroup in the
//! guest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest name, in bytes: a file name's limit.
const LEN_MAX: usize = 255;

/// The name of a container.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

/// A name that is not valid.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "invalid container id {0:?}: use 1 to 255 letters, digits, '_', '+', ',', '-' and '.', and \
     neither '.' nor '..'"
)]
pub struct InvalidId(String);

impl ContainerId {
    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = InvalidId;

    fn from_str(name: &str) -> Result<Self, InvalidId> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+,-.".contains(&byte);
        let good = (1..=LEN_MAX).contains(&name.len())
            && name.bytes().all(allowed)
            && name != "."
            && name != "..";
        if good { Ok(Self(name.to_owned())) } else { Err(InvalidId(name.to_owned())) }
    }
}

impl TryFrom<String> for ContainerId {
    type Error = InvalidId;

    fn try_from(name: String) -> Result<Self, InvalidId> {
        name.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_runc_takes_are_taken() {
        for name in ["a", "web-1", "a_b+c,d.e", "0123456789abcdef"] {
            assert_eq!(name.parse::<ContainerId>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "a b", "ä", "a\0", "x".repeat(256).as_str()] {
            let error = name.parse::<ContainerId>().unwrap_err();
            assert!(error.to_string().starts_with("invalid container id"), "{name:?}");
        }
    }
}
