//! Reads specifications that runc accepts and `oci_spec`'s types do not: with missing fields and
//! unknown capabilities.

use oci_spec::runtime::{Capability, Process, Spec};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

const CAPABILITY_SETS: [&str; 5] = ["bounding", "effective", "permitted", "inheritable", "ambient"];

/// The names of unknown capabilities, each once.
pub(super) type Unknown = Vec<String>;

/// Reads a specification; returns the unknown capabilities, which are removed from it.
///
/// # Errors
/// When it is not a specification; with the line and column if they are known.
pub(super) fn spec(json: &[u8]) -> Result<(Spec, Unknown), serde_json::Error> {
    let mut unknown = Unknown::new();
    let mend = |spec: &mut Value| {
        if let Some(process) = spec.get_mut("process").and_then(Value::as_object_mut) {
            unknown = mend_process(process);
        }
        if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
            mend_seccomp(linux);
        }
    };
    Ok((read(json, mend)?, unknown))
}

/// Reads a process by itself.
///
/// # Errors
/// As [`spec`].
pub(super) fn process(json: &[u8]) -> Result<(Process, Unknown), serde_json::Error> {
    let mut unknown = Unknown::new();
    let mend = |process: &mut Value| {
        if let Some(process) = process.as_object_mut() {
            unknown = mend_process(process);
        }
    };
    Ok((read(json, mend)?, unknown))
}

fn read<T>(json: &[u8], mend: impl FnOnce(&mut Value)) -> Result<T, serde_json::Error>
where
    T: DeserializeOwned,
{
    let mut value: Value = serde_json::from_slice(json)?;
    mend(&mut value);
    serde_json::from_value(value).map_err(|error| {
        // Parses the original text, so that the error has a line and a column.
        serde_json::from_slice::<T>(json).err().unwrap_or(error)
    })
}

/// Gives missing fields the zero values that Go would give them, and removes unknown capabilities.
fn mend_process(process: &mut Map<String, Value>) -> Unknown {
    fill(process, "user", json!({}));
    fill(process, "cwd", json!(""));
    let mut unknown = Unknown::new();
    for set in CAPABILITY_SETS {
        let sets = process.get_mut("capabilities");
        let Some(set) = sets.and_then(|sets| sets.get_mut(set)).and_then(Value::as_array_mut)
        else {
            continue;
        };
        set.retain(|name| {
            let known = capability(name).is_some();
            if let (false, Some(name)) = (known, name.as_str())
                && !unknown.iter().any(|other| other == name)
            {
                unknown.push(name.to_owned());
            }
            // Keeps a value that is not a string: parsing reports it as an error.
            known || !name.is_string()
        });
    }
    unknown
}

/// The capability of a name in runc's spelling; the type alone would accept other spellings too.
pub(super) fn capability(name: &Value) -> Option<Capability> {
    let capability = serde_json::from_value::<Capability>(name.clone()).ok()?;
    (json!(capability) == *name).then_some(capability)
}

/// Removes an empty seccomp filter, and sets a missing index or value of an argument to 0.
fn mend_seccomp(linux: &mut Map<String, Value>) {
    let Some(seccomp) = linux.get_mut("seccomp").and_then(Value::as_object_mut) else { return };
    let nothing = [Value::Null, json!(""), json!([])];
    let says = |name| seccomp.get(name).is_some_and(|value| !nothing.contains(value));
    if !says("defaultAction") && !says("syscalls") {
        linux.remove("seccomp");
        return;
    }
    let rules = seccomp.get_mut("syscalls").and_then(Value::as_array_mut);
    let arguments = rules.into_iter().flatten().filter_map(|rule| rule.get_mut("args"));
    for argument in arguments.filter_map(Value::as_array_mut).flatten() {
        let Some(argument) = argument.as_object_mut() else { continue };
        fill(argument, "index", json!(0));
        fill(argument, "value", json!(0));
    }
}

fn fill(object: &mut Map<String, Value>, name: &str, empty: Value) {
    let value = object.entry(name).or_insert(Value::Null);
    if value.is_null() {
        *value = empty;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(json: &Value) -> Vec<u8> {
        serde_json::to_vec(json).unwrap()
    }

    #[test]
    fn a_process_without_a_user_is_roots() {
        for user in [None, Some(Value::Null), Some(json!({})), Some(json!({"uid": 0}))] {
            let mut process = json!({"args": ["x"], "cwd": "/"});
            if let Some(user) = user {
                process["user"] = user;
            }
            let (process, _) = super::process(&bytes(&process)).unwrap();
            assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        }
        let spec = json!({"ociVersion": "1.0.2", "process": {"args": ["x"], "cwd": "/"}});
        assert_eq!(
            super::spec(&bytes(&spec)).unwrap().0.process().as_ref().unwrap().user().uid(),
            0
        );
    }

    #[test]
    fn capabilities_that_nobody_knows_are_left_out_and_named() {
        let process = json!({"args": ["x"], "cwd": "/", "capabilities": {
            "bounding": ["CAP_KILL", "CAP_X"], "effective": ["CAP_X", "kill", "CAP_BPF"],
        }});
        let (process, unknown) = super::process(&bytes(&process)).unwrap();
        assert_eq!(unknown, ["CAP_X", "kill"]);
        let sets = serde_json::to_value(process.capabilities()).unwrap();
        assert_eq!(sets, json!({"bounding": ["CAP_KILL"], "effective": ["CAP_BPF"]}));
    }

    #[test]
    fn a_filter_that_says_nothing_is_none() {
        let seccomp = |seccomp: Value| {
            let spec = json!({"ociVersion": "1.0.2", "linux": {"seccomp": seccomp}});
            let (spec, _) = super::spec(&bytes(&spec))?;
            Ok::<_, serde_json::Error>(
                serde_json::to_value(spec.linux().as_ref().unwrap()).unwrap(),
            )
        };
        for nothing in [json!({}), json!({"defaultAction": "", "syscalls": []})] {
            assert_eq!(seccomp(nothing).unwrap()["seccomp"], Value::Null);
        }
        let rules = json!([{"names": ["x"], "action": "SCMP_ACT_ALLOW", "args": [
            {"op": "SCMP_CMP_EQ"}, {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"},
        ]}]);
        let filter = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules});
        let arguments = &seccomp(filter).unwrap()["seccomp"]["syscalls"][0]["args"];
        assert_eq!(arguments[0], json!({"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}));
        assert_eq!(arguments[1], json!({"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}));
    }

    #[test]
    fn what_is_none_is_told_with_its_place() {
        let error = spec(b"{\"ociVersion\": \"1.0.2\",\n \"process\": 5}").unwrap_err();
        assert_eq!((error.line(), error.column()), (2, 13));
        let error = spec(b"{\n").unwrap_err();
        assert_eq!(error.line(), 2);
        let error =
            process(b"{\"args\": [\"x\"], \"capabilities\": {\"bounding\": [5]}}").unwrap_err();
        assert!(error.line() == 1, "{error}");
    }
}
