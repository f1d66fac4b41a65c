//! Guest memory: mapped here, told to KVM, and shown to the devices. A machine can get more of it
//! while it runs, and never less.
//!
//! Devices access memory through a snapshot, which a worker takes each time that it serves. New
//! memory is in the snapshots taken from then on. Before the guest may be told of it,
//! [`Memory::settle`] waits until no older snapshot is in use: otherwise an honest driver could
//! hand a buffer to a device that does not know it yet.
//!
//! Any other user of guest memory, such as the host's kernel, is shown new memory beforehand
//! ([`Onlooker`]).
//!
//! Memory is the host's ordinary memory, which comes when it is touched and goes when the guest frees
//! it, or huge pages of the host's pool, which are reserved and stay ([`huge`]).

// UNSAFETY: KVM lets the guest access the memory that it is told about, and `madvise` can destroy
// what is in memory.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION and madvise(2)")]

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, madvise};
use thiserror::Error;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap,
};

use crate::arch::layout;
use crate::devices::virtio::queue::GuestMemory;

mod huge;

/// How long a device may serve with an outdated snapshot: as long as a slow disk takes.
const SETTLING: Duration = Duration::from_secs(10);
/// How often [`Memory::settle`] checks that.
const SETTLING_STEP: Duration = Duration::from_millis(1);

