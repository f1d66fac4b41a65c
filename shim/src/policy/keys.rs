//! The keys of a policy: for each its name, what a right value looks like, and where the value goes.
//! The parser, `bulkhead config` and the table in `docs/OPERATIONS.md` are all made or checked by
//! this list.

use std::path::Path;
use std::time::Duration;

use bulkhead_vmm::config::VCPUS_MAX;

use super::{HostSocketRule, Policy};
use crate::logging::LogLevel;

/// One key.
pub(super) struct Key {
    /// Its section and its name in there.
    pub(super) name: &'static str,
    /// What a right value looks like; follows "write".
    pub(super) right: &'static str,
    /// The environment variable with which tests set it.
    pub(super) variable: Option<&'static str>,
    /// Takes a value over; `None` if it is not right.
    pub(super) set: fn(&mut Policy, Given<'_>) -> Option<()>,
    /// Its value in a policy, as it is written in the file.
    pub(super) show: fn(&Policy) -> String,
}

/// A value as it is given. A variable of the environment gives a text.
#[derive(Clone, Copy, Debug)]
pub(super) enum Given<'a> {
    Text(&'a str),
    Number(u64),
    Switch(bool),
    /// What no key takes.
    Other,
}

/// Memory that a guest cannot do with less than, in MiB.
const MEMORY_LEAST_MIB: u32 = 64;
/// What stands for no limit but the host's memory.
const HOST: &str = "host";

pub(super) const KEYS: [Key; 11] = [
    Key {
        name: "size.memory_start",
        right: "a size such as \"128MiB\", at least \"64MiB\"",
        variable: None,
        set: |policy, given| {
            mib(given, MEMORY_LEAST_MIB).map(|mib| policy.size.memory_start_mib = mib)
        },
        show: |policy| size(policy.size.memory_start_mib),
    },
    Key {
        name: "size.memory_max",
        right: "a size such as \"2GiB\", at least \"64MiB\", or \"host\"",
        variable: None,
        set: |policy, given| {
            let max = match given {
                Given::Text(HOST) => None,
                given => Some(mib(given, MEMORY_LEAST_MIB)?),
            };
            policy.size.memory_max_mib = max;
            Some(())
        },
        show: |policy| policy.size.memory_max_mib.map_or_else(|| text(HOST), size),
    },
    Key {
        name: "size.processors_max",
        right: "a number from 1 to 64",
        variable: None,
        set: |policy, given| {
            let number = u8::try_from(number(given)?).ok()?;
            (1..=VCPUS_MAX).contains(&number).then(|| policy.size.processors_max = number)
        },
        show: |policy| policy.size.processors_max.to_string(),
    },
    Key {
        name: "network.vhost",
        right: "true or false",
        variable: Some("BULKHEAD_VHOST_NET"),
        set: |policy, given| switch(given).map(|on| policy.network.vhost = on),
        show: |policy| policy.network.vhost.to_string(),
    },
    Key {
        name: "sockets.host",
        right: "\"allow\" or \"refuse\"",
        variable: None,
        set: |policy, given| {
            policy.sockets.host = match given {
                Given::Text("allow") => HostSocketRule::Allow,
                Given::Text("refuse") => HostSocketRule::Refuse,
                _ => return None,
            };
            Some(())
        },
        show: |policy| match policy.sockets.host {
            HostSocketRule::Allow => text("allow"),
            HostSocketRule::Refuse => text("refuse"),
        },
    },
    Key {
        name: "guest.kernel",
        right: "the path of a file",
        variable: Some("BULKHEAD_KERNEL"),
        set: |policy, given| path(given).map(|path| policy.guest.kernel = path.into()),
        show: |policy| text(&policy.guest.kernel.to_string_lossy()),
    },
    Key {
        name: "guest.modules",
        right: "the path of a directory",
        variable: Some("BULKHEAD_MODULES"),
        set: |policy, given| path(given).map(|path| policy.guest.modules = path.into()),
        show: |policy| text(&policy.guest.modules.to_string_lossy()),
    },
    Key {
        name: "guest.initramfs",
        right: "the path of a file",
        variable: Some("BULKHEAD_INITRAMFS"),
        set: |policy, given| path(given).map(|path| policy.guest.initramfs = path.into()),
        show: |policy| text(&policy.guest.initramfs.to_string_lossy()),
    },
    Key {
        name: "guest.boot_timeout",
        right: "a number of seconds from 1 to 3600",
        variable: Some("BULKHEAD_BOOT_TIMEOUT"),
        set: |policy, given| {
            let seconds = number(given).filter(|seconds| (1..=3600).contains(seconds))?;
            policy.guest.boot_timeout = Duration::from_secs(seconds);
            Some(())
        },
        show: |policy| policy.guest.boot_timeout.as_secs().to_string(),
    },
    Key {
        name: "log.level",
        right: "\"error\", \"warning\", \"info\" or \"debug\"",
        variable: None,
        set: |policy, given| {
            let Given::Text(name) = given else { return None };
            LogLevel::named(name).map(|level| policy.log.level = level)
        },
        show: |policy| text(policy.log.level.name()),
    },
    Key {
        name: "log.supervisor_max",
        right: "a size such as \"1MiB\"",
        variable: None,
        set: |policy, given| mib(given, 1).map(|mib| policy.log.supervisor_max_mib = mib),
        show: |policy| size(policy.log.supervisor_max_mib),
    },
];

/// A size in MiB.
fn mib(given: Given<'_>, least: u32) -> Option<u32> {
    let Given::Text(text) = given else { return None };
    let (number, unit) = match text.strip_suffix("GiB") {
        Some(number) => (number, 1024),
        None => (text.strip_suffix("MiB")?, 1),
    };
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let number: u32 = number.parse().ok().filter(|_| digits)?;
    number.checked_mul(unit).filter(|mib| *mib >= least)
}

fn number(given: Given<'_>) -> Option<u64> {
    match given {
        Given::Number(number) => Some(number),
        Given::Text(text) => text.parse().ok(),
        Given::Switch(_) | Given::Other => None,
    }
}

fn switch(given: Given<'_>) -> Option<bool> {
    match given {
        Given::Switch(on) => Some(on),
        Given::Text("0") => Some(false),
        Given::Text("1") => Some(true),
        Given::Text(_) | Given::Number(_) | Given::Other => None,
    }
}

fn path(given: Given<'_>) -> Option<&Path> {
    match given {
        Given::Text(text) if !text.is_empty() && !text.contains('\0') => Some(Path::new(text)),
        _ => None,
    }
}

fn size(mib: u32) -> String {
    if mib.is_multiple_of(1024) {
        text(&format!("{}GiB", mib / 1024))
    } else {
        text(&format!("{mib}MiB"))
    }
}

/// A string in TOML.
fn text(text: &str) -> String {
    let mut quoted = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if letter.is_control() => {
                quoted.extend(format!("\\u{:04x}", u32::from(letter)).chars());
            }
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}
