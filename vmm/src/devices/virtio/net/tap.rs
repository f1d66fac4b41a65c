//! The host's end of an interface, `Documentation/networking/tuntap.rst` of Linux.
//!
//! Nothing is opened or named here: a tap arrives as a descriptor, and is refused if it is not set
//! up as the device needs it. One read or write is one frame with its header.

// UNSAFETY: the settings of a tap are read and changed by ioctl.
#![expect(
    unsafe_code,
    reason = "TUNGETIFF, TUNGETVNETHDRSZ, TUNSETOFFLOAD and TUNSETQUEUE of a descriptor"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::{c_int, c_uint, c_ulong};
use rustix::fs::{OFlags, fcntl_getfl};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::header::HEADER_BYTES;

/// The other end of one pair of queues.
pub(crate) trait Tap: AsFd + AsRawFd + Send + 'static {
    /// Sets the offloads (`TUN_F_*`) that the reader supports, for the whole interface.
    fn set_offloads(&self, flags: c_uint) -> io::Result<()>;

    /// Sets whether the interface gives frames to this tap, if it has several; it does at first.
    fn set_used(&self, used: bool) -> io::Result<()>;
}

/// A tap of the host's kernel.
#[derive(Debug)]
pub(crate) struct HostTap(File);

impl Tap for HostTap {
    fn set_offloads(&self, flags: c_uint) -> io::Result<()> {
        // SAFETY: the argument is a number.
        done(unsafe { ioctl_with_val(&self.0, libc::TUNSETOFFLOAD as c_ulong, flags.into()) })
    }

    fn set_used(&self, used: bool) -> io::Result<()> {
        let flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        // SAFETY: all zeroes is a valid request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // Both flags fit.
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
        // SAFETY: the kernel reads one request.
        done(unsafe { ioctl_with_ref(&self.0, libc::TUNSETQUEUE as c_ulong, &request) })
    }
}

impl AsFd for HostTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for HostTap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Takes descriptors that are set up as taps of one interface.
///
/// # Errors
/// Says what is missing.
pub(super) fn check(taps: Vec<OwnedFd>) -> io::Result<Vec<HostTap>> {
    let mut needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if taps.len() > 1 {
        needed |= libc::IFF_MULTI_QUEUE;
    }
    let mut first = None;
    let mut checked = Vec::new();
    for tap in taps {
        let (name, flags) = interface(&tap)?;
        if flags & needed != needed {
            return Err(refused(format!("has the flags {flags:#x} and needs {needed:#x}")));
        }
        if *first.get_or_insert(name) != name {
            return Err(refused("is of another interface than the first"));
        }
        if header_bytes(&tap)? != HEADER_BYTES {
            return Err(refused(format!("does not have a header of {HEADER_BYTES} bytes")));
        }
        if !fcntl_getfl(&tap)?.contains(OFlags::NONBLOCK) {
            return Err(refused("is not nonblocking"));
        }
        checked.push(HostTap(File::from(tap)));
    }
    Ok(checked)
}

fn refused(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("a tap {what}"))
}

/// The name and the flags (`IFF_*`) of the interface.
fn interface(tap: &OwnedFd) -> io::Result<([libc::c_char; libc::IFNAMSIZ], c_int)> {
    // SAFETY: all zeroes is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a whole request.
    done(unsafe { ioctl_with_mut_ref(tap, libc::TUNGETIFF as c_ulong, &mut request) })?;
    // SAFETY: this call fills the flags; any bits are a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((request.ifr_name, c_int::from(flags)))
}

fn header_bytes(tap: &OwnedFd) -> io::Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: the kernel writes an integer.
    done(unsafe { ioctl_with_mut_ref(tap, libc::TUNGETVNETHDRSZ as c_ulong, &mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

fn done(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
