//! Translates command lines as Go's flag package reads them into what clap reads. Callers of runc
//! write `-root DIR`, `--systemd-cgroup=true`, `--pid-file ""` for no file, an option twice, and
//! after a container's name a command with options of its own.
//!
//! Options of a verb are also understood after its arguments, which runc does not do.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{Arg, ArgAction, Command};

/// Where options end.
const END: &str = "--";
/// The verb whose arguments are verbs.
const HELP: &str = "help";

/// A command line as clap reads it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// The words after the program's name.
    pub(super) words: Vec<OsString>,
    /// The verb, if there is one.
    pub(super) verb: Option<String>,
}

/// A command line that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Misuse {
    /// The verb whose help is wanted; none for that of the whole program.
    pub(super) verb: Option<String>,
    /// What is wrong, in runc's words.
    pub(super) words: String,
}

/// Reads a command line of this command, which must have been built.
pub(super) fn read(
    command: &Command,
    words: impl IntoIterator<Item = OsString>,
) -> Result<Line, Misuse> {
    let mut reader = Reader { left: words.into_iter().collect(), read: Vec::new() };
    // So that the next one is the last of the list.
    reader.left.reverse();
    let verb = reader.read_global(command)?;
    if let Some(name) = &verb
        && name != HELP
        && let Some(command) = command.find_subcommand(name)
    {
        reader.read_verb(command)?;
    }
    reader.read.extend(reader.left.into_iter().rev());
    Ok(Line { words: reader.read, verb })
}

struct Reader {
    /// Words that are to be read, the last one first.
    left: Vec<OsString>,
    read: Vec<OsString>,
}

impl Reader {
    /// Reads options before the verb; returns the verb.
    fn read_global(&mut self, command: &Command) -> Result<Option<String>, Misuse> {
        while let Some(word) = self.left.pop() {
            if word == END || !is_option(&word) {
                let verb = if word == END { self.left.pop() } else { Some(word) };
                self.read.extend(verb.clone());
                return Ok(verb.map(|verb| verb.to_string_lossy().into_owned()));
            }
            self.read_option(command, None, &word)?;
        }
        Ok(None)
    }

    /// Reads the words after a verb.
    fn read_verb(&mut self, command: &Command) -> Result<(), Misuse> {
        let name = command.get_name();
        let mut arguments = Vec::new();
        let takes_a_line = command.get_positionals().any(Arg::is_trailing_var_arg_set);
        while let Some(word) = self.left.pop() {
            let known = || option(command, &word).is_some_and(|option| option.arg.is_some());
            if word == END {
                break;
            } else if is_option(&word) && (arguments.is_empty() || known()) {
                self.read_option(command, Some(name), &word)?;
            } else {
                arguments.push(word);
                if takes_a_line {
                    break;
                }
            }
        }
        arguments.extend(self.left.drain(..).rev());
        if !self.read.iter().any(|word| word == "--help") {
            check_count(command, arguments.len())?;
        }
        if !arguments.is_empty() {
            self.read.push(END.into());
            self.read.extend(arguments);
        }
        Ok(())
    }

    fn read_option(
        &mut self,
        command: &Command,
        verb: Option<&str>,
        word: &OsStr,
    ) -> Result<(), Misuse> {
        let wrong = |words| Misuse { verb: verb.map(str::to_owned), words };
        let Some(Written { name, value, arg: Some(arg) }) = option(command, word) else {
            let name = word.to_string_lossy();
            let name = name.trim_start_matches('-').split('=').next().unwrap_or_default();
            return Err(wrong(format!("flag provided but not defined: -{name}")));
        };
        let long = arg.get_long().unwrap_or(name.as_str());
        if takes_value(arg) {
            let value = value.or_else(|| self.left.pop());
            let value = value.ok_or_else(|| wrong(format!("flag needs an argument: -{name}")))?;
            if !value.is_empty() {
                let mut whole = OsString::from(format!("--{long}="));
                whole.push(value);
                self.read.push(whole);
            }
            return Ok(());
        }
        match value.as_deref().map(switch) {
            None | Some(Some(true)) => self.read.push(format!("--{long}").into()),
            Some(Some(false)) => {}
            Some(None) => return Err(wrong(format!("invalid boolean value for -{name}"))),
        }
        Ok(())
    }
}

/// An option as it is written, and what it is.
struct Written<'a> {
    name: String,
    value: Option<OsString>,
    arg: Option<&'a Arg>,
}

fn is_option(word: &OsStr) -> bool {
    word.len() > 1 && word.as_bytes().starts_with(b"-")
}

