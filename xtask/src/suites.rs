//! The list of suites with the special needs of each, and the choice of the test programs to run.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cargo::{self, Artifact};
use crate::week_image::{self, Image};

/// The package whose test programs are suites: they need KVM and root.
pub(crate) const PACKAGE: &str = "bulkhead-tests";

/// A suite, which runs in a test host of its own.
#[derive(Debug)]
pub(crate) struct Suite {
    /// Its target in [`PACKAGE`].
    pub(crate) name: &'static str,
    /// Further options of its test host.
    pub(crate) host: &'static [&'static str],
    /// Whether its long tests use the image of `cargo xtask debian`.
    pub(crate) debian: bool,
    /// Whether its own name selects all of its tests, and not only what every run has time for.
    pub(crate) whole: bool,
}

const PLAIN: Suite = Suite { name: "", host: &[], debian: false, whole: false };

/// The suite that uses the images of [`week_image`].
const WEEK: &str = "week";
/// All of it takes longer than one test host of any other suite.
const ALL_WEEK: [&str; 2] = ["--timeout", "14400"];

/// The suffix of a suite's name that selects its ignored tests, which take too long for every run.
const LONG: &str = "_long";

/// All suites in the order in which they start: the longest first, so that it does not run alone at
/// the end.
const ALL: [Suite; 8] = [
    Suite { name: "oci", ..PLAIN },
    Suite { name: "callers", debian: true, ..PLAIN },
    Suite { name: WEEK, host: &ALL_WEEK, whole: true, ..PLAIN },
    Suite { name: "network", ..PLAIN },
    Suite { name: "cgroup_v1", host: &["--cgroup-v1"], ..PLAIN },
    Suite { name: "systemd", host: &["--systemd"], ..PLAIN },
    Suite { name: "vm", ..PLAIN },
    Suite { name: "processors", host: &["--cpus", "2"], ..PLAIN },
];

/// Which tests of a test program run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those that are not ignored.
    Usual,
    /// Only the ignored ones.
    Ignored,
    All,
}

impl Which {
    /// The option of libtest.
    pub(crate) fn option(self) -> Option<&'static str> {
        match self {
            Self::Usual => None,
            Self::Ignored => Some("--ignored"),
            Self::All => Some("--include-ignored"),
        }
    }
}

/// What is to run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wanted<'a> {
    Everything,
    /// A suite, or a package for its unit tests. `words` are the arguments of its test program:
    /// names of tests or parts of them, and options of libtest.
    One {
        name: &'a str,
        long: bool,
        words: &'a [String],
    },
}

impl<'a> Wanted<'a> {
    /// Reads the arguments of `cargo xtask test`.
    pub(crate) fn parse(arguments: &'a [String]) -> Result<Self> {
        match arguments {
            [] => Ok(Self::Everything),
            [option, name, words @ ..] if option == "--suite" => {
                // Only a suite has this suffix; any other name is kept whole, so that the error
                // shows it.
                let suite = name.strip_suffix(LONG).filter(|name| suite(name).is_some());
                Ok(Self::One { name: suite.unwrap_or(name), long: suite.is_some(), words })
            }
            _ => bail!("usage: cargo xtask test [--suite NAME [TEST…]]"),
        }
    }

    /// Further arguments of the test programs.
    pub(crate) fn words(&self) -> &'a [String] {
        match self {
            Self::Everything => &[],
            Self::One { words, .. } => words,
        }
    }

    /// Which tests of the suites are wanted.
    pub(crate) fn which(&self) -> Which {
        match self {
            Self::One { long: true, .. } => Which::Ignored,
            Self::One { name, .. } if suite(name).is_some_and(|suite| suite.whole) => Which::All,
            Self::One { .. } | Self::Everything => Which::Usual,
        }
    }

    /// Whether a suite is to run.
    pub(crate) fn has_suites(&self) -> bool {
        match self {
            Self::Everything => true,
            Self::One { name, .. } => suite(name).is_some(),
        }
    }

    /// Whether tests are to run that need the Debian image.
    pub(crate) fn needs_debian(&self) -> bool {
        match self {
            Self::One { name, long: true, .. } => suite(name).is_some_and(|suite| suite.debian),
            Self::One { .. } | Self::Everything => false,
        }
    }

    /// The images that tests of the suite `week` need.
    pub(crate) fn week_images(&self) -> &'static [Image] {
        match self {
            Self::Everything => &week_image::ALL[..1],
            Self::One { name, .. } if *name == WEEK => &week_image::ALL,
            Self::One { .. } => &[],
        }
    }

    /// Builds only the test programs that are wanted; returns the suites, in the order in which
    /// they start, and the programs of the other packages.
    pub(crate) fn build(&self) -> Result<(Vec<Artifact>, Vec<Artifact>)> {
        let selection = match self {
            Self::Everything => vec!["--workspace"],
            // With `--workspace`, features are unified as when everything is built.
            Self::One { name, .. } if suite(name).is_some() => vec!["--workspace", "--test", name],
            Self::One { name, .. } => {
                let metadata = ["metadata", "--no-deps", "--format-version", "1"];
                let metadata = cargo::output(cargo::cargo().args(metadata))?;
                check(name, &serde_json::from_str(&metadata).context("cargo metadata")?)?;
                vec!["-p", name]
            }
        };
        let mut artifacts = cargo::build(&[&["test", "--no-run"], &selection[..]].concat())?;
        artifacts.retain(|artifact| artifact.is_test);
        let (mut suites, others): (Vec<_>, Vec<_>) =
            artifacts.into_iter().partition(|artifact| artifact.package == PACKAGE);
        suites.sort_by_key(|suite| ALL.iter().position(|known| known.name == suite.target));
        Ok((suites, others))
    }
}

