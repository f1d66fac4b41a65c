//! Reads the text of a policy: sections with keys, and below `runtime` a section for each name with
//! the same sections in it. Everything is checked, also what is not for this runtime.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::keys::{Given, KEYS};
use super::{Policy, PolicyError};

/// The section with one for each name.
const RUNTIME: &str = "runtime";

/// A policy as it is written.
#[derive(Debug)]
pub(super) struct Document<'a> {
    /// For every runtime.
    pub(super) general: Vec<Setting<'a>>,
    /// For those of a name.
    pub(super) runtimes: BTreeMap<String, Vec<Setting<'a>>>,
}

/// The value of a key.
#[derive(Debug)]
pub(super) struct Setting<'a> {
    /// The index of the key in [`KEYS`].
    pub(super) key: usize,
    /// The line, from 1.
    pub(super) line: usize,
    value: DeValue<'a>,
}

impl Setting<'_> {
    /// Takes it over; false if the key takes no such value.
    pub(super) fn apply(&self, policy: &mut Policy) -> bool {
        (KEYS[self.key].set)(policy, given(&self.value)).is_some()
    }
}

impl<'a> Document<'a> {
    /// Reads the text of a file.
    pub(super) fn read(file: &Path, text: &'a str) -> Result<Self, PolicyError> {
        let reader = Reader { file, text };
        let root = DeTable::parse(text).map_err(|error| {
            let at = error.span().unwrap_or_default();
            reader.wrong(&at, format!("this is not TOML: {}", error.message()))
        })?;
        let mut document = Self { general: Vec::new(), runtimes: BTreeMap::new() };
        for (name, value) in root.into_inner() {
            if name.get_ref() == RUNTIME {
                for (name, value) in reader.table(&name, value)? {
                    let settings = reader.sections(reader.table(&name, value)?)?;
                    document.runtimes.insert(name.into_inner().into_owned(), settings);
                }
            } else {
                document.general.extend(reader.section(&name, value)?);
            }
        }
        Ok(document)
    }
}

/// What is read, for messages.
struct Reader<'a, 'b> {
    file: &'b Path,
    text: &'a str,
}

type Entry<'a> = (Spanned<DeString<'a>>, Spanned<DeValue<'a>>);

impl<'a> Reader<'a, '_> {
    fn sections(
        &self,
        table: impl IntoIterator<Item = Entry<'a>>,
    ) -> Result<Vec<Setting<'a>>, PolicyError> {
        let mut settings = Vec::new();
        for (name, value) in table {
            settings.extend(self.section(&name, value)?);
        }
        Ok(settings)
    }

    fn section(
        &self,
        name: &Spanned<DeString<'a>>,
        value: Spanned<DeValue<'a>>,
    ) -> Result<Vec<Setting<'a>>, PolicyError> {
        let section = name.get_ref().as_ref();
        let keys = || KEYS.iter().filter_map(|key| key.name.split_once('.'));
        let inside: Vec<_> = keys().filter(|(it, _)| *it == section).map(|(_, key)| key).collect();
        if inside.is_empty() {
            let mut known: Vec<_> = keys().map(|(section, _)| section).collect();
            known.dedup();
            let words = format!("unknown section {section:?}; there are {}", known.join(", "));
            return Err(self.wrong(&name.span(), format!("{words} and {RUNTIME}.NAME")));
        }
        let mut settings = Vec::new();
        for (name, value) in self.table(name, value)? {
            let whole = format!("{section}.{}", name.get_ref());
            let Some(key) = KEYS.iter().position(|key| key.name == whole) else {
                let (key, known) = (name.get_ref(), inside.join(", "));
                let words = format!("unknown key {key:?} in [{section}]; there are {known}");
                return Err(self.wrong(&name.span(), words));
            };
            let (at, line) = (value.span(), self.place(&name.span()).0);
            let setting = Setting { key, line, value: value.into_inner() };
            if !setting.apply(&mut Policy::default()) {
                let written = self.text.get(at.clone()).unwrap_or_default();
                let words = format!("{whole} cannot be {written}; write {}", KEYS[key].right);
                return Err(self.wrong(&at, words));
            }
            settings.push(setting);
        }
        Ok(settings)
    }

    /// The entries of a section.
    fn table(
        &self,
        name: &Spanned<DeString<'a>>,
        value: Spanned<DeValue<'a>>,
    ) -> Result<DeTable<'a>, PolicyError> {
        let at = value.span();
        match value.into_inner() {
            DeValue::Table(table) => Ok(table),
            _ => {
                let words = format!("{:?} is a section, not a key; write \"[…]\"", name.get_ref());
                Err(self.wrong(&at, words))
            }
        }
    }

    fn wrong(&self, at: &Range<usize>, what: String) -> PolicyError {
        let (line, column) = self.place(at);
        PolicyError::Wrong { file: self.file.to_owned(), line, column, what }
    }

    /// Line and column, from 1.
    fn place(&self, at: &Range<usize>) -> (usize, usize) {
        let before = self.text.get(..at.start).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |end| end + 1);
        (before.matches('\n').count() + 1, before.len() - line_start + 1)
    }
}

fn given<'a>(value: &'a DeValue<'_>) -> Given<'a> {
    match value {
        DeValue::String(text) => Given::Text(text),
        DeValue::Boolean(on) => Given::Switch(*on),
        DeValue::Integer(number) => {
            let number = u64::from_str_radix(number.as_str(), number.radix());
            number.map_or(Given::Other, Given::Number)
        }
        _ => Given::Other,
    }
}
