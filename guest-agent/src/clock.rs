//! Gives this boot of the guest what is its pod's alone: the time, fresh entropy for the kernel's
//! generator (random(4), `RNDADDENTROPY` and `RNDRESEEDCRNG`) and the host name.

// UNSAFETY: the random device takes entropy by ioctl only, and no safe wrapper has that ioctl.
#![expect(unsafe_code, reason = "two ioctls of the random device")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use rustix::time::{ClockId, Timespec, clock_settime};

/// The most entropy that one call carries, in bytes.
pub(crate) const ENTROPY_BYTES: usize = 64;

/// `_IOW('R', 0x03, int[2])`: mixes bytes in and credits them.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`: reseeds the generator from what was mixed in.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// `struct rand_pool_info` of random(4) with room for [`ENTROPY_BYTES`].
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    pool: [u8; ENTROPY_BYTES],
}

/// Sets the real-time clock to `nanoseconds` since the epoch.
///
/// # Errors
/// The kernel refuses the time (`EINVAL`) or the caller (`EPERM`).
pub(crate) fn set_time(nanoseconds: u64) -> io::Result<()> {
    let seconds = i64::try_from(nanoseconds / 1_000_000_000).unwrap_or(i64::MAX);
    let rest = i64::try_from(nanoseconds % 1_000_000_000).unwrap_or(0);
    let time = Timespec { tv_sec: seconds, tv_nsec: rest };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// Gives the kernel's generator fresh bytes, credits them and reseeds it.
///
/// # Errors
/// More than [`ENTROPY_BYTES`] bytes (`InvalidInput`), or what the random device answers.
pub(crate) fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo { entropy_bits: 0, bytes: 0, pool: [0; ENTROPY_BYTES] };
    let Some(pool) = info.pool.get_mut(..entropy.len()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    pool.copy_from_slice(entropy);
    let length = libc::c_int::try_from(entropy.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    info.bytes = length;
    info.entropy_bits = length * 8;
    let device = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the descriptor is open, and the kernel reads `bytes` bytes of the pool, which holds
    // them.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if added < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open and the call has no argument.
    let reseeded = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the guest's host name.
///
/// # Errors
/// The name is too long (`EINVAL`, 64 bytes).
pub(crate) fn set_hostname(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_entropy_than_fits_is_refused() {
        let error = add_entropy(&[0; ENTROPY_BYTES + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
