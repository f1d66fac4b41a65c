//! The policy that is in force for a runtime, and where each value is from: the defaults, then what
//! the file says for all, then the section of the runtime's name, then the environment.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::document::{Document, Setting};
use super::keys::{Given, KEYS};
use super::{Policy, PolicyError, RuntimeName, trusted};

/// The environment variable with which tests name another file.
const OTHER_FILE: &str = "BULKHEAD_CONFIG";
/// The user who decides.
const ROOT: u32 = 0;

/// A policy and where it is from.
#[derive(Debug)]
pub struct InForce {
    /// The policy.
    pub policy: Policy,
    /// The file that was read, or is not there.
    pub file: PathBuf,
    /// The file is there.
    pub found: bool,
    origins: [Origin; KEYS.len()],
}

/// Where a value is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody has decided.
    Default,
    /// A line of the file, from 1.
    Line(usize),
    /// A variable of the environment.
    Variable(&'static str),
}

impl InForce {
    /// The policy for a runtime of this name.
    ///
    /// # Errors
    /// When the file cannot be trusted or read, and for every mistake in it.
    pub fn read(name: &RuntimeName) -> Result<Self, PolicyError> {
        let file = env::var_os(OTHER_FILE).map_or_else(|| trusted::FILE.into(), PathBuf::from);
        let text = trusted::read(&file, ROOT)?;
        Self::of(name, &file, text.as_deref(), |variable| env::var_os(variable))
    }

    /// The policy that a text and the environment make.
    pub(super) fn of(
        name: &RuntimeName,
        file: &Path,
        text: Option<&str>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, PolicyError> {
        let mut document = Document::read(file, text.unwrap_or_default())?;
        let (policy, origins) = (Policy::default(), [Origin::Default; KEYS.len()]);
        let mut made = Self { policy, file: file.to_owned(), found: text.is_some(), origins };
        made.take_over(&document.general);
        match document.runtimes.remove(name.as_str()) {
            Some(own) => made.take_over(&own),
            None if name.needs_section() => {
                let others = document.runtimes.into_keys().collect::<Vec<_>>().join(", ");
                let (file, name) = (made.file, name.as_str().to_owned());
                let others = match others.as_str() {
                    "" => others,
                    others => format!(" (it has those of {others})"),
                };
                return Err(PolicyError::NoSection { file, name, others });
            }
            None => {}
        }
        made.take_over_environment(variable)?;
        Ok(made)
    }

    /// Each key, its value as it is written in a file, and where that is from.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, String, Origin)> {
        let values = KEYS.iter().zip(self.origins);
        values.map(|(key, origin)| (key.name, (key.show)(&self.policy), origin))
    }

    fn take_over(&mut self, settings: &[Setting<'_>]) {
        for setting in settings {
            if setting.apply(&mut self.policy) {
                self.origins[setting.key] = Origin::Line(setting.line);
            }
        }
    }

    fn take_over_environment(
        &mut self,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<(), PolicyError> {
        for (key, origin) in KEYS.iter().zip(&mut self.origins) {
            let Some(name) = key.variable else { continue };
            let Some(value) = variable(name) else { continue };
            let value = value.to_string_lossy().into_owned();
            if (key.set)(&mut self.policy, Given::Text(&value)).is_none() {
                return Err(PolicyError::Variable { variable: name, value, right: key.right });
            }
            *origin = Origin::Variable(name);
        }
        Ok(())
    }
}