/// Guest memory cannot be mapped or extended.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host cannot map this much memory.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// The size asked for.
        mib: u64,
        /// Why not.
        source: FromRangesError,
    },
    /// The host's pool has too few free huge pages.
    #[error("cannot reserve {pages} huge pages of 2 MiB")]
    Huge {
        /// How many more were asked for.
        pages: u64,
        /// Why not.
        source: io::Error,
    },
    /// KVM refuses the memory.
    #[error("KVM: map guest memory")]
    Kvm(#[source] kvm_ioctls::Error),
    /// A bug, since the addresses are fixed in `layout`.
    #[error("guest memory overlaps")]
    Overlap(#[source] GuestRegionCollectionError),
    /// Another server of a device refuses the memory.
    #[error("cannot share guest memory with the server of a device")]
    Show(#[source] io::Error),
    /// A device serves a request that takes long.
    #[error("a device has been serving one request for {} s; try again later", .0.as_secs())]
    Busy(Duration),
}

/// A user of guest memory outside of this program, such as vhost-net. It may read and write the
/// memory that it was shown, until it is shown other memory or is dropped.
pub(crate) trait Onlooker: fmt::Debug + Send + Sync {
    /// Shows it all of the memory.
    fn show(&self, memory: &GuestMemory) -> io::Result<()>;
}

/// The guest's memory, shared by everybody who uses it.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Where the memory ends that the machine has booted with.
    end_at_boot: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    current: Arc<GuestMemory>,
    /// Earlier snapshots that somebody may still use.
    outdated: Vec<Arc<GuestMemory>>,
    onlookers: Vec<Weak<dyn Onlooker>>,
}

impl Memory {
    /// Shares memory that KVM knows already, or that is used without KVM.
    pub(crate) fn new(memory: GuestMemory) -> Arc<Self> {
        let end_at_boot = memory.last_addr().0 + 1;
        let current = Arc::new(memory);
        let state = State { current, outdated: Vec::new(), onlookers: Vec::new() };
        Arc::new(Self { end_at_boot, state: Mutex::new(state) })
    }

    /// Where the memory ends that the machine has booted with.
    pub(crate) const fn end_at_boot(&self) -> u64 {
        self.end_at_boot
    }

    /// Maps what a machine boots with.
    pub(crate) fn map(vm: &VmFd, mib: u32) -> Result<Arc<Self>, MemoryError> {
        let memory = GuestMemory::from_ranges(&layout::memory_ranges(mib))
            .map_err(|source| MemoryError::Map { mib: mib.into(), source })?;
        for (slot, region) in (0..).zip(memory.iter()) {
            register(vm, slot, region)?;
        }
        Ok(Self::new(memory))
    }

    /// A snapshot of the memory as it is now. Users keep it only while they serve.
    pub(crate) fn snapshot(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.lock().current)
    }

    /// Shows the memory to an onlooker, now and whenever it grows.
    ///
    /// # Errors
    /// When it does not take what there is now.
    pub(crate) fn introduce(&self, onlooker: &Arc<dyn Onlooker>) -> io::Result<()> {
        let mut state = self.lock();
        onlooker.show(&state.current)?;
        state.onlookers.retain(|known| known.strong_count() > 0);
        state.onlookers.push(Arc::downgrade(onlooker));
        Ok(())
    }

    /// Maps what is missing of the range from `start` on; its beginning may be mapped already.
    pub(crate) fn extend(
        &self,
        vm: &VmFd,
        start: GuestAddress,
        bytes: u64,
    ) -> Result<(), MemoryError> {
        // Locked until the end, so that no onlooker is introduced meanwhile.
        let mut state = self.lock();
        let end = start.0 + bytes;
        let before = state.current.iter().filter(|it| (start.0..end).contains(&it.start_addr().0));
        let mapped = before.map(|it| it.last_addr().0 + 1).max().unwrap_or(start.0);
        match end.saturating_sub(mapped) {
            0 => Ok(()),
            missing => state.add(vm, ordinary(mapped, missing)?),
        }
    }

    /// Maps what is missing of so many huge pages and their spare memory, from `start` on, behind all
    /// other memory. Returns how much there is then, in bytes; `room` is asked whether that fits.
    ///
    /// # Errors
    /// When the host has too few free huge pages, or too little address space; pages that were
    /// reserved before stay.
    pub(crate) fn extend_huge<E: From<MemoryError>>(
        &self,
        vm: &VmFd,
        start: GuestAddress,
        pages: u32,
        room: impl FnOnce(u64) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut state = self.lock();
        let now = huge::Backing::of(&state.current, start);
        let missing = now.missing(pages);
        let then = now.with(missing).bytes();
        room(then)?;
        let mut end = start.0 + now.bytes();
        if missing.pages > 0 {
            state.add(vm, huge::reserve(GuestAddress(end), missing.pages)?)?;
            end += missing.pages * huge::PAGE_BYTES;
        }
        if missing.spare > 0 {
            state.add(vm, ordinary(end, missing.spare * huge::PAGE_BYTES)?)?;
        }
        Ok(then)
    }

    /// Replaces the snapshot that is taken from now on.
    #[cfg(test)]
    pub(crate) fn publish(&self, memory: GuestMemory) {
        self.lock().publish(memory);
    }

    /// Returns when every snapshot in use is of memory as it is now.
    pub(crate) fn settle(&self) -> Result<(), MemoryError> {
        let deadline = Instant::now() + SETTLING;
        loop {
            let mut state = self.lock();
            // Nobody can get a new reference to one that is held here only.
            state.outdated.retain(|snapshot| Arc::strong_count(snapshot) > 1);
            if state.outdated.is_empty() {
                return Ok(());
            }
            drop(state);
            if Instant::now() > deadline {
                return Err(MemoryError::Busy(SETTLING));
            }
            thread::sleep(SETTLING_STEP);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Shows all onlookers the memory as it will be.
    fn show(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        let mut onlookers = self.onlookers.iter().filter_map(Weak::upgrade);
        onlookers.try_for_each(|onlooker| onlooker.show(memory)).map_err(MemoryError::Show)
    }

    /// Lets the guest and all devices use a further region.
    fn add(&mut self, vm: &VmFd, region: GuestRegionMmap) -> Result<(), MemoryError> {
        let slot = u32::try_from(self.current.num_regions()).unwrap_or(u32::MAX);
        let region = Arc::new(region);
        let then = self.current.insert_region(Arc::clone(&region)).map_err(MemoryError::Overlap)?;
        if let Err(error) = self.show(&then).and_then(|()| register(vm, slot, &region)) {
            // An onlooker may use the region already, so it must not be unmapped.
            std::mem::forget(region);
            return Err(error);
        }
        self.publish(then);
        Ok(())
    }

    fn publish(&mut self, memory: GuestMemory) {
        let before = std::mem::replace(&mut self.current, Arc::new(memory));
        self.outdated.push(before);
    }
}

/// Maps ordinary memory.
fn ordinary(start: u64, bytes: u64) -> Result<GuestRegionMmap, MemoryError> {
    // usize is 64 bits wide on this architecture.
    let size = usize::try_from(bytes).unwrap_or(usize::MAX);
    GuestRegionMmap::from_range(GuestAddress(start), size, None)
        .map_err(|source| MemoryError::Map { mib: bytes >> 20, source })
}

/// Lets the guest use a region.
fn register(vm: &VmFd, slot: u32, region: &GuestRegionMmap) -> Result<(), MemoryError> {
    if !huge::holds(region) {
        let (start, size) = (region.as_ptr().cast(), region.size());
        // SAFETY: this advice changes how memory is backed, never what is in it.
        if let Err(error) = unsafe { madvise(start, size, Advice::LinuxHugepage) } {
            log::info!("guest memory without huge pages, this host has none: {error}");
        }
    }
    let kvm_region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the region is mapped with this size, and stays so for the life of the process: it is
    // never taken out of the memory that the bus holds, which outlives every processor. Only a machine
    // whose construction fails unmaps it, and that has no processor yet.
    unsafe { vm.set_user_memory_region(kvm_region) }.map_err(MemoryError::Kvm)
}

/// Drops the whole pages of a run of guest memory; they read as zeroes when they are touched again.
/// That holds for private anonymous memory, which is what guest memory is. Huge pages of the pool
/// stay: a host older than Linux 6.9 would give up their reservation too, and end the monitor when
/// the guest touches one while the pool is empty.
pub(crate) fn release(
    memory: &GuestMemory,
    slice: &vm_memory::VolatileSlice<'_>,
) -> io::Result<()> {
    const PAGE_BYTES: usize = 4096;
    let guard = slice.ptr_guard_mut();
    let is_inside = |region: &GuestRegionMmap| {
        let start = region.as_ptr().addr();
        (start..start + region.size()).contains(&guard.as_ptr().addr())
    };
    if memory.iter().any(|region| huge::holds(region) && is_inside(region)) {
        return Ok(());
    }
    let skip = guard.as_ptr().align_offset(PAGE_BYTES);
    let len = slice.len().saturating_sub(skip) / PAGE_BYTES * PAGE_BYTES;
    if len == 0 {
        return Ok(());
    }
    let start = guard.as_ptr().wrapping_add(skip);
    // SAFETY: the range lies inside the slice, which is mapped guest memory; no Rust reference
    // to guest memory exists, and the guest expects its contents to go.
    Ok(unsafe { madvise(start.cast(), len, Advice::LinuxDontNeed) }?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn memory(mib: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
    }

    #[test]
    fn memory_settles_once_nobody_uses_an_older_snapshot() {
        let shared = Memory::new(memory(1));
        shared.settle().unwrap();
        let old = shared.snapshot();
        shared.publish(memory(2));
        assert_eq!(shared.snapshot().last_addr().0 + 1, 2 << 20);
        let serving = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(old);
            Instant::now()
        });
        shared.settle().unwrap();
        let settled = Instant::now();
        assert!(settled >= serving.join().unwrap(), "a device still had the older one");
        assert!(shared.lock().outdated.is_empty());
    }

    /// An onlooker that accepts memory up to a size.
    #[derive(Debug)]
    struct Watcher {
        most: u64,
        seen: AtomicU64,
    }

    impl Onlooker for Watcher {
        fn show(&self, memory: &GuestMemory) -> io::Result<()> {
            let bytes = memory.last_addr().0 + 1;
            self.seen.store(bytes, Ordering::Relaxed);
            if bytes > self.most { Err(io::ErrorKind::ArgumentListTooLong.into()) } else { Ok(()) }
        }
    }

    #[test]
    fn onlookers_are_shown_what_there_is_and_what_comes_while_they_live() {
        let shared = Memory::new(memory(1));
        let watcher = |most: u64| Arc::new(Watcher { most: most << 20, seen: AtomicU64::new(0) });
        let (one, other) = (watcher(2), watcher(3));
        for onlooker in [&one, &other] {
            let onlooker: Arc<dyn Onlooker> = Arc::<Watcher>::clone(onlooker);
            shared.introduce(&onlooker).unwrap();
        }
        let seen = |watcher: &Watcher| watcher.seen.load(Ordering::Relaxed) >> 20;
        assert_eq!((seen(&one), seen(&other)), (1, 1));
        shared.lock().show(&memory(2)).unwrap();
        assert_eq!((seen(&one), seen(&other)), (2, 2));
        assert!(matches!(shared.lock().show(&memory(3)), Err(MemoryError::Show(_))));
        drop(one);
        shared.lock().show(&memory(3)).unwrap();
        assert_eq!(seen(&other), 3);
        let late: Arc<dyn Onlooker> = watcher(0);
        assert!(shared.introduce(&late).is_err());
        assert_eq!(shared.lock().onlookers.len(), 2, "one that refused is not remembered");
    }
}
