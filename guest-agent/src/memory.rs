//! Tells the host when the containers need more memory than the machine has, before an allocation
//! fails.
//!
//! All containers are in one cgroup, whose `memory.high` is a headroom below what the machine has
//! left for them. Beyond it the kernel reclaims caches, counts an event, and slows down a process
//! that outruns it. At an event, a part of the headroom is given out at once, so that few wait while
//! the host plugs more (Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files").

// UNSAFETY: tokio takes a descriptor by number, and the caller has to promise that it stays the
// same.
#![expect(unsafe_code, reason = "AsyncFd::register_with_interest has no safe form")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent::{MemorySize, MemoryWanted};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tonic::{Status, Streaming};

use crate::cgroup::{self, number};
use crate::sysctl::Setting;

/// The least headroom, in bytes: what the guest's kernel needs for itself and to describe more.
const HEADROOM: u64 = 32 << 20;
/// The part of a machine's memory that is headroom beyond that. It must be large, because the
/// kernel slows down a process only by how far it is beyond the limit, and brings it to a stand at
/// about a fifth. It costs the host nothing: no page of it is touched.
const HEADROOM_PART: u64 = 4;
/// The part of the headroom that is given out while the host plugs more.
const ADVANCE_PART: u64 = 4;
/// How long an event that only caches have caused is followed by no other. The kernel makes up to a
/// hundred in a second.
const CALM: Duration = Duration::from_millis(100);
/// From this share of stalled time on, in percent over ten seconds, caches count as needed.
const STALLED: f32 = 10.0;
/// Longer than every file that is read here.
const FILE_BYTES: usize = 8192;
/// Free pages of the whole machine. `/proc/meminfo` also counts what is not plugged yet.
const VMSTAT: &str = "/proc/vmstat";
/// The setting that has the kernel count what is not plugged yet, by a patch of ours.
const EXPECTED: &str = "vm.expected_ram_kbytes";

/// The cgroup of all containers, with the limit above which the host is asked.
pub(crate) struct Watch {
    cgroup: PathBuf,
    events: AsyncFd<File>,
    /// Bytes.
    high: u64,
    headroom: u64,
}

/// Asks the host for memory whenever the containers come near to what the machine has, until the
/// host ends the call.
///
/// # Errors
/// The cgroup cannot be watched any more.
pub(crate) async fn watch(
    mut watch: Watch,
    mut sizes: Streaming<MemorySize>,
    wanted: mpsc::Sender<Result<MemoryWanted, Status>>,
) -> io::Result<()> {
    // Whether the host owes a size.
    let mut asked = false;
    loop {
        tokio::select! {
            size = sizes.message() => {
                let Ok(Some(size)) = size else { return watch.limit(None).await };
                watch.settle(&size).await?;
                asked = false;
            }
            pressed = watch.pressed(), if !asked => {
                pressed?;
                watch.limit(Some(watch.high.saturating_add(watch.headroom / ADVANCE_PART))).await?;
                if watch.is_short()? {
                    // A host that is gone ends the call.
                    asked = wanted.send(Ok(MemoryWanted {})).await.is_ok();
                } else {
                    sleep(CALM).await;
                    watch.limit(Some(watch.high)).await?;
                }
            }
        }
    }
}

impl Watch {
    /// Watches the cgroup of all containers of a machine of this size.
    ///
    /// # Errors
    /// It cannot be watched.
    pub(crate) async fn open(size: &MemorySize) -> io::Result<Self> {
        let cgroup = Path::new(cgroup::ROOT).join(cgroup::CONTAINERS);
        let events = File::open(cgroup.join("memory.events.local"))?;
        // SAFETY: the file belongs to the returned value, so its descriptor stays open and the same.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY) }?;
        let mut watch = Self { cgroup, events, high: 0, headroom: 0 };
        watch.settle(size).await?;
        Ok(watch)
    }

