//! Passes descriptors to this program's next life, at the numbers at which a container's process is
//! to find them: from 3 on, in their order.
//!
//! They are passed above those numbers, which the child may still need for something else when it
//! is started, and moved as the first step of its life ([`settle`]).

// UNSAFETY: std has no safe way to let a child inherit a descriptor, nor to move one to a number.
#![expect(unsafe_code, reason = "pre_exec, dup2(2) and close(2) with inherited numbers")]

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use bulkhead_protocol::DESCRIPTORS_MAX;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

/// The number of the first such descriptor.
pub(crate) const FIRST: RawFd = 3;
/// The prefix of the argument that names them.
const ARGUMENT: &str = "--descriptors=";

/// Makes `command`, which runs this program and has no argument yet, inherit descriptors.
///
/// # Errors
/// No descriptors are left.
pub(crate) fn hand_down(command: &mut Command, descriptors: &[OwnedFd]) -> io::Result<()> {
    if descriptors.is_empty() {
        return Ok(());
    }
    let above = FIRST + RawFd::try_from(DESCRIPTORS_MAX).map_err(io::Error::other)?;
    let copies = descriptors.iter().map(|one| fcntl_dupfd_cloexec(one, above));
    let copies = copies.collect::<Result<Vec<_>, _>>()?;
    let numbers: Vec<_> = copies.iter().map(|copy| copy.as_raw_fd().to_string()).collect();
    command.arg(format!("{ARGUMENT}{}", numbers.join(",")));
    let keep = move || copies.iter().try_for_each(|copy| Ok(fcntl_setfd(copy, FdFlags::empty())?));
    // SAFETY: the closure makes async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(keep) };
    Ok(())
}

/// Takes out the argument that names the descriptors, moves these to their numbers, and returns
/// how many there are. To be called before anything is opened.
///
/// # Errors
/// The argument is not one of [`hand_down`].
pub(crate) fn settle(arguments: &mut Vec<String>) -> io::Result<i32> {
    let named = arguments.first().and_then(|argument| argument.strip_prefix(ARGUMENT));
    let Some(named) = named else { return Ok(0) };
    let numbers: Result<Vec<RawFd>, _> = named.split(',').map(str::parse).collect();
    let numbers = numbers.map_err(io::Error::other)?;
    for (from, to) in numbers.iter().zip(FIRST..) {
        // SAFETY: no memory is touched. The parent has left both numbers to this process: the new
        // one is free, because nothing was opened yet.
        if unsafe { libc::dup2(*from, to) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; the number was inherited for this and has no other owner.
        unsafe { libc::close(*from) };
    }
    arguments.remove(0);
    i32::try_from(numbers.len()).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn they_are_passed_above_their_numbers_and_go_with_the_command() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut command = Command::new("/bin/true");
        hand_down(&mut command, &[writer.into()]).unwrap();
        let argument = command.get_args().next().unwrap().to_str().unwrap();
        let number: RawFd = argument.strip_prefix(ARGUMENT).unwrap().parse().unwrap();
        assert!(number >= 64, "{number}");
        drop(command);
        // Its only writer is gone.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn other_arguments_stay() {
        let mut arguments = vec!["create".to_owned(), "one".to_owned()];
        assert_eq!(settle(&mut arguments).unwrap(), 0);
        assert_eq!(arguments, ["create", "one"]);
        assert!(settle(&mut vec!["--descriptors=x".to_owned()]).is_err());
    }
}