fn option<'a>(command: &'a Command, word: &OsStr) -> Option<Written<'a>> {
    let bytes = word.as_bytes().strip_prefix(b"-")?;
    let bytes = bytes.strip_prefix(b"-").unwrap_or(bytes);
    let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) => {
            let (name, value) = bytes.split_at(at);
            (name, value.get(1..).map(|value| OsString::from_vec(value.to_owned())))
        }
        None => (bytes, None),
    };
    let name = String::from_utf8(name.to_owned()).ok()?;
    let is = |arg: &&Arg| {
        arg.get_long() == Some(&name)
            || arg.get_short().is_some_and(|short| name == short.to_string())
    };
    let arg = command.get_arguments().find(is);
    Some(Written { name, value, arg })
}

fn takes_value(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
}

/// A truth value as Go reads it.
fn switch(text: &OsStr) -> Option<bool> {
    match text.to_str()? {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Checks that a verb has as many arguments as it takes.
fn check_count(command: &Command, count: usize) -> Result<(), Misuse> {
    let required = command.get_positionals().filter(|arg| arg.is_required_set()).count();
    let open = command.get_positionals().any(Arg::is_trailing_var_arg_set);
    let most = if open { usize::MAX } else { command.get_positionals().count() };
    let how = match count {
        _ if required == most && count != most => format!("exactly {most}"),
        _ if count < required => format!("a minimum of {required}"),
        _ if count > most => format!("a maximum of {most}"),
        _ => return Ok(()),
    };
    let name = command.get_name();
    let words = format!("bulkhead: {name:?} requires {how} argument(s)");
    Err(Misuse { verb: Some(name.to_owned()), words })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args;

    fn read(line: &[&str]) -> Result<Vec<String>, String> {
        let mut command = args::command();
        command.build();
        let read = super::read(&command, line.iter().map(OsString::from));
        let words = read.map_err(|misuse| misuse.words)?.words.into_iter();
        Ok(words.map(|word| word.into_string().unwrap()).collect())
    }

    #[test]
    fn options_are_read_as_go_reads_them() {
        for (line, expected) in [
            (&["-root", "/r", "list", "-q"][..], &["--root=/r", "list", "--quiet"][..]),
            (&["--systemd-cgroup=true", "state", "a"], &["--systemd-cgroup", "state", "--", "a"]),
            (&["--debug=false", "--log", "", "list"], &["list"]),
            (&["kill", "--all", "a", "9"], &["kill", "--all", "--", "a", "9"]),
            (&["kill", "a", "-9"], &["kill", "--", "a", "-9"]),
            (&["delete", "a", "--force"], &["delete", "--force", "--", "a"]),
            (&["state", "--", "-x"], &["state", "--", "-x"]),
            (&["exec", "-t", "a", "ls", "-t"], &["exec", "--tty", "--", "a", "ls", "-t"]),
            (&["exec", "-e=A=-1", "a", "--", "b"], &["exec", "--env=A=-1", "--", "a", "--", "b"]),
            (&["ps", "a", "-aux"], &["ps", "--", "a", "-aux"]),
            (&["update", "--memory", "-1", "a"], &["update", "--memory=-1", "--", "a"]),
            (&["--root", "list"], &["--root=list"]),
            (&["kill", "-h"], &["kill", "--help"]),
            (&["help", "kill"], &["help", "kill"]),
            (&["nosuch", "-x", "y"], &["nosuch", "-x", "y"]),
        ] {
            assert_eq!(read(line).unwrap(), expected, "{line:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_as_by_runc() {
        for (line, words) in [
            (&["--nosuch", "list"][..], "flag provided but not defined: -nosuch"),
            (&["list", "-nosuch=1"], "flag provided but not defined: -nosuch"),
            (&["--root"], "flag needs an argument: -root"),
            (&["--debug=perhaps", "list"], "invalid boolean value for -debug"),
            (&["state"], "bulkhead: \"state\" requires exactly 1 argument(s)"),
            (&["list", "x"], "bulkhead: \"list\" requires exactly 0 argument(s)"),
            (&["kill"], "bulkhead: \"kill\" requires a minimum of 1 argument(s)"),
            (&["kill", "a", "9", "x"], "bulkhead: \"kill\" requires a maximum of 2 argument(s)"),
            (&["exec"], "bulkhead: \"exec\" requires a minimum of 1 argument(s)"),
        ] {
            assert_eq!(read(line).unwrap_err(), words, "{line:?}");
        }
    }
}