    /// Sets the limit for a machine of this size.
    async fn settle(&mut self, size: &MemorySize) -> io::Result<()> {
        Setting::of_the_machine(EXPECTED, (u64::from(size.expected_mib) << 10).to_string())
            .and_then(Setting::make)
            .unwrap_or_else(|error| tracing::info!(%error, "what is not plugged does not count"));
        if size.mib >= size.expected_mib {
            // From here on the guest's own out-of-memory killer decides.
            return self.limit(None).await;
        }
        let free = pages_free(&fs::read_to_string(VMSTAT)?);
        self.headroom = headroom(u64::from(size.mib) << 20);
        self.high = self.current()?.saturating_add(free).saturating_sub(self.headroom);
        self.limit(Some(self.high)).await
    }

    /// Sets `memory.high` to so many bytes. The kernel may first reclaim what is beyond, in the
    /// thread that writes.
    async fn limit(&self, bytes: Option<u64>) -> io::Result<()> {
        let file = self.cgroup.join("memory.high");
        let text = bytes.map_or_else(|| "max".to_owned(), |bytes| bytes.to_string());
        spawn_blocking(move || fs::write(file, text)).await.map_err(io::Error::other)?
    }

    fn current(&self) -> io::Result<u64> {
        let current = fs::read_to_string(self.cgroup.join("memory.current"))?;
        current.trim().parse().map_err(io::Error::other)
    }

    /// Waits for the next event of `memory.events.local`, of which that of `memory.high` is the one
    /// that occurs.
    async fn pressed(&self) -> io::Result<()> {
        let mut ready = self.events.ready(Interest::PRIORITY).await?;
        ready.clear_ready();
        // Reading the file is what makes the kernel tell the next event.
        self.events.get_ref().read_at(&mut [0; FILE_BYTES], 0).map(drop)
    }

    /// Whether the containers need more than caches that can be dropped, or stall for want of them.
    fn is_short(&self) -> io::Result<bool> {
        let stat = fs::read_to_string(self.cgroup.join("memory.stat"))?;
        let kept = self.current()?.saturating_sub(droppable(&stat));
        // A kernel without PSI has no such file.
        let pressure = fs::read_to_string(self.cgroup.join("memory.pressure")).unwrap_or_default();
        Ok(kept >= self.high / 2 || stalled(&pressure) >= STALLED)
    }
}

/// What containers leave of a machine with this much memory, in bytes, until it has grown.
fn headroom(machine: u64) -> u64 {
    HEADROOM + machine / HEADROOM_PART
}

/// Bytes that are free by `/proc/vmstat`.
fn pages_free(vmstat: &str) -> u64 {
    const PAGE: u64 = 4096;
    number(vmstat, "nr_free_pages").saturating_mul(PAGE)
}

/// Bytes of caches by `memory.stat`.
fn droppable(stat: &str) -> u64 {
    ["active_file", "inactive_file", "slab_reclaimable"]
        .map(|name| number(stat, name))
        .into_iter()
        .fold(0, u64::saturating_add)
}

/// `avg10` of the line `some` of a pressure file (Documentation/accounting/psi.rst); 0 without one.
fn stalled(pressure: &str) -> f32 {
    let some = pressure.lines().find_map(|line| line.strip_prefix("some "));
    let words = some.into_iter().flat_map(str::split_whitespace);
    let average = words.filter_map(|word| word.strip_prefix("avg10=")).next();
    average.and_then(|average| average.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_a_machine_is_headroom() {
        assert_eq!(headroom(256 << 20) >> 20, 96);
        assert_eq!(headroom(4 << 30) >> 20, 1056);
    }

    #[test]
    fn the_kernels_files_are_read() {
        assert_eq!(pages_free("nr_free_pages 3\nnr_free_cma 9\n"), 3 * 4096);
        let stat =
            "anon 7\nfile 90\nshmem 1\ninactive_file 20\nactive_file 30\nslab_reclaimable 4\n";
        assert_eq!(droppable(stat), 54);
        let pressure = "some avg10=12.50 avg60=1.00 avg300=0.10 total=9\nfull avg10=99.00\n";
        assert!((stalled(pressure) - 12.5).abs() < f32::EPSILON);
        for empty in ["", "some", "full avg10=9.00", "some avg10=x"] {
            assert!(stalled(empty).abs() < f32::EPSILON, "{empty:?}");
        }
    }
}
