//! Which devices a container may use. As in runc, the rules are read as in cgroup v1: they are
//! exceptions from "all" or "none", and later ones change earlier ones.
//!
//! libcontainer searches the list from its end for a rule that matches a whole access. So two rules
//! for a device of which one allows reading and the other writing would not allow both at once, and
//! a rule that denies writing would still allow reading and writing at once. The list that
//! libcontainer gets from here means the same in both readings.

use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// Any number, in a rule.
const ANY: i64 = -1;
/// What can be done with a device.
const ACCESSES: [char; 3] = ['r', 'w', 'm'];

/// A rule that runc refuses too.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum DeviceRuleError {
    #[error("linux.resources.devices: device access at {0} field cannot be empty")]
    NoAccess(usize),
    #[error("linux.resources.devices: rule {0} is for type {1}, which cgroups do not know")]
    Type(usize, char),
    #[error(
        "linux.resources.devices: rule {number} cannot punch a hole into the one for {wider}, which \
         has {access} too; leave that out, or name its devices one by one"
    )]
    Hole { number: usize, wider: String, access: String },
}

/// The devices that a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Devices {
    block: bool,
    major: i64,
    minor: i64,
}

/// All devices or none, and the exceptions.
#[derive(Debug, Default)]
struct Rules {
    all: bool,
    exceptions: BTreeMap<Devices, String>,
}

/// Makes a list with the same meaning, in which no rule changes another.
///
/// # Errors
/// See [`DeviceRuleError`].
pub(crate) fn settle(
    rules: &[LinuxDeviceCgroup],
) -> Result<Vec<LinuxDeviceCgroup>, DeviceRuleError> {
    let mut settled = Rules::default();
    for (number, rule) in rules.iter().enumerate() {
        settled.apply(number, rule)?;
    }
    Ok(settled.list())
}

impl Rules {
    fn apply(&mut self, number: usize, rule: &LinuxDeviceCgroup) -> Result<(), DeviceRuleError> {
        let access = rule.access().as_deref().unwrap_or_default();
        if access.is_empty() {
            return Err(DeviceRuleError::NoAccess(number));
        }
        let block = match rule.typ().unwrap_or_default() {
            LinuxDeviceType::A => {
                *self = Self { all: rule.allow(), ..Self::default() };
                return Ok(());
            }
            LinuxDeviceType::B => true,
            LinuxDeviceType::C => false,
            LinuxDeviceType::U => return Err(DeviceRuleError::Type(number, 'u')),
            LinuxDeviceType::P => return Err(DeviceRuleError::Type(number, 'p')),
        };
        let (major, minor) = (rule.major().unwrap_or(ANY), rule.minor().unwrap_or(ANY));
        let devices = Devices { block, major, minor };
        // Other letters are ignored.
        let asked = |it: &char| access.contains(*it);
        let had = self.exceptions.remove(&devices).unwrap_or_default();
        let access: String = if rule.allow() == self.all {
            self.check_holes(number, devices, asked)?;
            had.chars().filter(|it| !asked(it)).collect()
        } else {
            ACCESSES.iter().filter(|it| asked(it) || had.contains(**it)).collect()
        };
        // An exception for no access at all is dropped.
        if !access.is_empty() {
            self.exceptions.insert(devices, access);
        }
        Ok(())
    }

    /// Fails if an exception for a wider set of devices has some of the access that is taken away.
    fn check_holes(
        &self,
        number: usize,
        of: Devices,
        asked: impl Fn(&char) -> bool,
    ) -> Result<(), DeviceRuleError> {
        let wider = [
            Devices { major: ANY, ..of },
            Devices { minor: ANY, ..of },
            Devices { major: ANY, minor: ANY, ..of },
        ];
        for wider in wider.into_iter().filter(|wider| *wider != of) {
            let access = self.exceptions.get(&wider).map_or("", String::as_str);
            if access.chars().any(|it| asked(&it)) {
                let (wider, access) = (wider.to_string(), access.to_owned());
                return Err(DeviceRuleError::Hole { number, wider, access });
            }
        }
        Ok(())
    }

