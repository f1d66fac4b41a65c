//! Taps: interfaces of the host whose other end is a file descriptor,
//! `Documentation/networking/tuntap.rst` of Linux. A tap is gone when its last descriptor is
//! closed, in any process.

// UNSAFETY: a tap is made by ioctl.
#![expect(unsafe_code, reason = "TUNSETIFF and TUNSETVNETHDRSZ of a descriptor")]

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

/// The kernel replaces `%d` with a number.
const NAME: &[u8] = b"bulkhead%d";
/// The prefix of the names of Bulkhead's taps.
pub(super) const PREFIX: &str = "bulkhead";
/// The length of the header that the monitor expects before each frame: VIRTIO 1.3 §5.1.6, with the
/// number of buffers.
const HEADER_BYTES: libc::c_int = 12;

/// Makes a tap in the calling thread's network namespace. Returns a descriptor for each of so many
/// queues, and the number of the interface.
pub(super) fn open(queues: usize) -> io::Result<(Vec<OwnedFd>, u32)> {
    let (first, name) = open_queue(NAME, queues > 1)?;
    let mut taps = vec![first];
    for _ in 1..queues {
        let (further, _) = open_queue(name.to_bytes(), true)?;
        taps.push(further);
    }
    let name = name.to_string_lossy();
    be_silent(&name)?;
    let asked = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok((taps, name_to_index(asked, &name)?))
}

/// Opens one queue of the tap with this name, which is made if there is none.
fn open_queue(name: &[u8], several: bool) -> io::Result<(OwnedFd, CString)> {
    let mut options = File::options();
    let tap = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all zeroes is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name) {
        *place = byte.cast_signed();
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = flags.try_into().map_err(io::Error::other)?;
    // SAFETY: the kernel reads and writes one request.
    done(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let bytes = HEADER_BYTES;
    // SAFETY: the kernel reads one integer.
    done(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })?;
    let name = request.ifr_name.map(libc::c_char::cast_unsigned);
    let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
    Ok((tap.into(), name.to_owned()))
}

/// Keeps the host from sending packets of its own to the guest: with IPv6 it would look for routers
/// there.
fn be_silent(name: &str) -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
