//! The guest's pool of huge pages. The host plugs memory that huge pages of its own pool hold, and the
//! pages of the guest's pool are made of it.
//!
//! The memory comes online as movable memory, of which a machine has no other: the kernel makes huge
//! pages of movable memory first, and in the order in which it came, as long as there is some. What
//! programs take of it before is missing there, and the kernel makes up for it with pages of other
//! memory; the number is right in any case.

use std::fs;
use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::hotplug;

/// As what memory comes online that is plugged from now on.
const ONLINE: &str = "/sys/devices/system/memory/auto_online_blocks";
const MOVABLE: &str = "online_movable";
/// The default, by the kernel's configuration.
const ORDINARY: &str = "online";
/// The number of huge pages of 2 MiB, which is the default size.
const COUNT: &str = "/proc/sys/vm/nr_hugepages";
const ZONES: &str = "/proc/zoneinfo";
/// Pages of 4 KiB in a MiB.
const PAGES_OF_A_MIB: u64 = 256;
/// How long the kernel may take to bring memory online.
const PATIENCE: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(2);

/// Lets memory that is plugged from now on, until [`add`], come online as movable memory, and binds
/// the device that brings it.
///
/// # Errors
/// The kernel cannot do that.
pub(crate) fn expect() -> io::Result<()> {
    fs::write(ONLINE, MOVABLE)?;
    let bound = hotplug::rescan(Path::new(hotplug::PLATFORM_BUS));
    if bound.is_err() {
        fs::write(ONLINE, ORDINARY)?;
    }
    bound.map(drop)
}

/// Adds huge pages to the pool, when so much movable memory is there.
///
/// # Errors
/// It does not come in time, or the kernel makes fewer; there are as many as before then.
pub(crate) fn add(pages: u32, plugged_mib: u32) -> io::Result<()> {
    let came = wait_for(u64::from(plugged_mib) * PAGES_OF_A_MIB);
    fs::write(ONLINE, ORDINARY)?;
    came?;
    if pages == 0 {
        return Ok(());
    }
    let before = count()?;
    let wanted = before + u64::from(pages);
    fs::write(COUNT, wanted.to_string())?;
    let now = count()?;
    if now >= wanted {
        return Ok(());
    }
    fs::write(COUNT, before.to_string())?;
    Err(io::Error::other(format!("the kernel made {} of {pages}", now.saturating_sub(before))))
}

fn wait_for(wanted: u64) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let online = movable(&fs::read_to_string(ZONES)?);
        if online >= wanted {
            return Ok(());
        }
        if Instant::now() > deadline {
            let (online, wanted) = (online / PAGES_OF_A_MIB, wanted / PAGES_OF_A_MIB);
            let words = format!("{online} of {wanted} MiB of memory came online");
            return Err(io::Error::new(io::ErrorKind::TimedOut, words));
        }
        sleep(STEP);
    }
}

fn count() -> io::Result<u64> {
    fs::read_to_string(COUNT)?.trim().parse().map_err(io::Error::other)
}

/// Pages of movable memory by `/proc/zoneinfo`.
fn movable(zones: &str) -> u64 {
    let zone = zones.split("\nNode ").filter(|zone| {
        zone.lines().next().is_some_and(|title| title.trim_end().ends_with("Movable"))
    });
    let managed = |zone: &str| {
        let line = zone.lines().find_map(|line| line.trim_start().strip_prefix("managed "))?;
        line.trim().parse::<u64>().ok()
    };
    zone.filter_map(managed).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn movable_memory_is_counted() {
        let zones = "Node 0, zone   Normal\n  pages free     7\n        managed  9\n\
                     Node 0, zone  Movable\n  pages free     32\n        present  65536\n        \
                     managed  34816\n        cma      0\n\
                     Node 0, zone   Device\n        managed  5\n";
        assert_eq!(movable(zones), 34816);
        assert_eq!(movable("Node 0, zone   Normal\n        managed  9\n"), 0);
        assert_eq!(movable(""), 0);
    }
}
