//! The name that the runtime is called by, which chooses a section of the policy: a link to the
//! program works with every caller, an option with those that can pass one.

use std::env;
use std::path::Path;

/// The program's own name, and what the names of its variants begin with.
const PROGRAM: &str = "bulkhead";
const VARIANT: &str = "bulkhead-";

/// A name of the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeName {
    name: String,
    needs_section: bool,
}

impl RuntimeName {
    /// The name that an option gives, or else the one that this process was called by.
    #[must_use]
    pub fn of(option: Option<&str>) -> Self {
        option.map_or_else(|| Self::called(env::args_os().next().as_ref()), Self::chosen)
    }

    /// A name that somebody has chosen on purpose.
    pub(super) fn chosen(name: &str) -> Self {
        Self { name: name.to_owned(), needs_section: name != PROGRAM }
    }

    /// The name of a program's file. A link that stands in for another runtime has a name of that
    /// one, and no section.
    pub(super) fn called(program: Option<impl AsRef<Path>>) -> Self {
        let name = program.as_ref().and_then(|path| path.as_ref().file_name());
        let name = name.map_or_else(|| PROGRAM.into(), |name| name.to_string_lossy());
        Self { name: name.to_string(), needs_section: name.starts_with(VARIANT) }
    }

    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// Whether the policy must have a section for it. A variant without its section would have the
    /// rules that it exists to change.
    pub(super) const fn needs_section(&self) -> bool {
        self.needs_section
    }
}
