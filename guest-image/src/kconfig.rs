//! Kconfig fragments: compares the requested options with the result of `make olddefconfig`.
//!
//! Kconfig silently drops an option whose dependencies are missing; this module names each dropped
//! option. Spec: the kernel's kbuild/kconfig documentation (`CONFIG_X=value`, `# CONFIG_X is not
//! set`).

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};

/// Options by name, without `CONFIG_`; `None` is "is not set".
pub type Options = BTreeMap<String, Option<String>>;

/// Reads a fragment or a whole `.config`.
///
/// # Errors
/// When a line is neither an option, a comment nor blank, or an option is requested twice; names
/// it.
pub fn parse(text: &str) -> Result<Options> {
    let mut options = Options::new();
    for (index, line) in text.lines().enumerate() {
        let Some((name, value)) = parse_line(line.trim_end()) else {
            let blank = line.trim().is_empty() || line.starts_with('#');
            ensure!(blank, "line {} is no option: {line}", index + 1);
            continue;
        };
        if options.insert(name.to_owned(), value.map(str::to_owned)).is_some() {
            bail!("line {} asks for CONFIG_{name} a second time", index + 1);
        }
    }
    Ok(options)
}

fn parse_line(line: &str) -> Option<(&str, Option<&str>)> {
    if let Some(off) = line.strip_prefix("# CONFIG_") {
        return Some((off.strip_suffix(" is not set")?, None));
    }
    let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
    Some((name, (value != "n").then_some(value)))
}

/// Returns a message for each requested option that differs in the final configuration.
#[must_use]
pub fn unmet(requested: &Options, granted: &Options) -> Vec<String> {
    let mut messages = Vec::new();
    for (name, wanted) in requested {
        let got = granted.get(name).and_then(Option::as_deref);
        let shown = got.unwrap_or("not set");
        match wanted.as_deref() {
            Some(value) if got != Some(value) => {
                messages.push(format!("CONFIG_{name}: asked for {value}, got {shown}"));
            }
            None if got.is_some() => {
                messages.push(format!("CONFIG_{name}: asked for not set, got {shown}"));
            }
            _ => {}
        }
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granted_requests_are_silent() {
        let fragment =
            parse("# why\nCONFIG_A=y\n\n# CONFIG_B is not set\nCONFIG_C=\"x=y\"\n").unwrap();
        let config = parse("CONFIG_A=y\nCONFIG_C=\"x=y\"\nCONFIG_D=y\n").unwrap();
        assert!(unmet(&fragment, &config).is_empty());
    }

    #[test]
    fn every_dropped_or_forced_option_is_named() {
        let fragment = parse("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_N=1\n").unwrap();
        let config = parse("# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_N=2\n").unwrap();
        let messages = unmet(&fragment, &config);
        assert_eq!(
            messages,
            [
                "CONFIG_A: asked for y, got not set",
                "CONFIG_B: asked for not set, got y",
                "CONFIG_N: asked for 1, got 2"
            ]
        );
    }

    #[test]
    fn repeated_option_and_stray_text_are_refused() {
        assert!(parse("CONFIG_A=y\nCONFIG_A=n\n").is_err());
        assert!(parse("KVM=y\n").is_err());
    }

    #[test]
    fn fragments_of_the_repository_parse() {
        parse(crate::kernel::guest().fragment).unwrap();
        parse(include_str!("../../tests/host/x86_64.config")).unwrap();
    }
}