    fn list(self) -> Vec<LinuxDeviceCgroup> {
        let rule = |allow: bool, typ: LinuxDeviceType, access: String| {
            let mut rule = LinuxDeviceCgroup::default();
            rule.set_allow(allow).set_typ(Some(typ)).set_access(Some(access));
            rule
        };
        let mut list = vec![rule(self.all, LinuxDeviceType::A, ACCESSES.iter().collect())];
        for (Devices { block, major, minor }, access) in self.exceptions {
            let typ = if block { LinuxDeviceType::B } else { LinuxDeviceType::C };
            let mut exception = rule(!self.all, typ, access);
            exception.set_major(Some(major)).set_minor(Some(minor));
            list.push(exception);
        }
        list
    }
}

impl std::fmt::Display for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let number = |number: i64| match number {
            ANY => "*".to_owned(),
            number => number.to_string(),
        };
        let kind = if self.block { 'b' } else { 'c' };
        write!(f, "{kind} {}:{}", number(self.major), number(self.minor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn settled(rules: Value) -> Result<Vec<String>, DeviceRuleError> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
        let line = |rule: &LinuxDeviceCgroup| {
            let kind = match rule.typ().unwrap() {
                LinuxDeviceType::A => "a",
                LinuxDeviceType::B => "b",
                _ => "c",
            };
            let number = |number: Option<i64>| number.map_or(String::new(), |it| format!(" {it}"));
            let access = rule.access().as_deref().unwrap();
            let (major, minor) = (number(rule.major()), number(rule.minor()));
            format!("{} {kind}{major}{minor} {access}", rule.allow())
        };
        settle(&rules).map(|rules| rules.iter().map(line).collect())
    }

    fn c(allow: bool, minor: i64, access: &str) -> Value {
        json!({"allow": allow, "type": "c", "major": 1, "minor": minor, "access": access})
    }

    fn all(allow: bool) -> Value {
        json!({"allow": allow, "access": "rwm"})
    }

    #[test]
    fn what_is_allowed_adds_up_and_what_is_denied_is_taken_away() {
        let none = "false a rwm";
        assert_eq!(settled(json!([])).unwrap(), [none]);
        let added = settled(json!([all(false), c(true, 5, "r"), c(true, 5, "wa")])).unwrap();
        assert_eq!(added, [none, "true c 1 5 rw"]);
        let taken =
            settled(json!([c(true, 5, "rwm"), c(false, 5, "w"), c(false, 6, "r")])).unwrap();
        assert_eq!(taken, [none, "true c 1 5 rm"]);
        assert_eq!(settled(json!([c(true, 5, "rw"), c(false, 5, "rwm")])).unwrap(), [none]);
        assert_eq!(settled(json!([c(true, 5, "a")])).unwrap(), [none]);
    }

    #[test]
    fn all_devices_take_the_exceptions_back() {
        let everything = "true a rwm";
        let denied = settled(json!([c(true, 5, "r"), all(true), c(false, 5, "w")])).unwrap();
        assert_eq!(denied, [everything, "false c 1 5 w"]);
        let back = settled(json!([all(true), c(false, 5, "rw"), c(true, 5, "r")])).unwrap();
        assert_eq!(back, [everything, "false c 1 5 w"]);
    }

    #[test]
    fn what_runc_refuses_is_refused() {
        assert_eq!(settled(json!([{"allow": true}])), Err(DeviceRuleError::NoAccess(0)));
        let fifo = json!([all(false), {"allow": true, "type": "p", "access": "r"}]);
        assert_eq!(settled(fifo), Err(DeviceRuleError::Type(1, 'p')));
        let error = settled(json!([c(true, -1, "rw"), c(false, 5, "w")])).unwrap_err();
        let words = "rule 1 cannot punch a hole into the one for c 1:*, which has rw too";
        assert!(error.to_string().contains(words), "{error}");
        assert!(settled(json!([c(true, -1, "r"), c(false, 5, "w")])).is_ok());
    }
}
