//! `bulkhead config`: the policy that is in force for this runtime, as a file that could be the
//! host's, and where each value is from.

use std::fmt::{self, Write as _};
use std::io::Write;

use crate::policy::{InForce, Origin, RuntimeName};

pub(super) fn config(name: &RuntimeName, policy: &InForce) -> anyhow::Result<()> {
    let text = text(name, policy)?;
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

fn text(name: &RuntimeName, policy: &InForce) -> Result<String, fmt::Error> {
    let missing = if policy.found { "" } else { ", which does not exist" };
    let file = policy.file.display();
    let mut text = format!("# The policy for {}, from {file}{missing}.\n", name.as_str());
    let mut section = "";
    for (key, value, origin) in policy.values() {
        let (of, key) = key.split_once('.').unwrap_or_default();
        if of != section {
            write!(text, "\n[{of}]\n")?;
            section = of;
        }
        let line = format!("{key} = {value}");
        let from = match origin {
            Origin::Default => "default".to_owned(),
            Origin::Line(line) => format!("{file}:{line}"),
            Origin::Variable(variable) => format!("environment, {variable}"),
        };
        writeln!(text, "{line:<52} # {from}")?;
    }
    Ok(text)
}
