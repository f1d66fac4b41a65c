//! A container with a terminal whose caller has redirected streams, beside runc: the terminal's
//! output goes to standard output, and its input comes from standard input.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, finish};

use crate::terminal::{own_terminal, with_terminal};

/// Prints the name and size of its terminal, and a line that it reads from it.
const ASK: &str = "busybox tty; busybox stty size; read line; echo \"got $line\"";

fn both() -> [Runtime; 2] {
    [Runtime::new().unwrap(), Runtime::runc().unwrap()]
}

/// The output lines of a command whose standard output is a pipe and whose other streams are a
/// terminal. They are sorted, because input may be echoed before the program has begun.
fn into_a_pipe(mut command: Command) -> Vec<String> {
    let (mut screen, slave) = own_terminal().unwrap();
    screen.resize(33, 77).unwrap();
    let stream = |slave: &OwnedFd| Stdio::from(slave.try_clone().unwrap());
    command.stdin(stream(&slave)).stdout(Stdio::piped()).stderr(stream(&slave));
    let child = command.spawn().unwrap();
    screen.type_in("word\r").unwrap();
    let output = finish(child).unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    lines(&String::from_utf8(output.stdout).unwrap())
}

fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<_> = text.split_inclusive('\n').map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Whether the output of [`ASK`] is complete.
fn is_whole(lines: &[String]) -> bool {
    ["33 77\n", "got word\n", "word\n"].iter().all(|line| lines.iter().any(|it| it == line))
}

#[test]
fn what_a_terminal_shows_goes_into_a_pipe() {
    let [ours, runc] = both();
    let shown = [&ours, &runc].map(|runtime| {
        let bundle = with_terminal(ASK).unwrap();
        into_a_pipe(runtime.run_command("piped", &bundle))
    });
    assert_eq!(shown[0], shown[1]);
    assert!(is_whole(&shown[0]), "{:?}", shown[0]);
    ours.assert_clean().unwrap();
}

#[test]
fn what_the_terminal_of_a_further_process_shows_goes_into_a_pipe() {
    let [ours, runc] = both();
    let shown = [&ours, &runc].map(|runtime| {
        let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        runtime.create("piped", &bundle).unwrap();
        runtime.ok(&["start", "piped"]).unwrap();
        let shown = into_a_pipe(runtime.command(&["exec", "-t", "piped", "/bin/sh", "-c", ASK]));
        runtime.ok(&["delete", "--force", "piped"]).unwrap();
        shown
    });
    assert_eq!(shown[0], shown[1]);
    assert!(is_whole(&shown[0]), "{:?}", shown[0]);
    ours.assert_clean().unwrap();
}

/// A command in a session of its own with all streams redirected, and optionally with a controlling
/// terminal.
fn redirected(command: &Command, terminal: Option<&OwnedFd>, directory: &Path) -> Command {
    let mut setsid = Command::new("setsid");
    if let Some(terminal) = terminal {
        setsid.arg("--ctty").stdin(terminal.try_clone().unwrap());
    }
    let script = "exec \"$@\" <in >out 2>err";
    setsid.args(["--wait", "sh", "-c", script, "sh"]).arg(command.get_program());
    setsid.args(command.get_args()).current_dir(directory);
    setsid
}

#[test]
fn the_controlling_terminal_is_asked_when_all_streams_are_redirected() {
    let [ours, runc] = both();
    let told = [&ours, &runc].map(|runtime| {
        let bundle = with_terminal(ASK).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let read = |name| fs::read_to_string(directory.path().join(name)).unwrap();
        let (screen, slave) = own_terminal().unwrap();
        screen.resize(33, 77).unwrap();
        fs::write(directory.path().join("in"), "word\n").unwrap();
        let command = runtime.run_command("far", &bundle);
        let mut command = redirected(&command, Some(&slave), directory.path());
        let status = finish(command.spawn().unwrap()).unwrap().status;
        (status.code(), lines(&read("out")), read("err"))
    });
    assert_eq!(told[0], told[1]);
    assert_eq!(told[0].0, Some(0));
    assert!(is_whole(&told[0].1), "{:?}", told[0]);
    ours.assert_clean().unwrap();
}

#[test]
fn without_any_terminal_there_is_none_to_be_had() {
    let [ours, runc] = both();
    for runtime in [&ours, &runc] {
        let bundle = with_terminal("true").unwrap();
        let directory = tempfile::tempdir().unwrap();
        File::create(directory.path().join("in")).unwrap();
        let command = runtime.run_command("none", &bundle);
        let mut command = redirected(&command, None, directory.path());
        let status = finish(command.stdin(Stdio::null()).spawn().unwrap()).unwrap().status;
        let errors = fs::read_to_string(directory.path().join("err")).unwrap();
        assert_eq!(status.code(), Some(1), "{errors}");
        assert!(errors.contains("open /dev/tty: "), "{errors}");
    }
    ours.assert_clean().unwrap();
}