/// The suite that a test program is.
pub(crate) fn of(artifact: &Artifact) -> Option<&'static Suite> {
    (artifact.package == PACKAGE).then(|| suite(&artifact.target)).flatten()
}

fn suite(name: &str) -> Option<&'static Suite> {
    ALL.iter().find(|suite| suite.name == name)
}

/// Refuses a name that is not a package with unit tests.
fn check(name: &str, metadata: &Value) -> Result<()> {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let packages: Vec<&str> = packages
        .filter_map(|package| package["name"].as_str())
        .filter(|package| *package != PACKAGE)
        .collect();
    if !packages.contains(&name) {
        bail!(
            "no suite {name}: there are {}, each with {LONG} behind it for its tests that take long, and \
             for the unit tests of a package its name: {}",
            ALL.map(|suite| suite.name).join(", "),
            packages.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn unknown_suite_is_refused_and_the_known_ones_are_named() {
        let metadata = json!({ "packages": [{ "name": PACKAGE }, { "name": "bulkhead-vmm" }] });
        check("bulkhead-vmm", &metadata).unwrap();
        for name in ["oic", PACKAGE] {
            let error = check(name, &metadata).unwrap_err().to_string();
            assert!(
                error.contains(&format!("no suite {name}: there are oci, callers, ")),
                "{error}"
            );
            assert!(error.ends_with("its name: bulkhead-vmm"), "{error}");
        }
    }

    #[test]
    fn words_after_the_suite_are_the_test_programs() {
        let words: Vec<String> = ["--suite", "oci", "kill::", "--exact"].map(str::to_owned).into();
        let wanted = Wanted::parse(&words).unwrap();
        assert_eq!(wanted, Wanted::One { name: "oci", long: false, words: &words[2..] });
        assert!(wanted.has_suites() && !wanted.needs_debian());
        assert_eq!(Wanted::parse(&[]).unwrap(), Wanted::Everything);
        assert!(Wanted::parse(&words[1..]).is_err());
        assert!(Wanted::parse(&words[..1]).is_err());
    }

    /// A suite that the table lacks would silently run in the plain host.
    #[test]
    fn the_table_has_the_suites_that_there_are() {
        let manifest = fs::read_to_string(cargo::root().join("tests/Cargo.toml")).unwrap();
        let targets = manifest.split("[[test]]\nname = \"").skip(1);
        let mut targets: Vec<&str> = targets.filter_map(|rest| rest.split('"').next()).collect();
        let mut table: Vec<&str> = ALL.iter().map(|suite| suite.name).collect();
        targets.sort_unstable();
        table.sort_unstable();
        assert_eq!(table, targets);
    }

    #[test]
    fn a_suite_has_a_second_name_for_what_takes_long() {
        let words: Vec<String> = ["--suite", "callers_long"].map(str::to_owned).into();
        let wanted = Wanted::parse(&words).unwrap();
        assert_eq!(wanted, Wanted::One { name: "callers", long: true, words: &[] });
        assert!(wanted.which() == Which::Ignored && wanted.needs_debian());
        let words: Vec<String> = ["--suite", "bulkhead_long"].map(str::to_owned).into();
        let package = Wanted::parse(&words).unwrap();
        assert_eq!(package, Wanted::One { name: "bulkhead_long", long: false, words: &[] });
        assert!(!Wanted::Everything.needs_debian());
        assert_eq!(Wanted::Everything.which(), Which::Usual);
    }

    #[test]
    fn the_week_is_whole_under_its_name_and_small_among_all() {
        let words: Vec<String> = ["--suite", WEEK].map(str::to_owned).into();
        let wanted = Wanted::parse(&words).unwrap();
        assert_eq!(wanted.which(), Which::All);
        assert_eq!(wanted.week_images().len(), week_image::ALL.len());
        assert_eq!(Wanted::Everything.week_images().len(), 1);
    }
}
