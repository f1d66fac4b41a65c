//! Guest memory that huge pages of the host's pool hold (`docs/decisions/0033-huge-pages-of-the-pool.md`).
//!
//! The host's kernel reserves the pages when they are mapped, and refuses when it has too few. From
//! then on a touch cannot fail, whatever the guest does and whoever else uses the pool. They go back
//! to the pool when this process ends, however it ends.

use std::io;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::MemoryError;
use crate::devices::virtio::queue::GuestMemory;

/// The size of a page, and the unit of what belongs to it.
pub(super) const PAGE_BYTES: u64 = 2 << 20;
/// One page in so many is spare memory, and one more: the guest's kernel leaves a part of a zone
/// free, up to 1.25 % with little other memory, and takes the last huge pages from elsewhere if that
/// part is not there.
const PAGES_TO_A_SPARE: u64 = 64;

/// What memory of huge pages consists of, in pages of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    /// Huge pages of the pool.
    pub(super) pages: u64,
    /// Ordinary memory beside them.
    pub(super) spare: u64,
}

impl Backing {
    /// What there is from `start` on.
    pub(super) fn of(memory: &GuestMemory, start: GuestAddress) -> Self {
        let mut found = Self { pages: 0, spare: 0 };
        for region in memory.iter().filter(|region| region.start_addr() >= start) {
            let part = if holds(region) { &mut found.pages } else { &mut found.spare };
            *part += region.len() / PAGE_BYTES;
        }
        found
    }

    /// What is missing for so many pages.
    pub(super) fn missing(self, pages: u32) -> Self {
        let pages = u64::from(pages).max(self.pages);
        let spare = if pages == 0 { 0 } else { 1 + pages.div_ceil(PAGES_TO_A_SPARE) };
        Self { pages: pages - self.pages, spare: spare.saturating_sub(self.spare) }
    }

    /// Both together.
    pub(super) const fn with(self, more: Self) -> Self {
        Self { pages: self.pages + more.pages, spare: self.spare + more.spare }
    }

    pub(super) const fn bytes(self) -> u64 {
        (self.pages + self.spare) * PAGE_BYTES
    }
}

/// Whether huge pages of the pool hold a region.
pub(super) fn holds(region: &GuestRegionMmap) -> bool {
    region.is_hugetlbfs() == Some(true)
}

/// Reserves so many free pages of the pool, and maps them.
pub(super) fn reserve(start: GuestAddress, pages: u64) -> Result<GuestRegionMmap, MemoryError> {
    let refused = |source| MemoryError::Huge { pages, source };
    // usize is 64 bits wide on this architecture.
    let size = usize::try_from(pages * PAGE_BYTES).unwrap_or(usize::MAX);
    // Without MAP_NORESERVE, which is what reserves them.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let mapping = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .with_hugetlbfs(true)
        .build()
        .map_err(|error| match error {
            MmapRegionError::Mmap(source) => refused(source),
            other => refused(io::Error::other(other)),
        })?;
    // The device has checked that the addresses exist.
    GuestRegionMmap::new(mapping, start)
        .ok_or_else(|| refused(io::Error::other("there are no such addresses")))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::release;
    use super::*;

    #[test]
    fn what_is_missing_is_added_once() {
        let none = Backing { pages: 0, spare: 0 };
        assert_eq!(none.missing(0), none);
        let first = none.missing(64);
        assert_eq!(first, Backing { pages: 64, spare: 2 });
        assert_eq!(first.missing(64), none);
        assert_eq!(first.missing(3), none, "nothing is taken back");
        assert_eq!(first.missing(65), Backing { pages: 1, spare: 1 });
        assert_eq!(first.with(first.missing(65)).bytes(), 68 * PAGE_BYTES);
        assert_eq!(none.missing(u32::MAX).pages, u64::from(u32::MAX));
    }

    #[test]
    fn memory_behind_an_address_is_counted() {
        let pages = |count: u64| usize::try_from(count * PAGE_BYTES).unwrap();
        let start = GuestAddress(1 << 32);
        let ranges = [(GuestAddress(0), pages(1)), (start, pages(3))];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        assert_eq!(Backing::of(&memory, start), Backing { pages: 0, spare: 3 });
    }

    #[test]
    fn what_huge_pages_hold_is_not_given_back() {
        let region = |start, huge| {
            let mapping = MmapRegionBuilder::new(1 << 20)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
                .with_hugetlbfs(huge)
                .build();
            GuestRegionMmap::new(mapping.unwrap(), GuestAddress(start)).unwrap()
        };
        let regions = vec![region(0, false), region(1 << 20, true)];
        let memory = GuestMemory::from_regions(regions).unwrap();
        for (start, then) in [(0, 0), (1 << 20, 7)] {
            let place = GuestAddress(start);
            memory.write_obj(7_u8, place).unwrap();
            let slice = memory.get_slice(place, 4096).unwrap();
            release(&memory, &slice).unwrap();
            assert_eq!(memory.read_obj::<u8>(place).unwrap(), then);
        }
    }

    #[test]
    fn more_than_the_pool_has_is_refused() {
        let error = reserve(GuestAddress(0), 1 << 30).unwrap_err();
        assert!(error.to_string().contains("1073741824 huge pages"), "{error}");
    }
}
