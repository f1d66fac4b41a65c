//! File locks, `fcntl_locking(2)` and `flock(2)`, which hold between the guest and the host.
//!
//! A lock of a whole file belongs to an open file description. Each one of the guest has one on the
//! host, which takes the lock. A lock of a range belongs to a process of the guest, or to one of
//! its open file descriptions. Each such owner has one open file description per inode here, which
//! takes its locks (`F_OFD_SETLK`). They are released when the guest says that the process closed a
//! descriptor of the file (FLUSH), or that the open file description through which the first one
//! was taken is gone (RELEASE). Linux's FUSE says the latter only for an `F_OFD_SETLK`.
//!
//! No thread waits for a lock. Requests that have to wait are kept in a bounded list, which one
//! thread tries again: at once when the guest released something, otherwise every [`RETRY_MIN`] to
//! [`RETRY_MAX`], since the host does not say when its own processes release a lock.

// UNSAFETY: locks of open file descriptions have no safe wrapper.
#![expect(unsafe_code, reason = "fcntl(2)")]

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::{Outcome, Share};
use crate::fileserver::check;
use crate::fileserver::handles::Handle;
use crate::fileserver::slots::Kept;
use crate::fileserver::wire::{Body, Reply, Request};

const RETRY_MIN: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_millis(100);
/// How many requests may wait for a lock. A guest has fewer in flight, but each time that it resets
/// its device it forgets those and can send as many again.
const WAITING_MAX: usize = 512;
/// How many INTERRUPTs are remembered that came before the request that they interrupt.
const EARLY_MAX: usize = 16;
/// `FUSE_LK_FLOCK`: a lock of the whole file.
const WHOLE: u32 = 1;
/// `F_RDLCK`, `F_WRLCK`, `F_UNLCK`.
const READ: u32 = 0;
const WRITE: u32 = 1;
const UNLOCK: u32 = 2;

/// `struct fuse_lk_in`.
#[derive(Clone, Copy, Debug)]
struct LockRequest {
    handle: u64,
    owner: u64,
    start: u64,
    /// The last byte.
    end: u64,
    kind: u32,
    whole: bool,
}

impl LockRequest {
    fn read(body: &mut Body<'_>) -> Result<Self, Errno> {
        let (handle, owner, start, end) = (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
        let (kind, _process, flags) = (body.u32()?, body.u32()?, body.u32()?);
        if kind > UNLOCK || start > end || end > i64::MAX.cast_unsigned() {
            return Err(Errno::INVAL);
        }
        Ok(Self { handle, owner, start, end, kind, whole: flags & WHOLE != 0 })
    }
}

/// A lock to be taken, or released.
#[derive(Clone, Debug)]
enum Lock {
    Whole { handle: Arc<Handle>, operation: FlockOperation },
    Range { owner: Owner, held: Held, range: libc::flock },
}

/// An inode, and what the guest calls the owner of its locks.
type Owner = (u64, u64);

/// The open file description that takes the locks of an owner.
#[derive(Clone, Debug)]
struct Held {
    file: Arc<Kept>,
    /// The number of the handle through which the owner took its first lock.
    handle: u64,
}

#[derive(Debug)]
struct Waiting {
    unique: u64,
    lock: Lock,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<Waiting>,
    early: VecDeque<u64>,
    /// The guest released something since the last round.
    changed: bool,
}

/// Who holds locks of ranges, and who waits for one.
#[derive(Debug, Default)]
pub(in crate::fileserver) struct Locks {
    owners: Mutex<HashMap<Owner, Held>>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Locks {
    /// Releases what a process holds of an inode.
    pub(super) fn release(&self, node: u64, owner: u64) {
        if self.owners().remove(&(node, owner)).is_some() {
            self.wake();
        }
    }

    /// Releases the locks of owners that took their first one through this handle, which is gone:
    /// such an owner has no other handle, or has lost its locks when it closed this one.
    pub(super) fn release_handle(&self, handle: u64) {
        self.owners().retain(|_, held| held.handle != handle);
        self.wake();
    }

    /// Releases all locks, and drops all requests that wait.
    pub(super) fn clear(&self) {
        *self.owners() = HashMap::new();
        *self.queue() = Queue::default();
    }

    /// Lets all requests that wait try again, because something was released.
    pub(super) fn wake(&self) {
        let mut queue = self.queue();
        if !queue.waiting.is_empty() {
            queue.changed = true;
            self.wake.notify_one();
        }
    }

    /// Tries the waiting requests again and again; calls `done` with each result. Never returns.
    pub(in crate::fileserver) fn run(&self, done: impl Fn(u64, Result<(), Errno>)) -> ! {
        let mut pause = RETRY_MIN;
        loop {
            let mut queue = self.queue();
            while queue.waiting.is_empty() {
                pause = RETRY_MIN;
                queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if std::mem::take(&mut queue.changed) {
                pause = RETRY_MIN;
            } else {
                pause = (pause * 2).min(RETRY_MAX);
            }
            let mut finished = Vec::new();
            queue.waiting.retain(|waiting| match self.take(&waiting.lock) {
                Err(Errno::AGAIN) => true,
                result => {
                    finished.push((waiting.unique, result));
                    false
                }
            });
            if finished.is_empty() && !queue.changed {
                drop(self.wake.wait_timeout(queue, pause));
            } else {
                drop(queue);
            }
            for (unique, result) in finished {
                done(unique, result);
            }
        }
    }

    /// Takes or releases a lock without waiting.
    fn take(&self, lock: &Lock) -> Result<(), Errno> {
        match lock {
            Lock::Whole { handle, operation } => flock(handle, *operation),
            Lock::Range { owner, held, range } => {
                // All locks of an owner must be of one open file description. Another thread may
                // have taken the first of them, or released all, since the request was read.
                let file = Arc::clone(&self.owners().entry(*owner).or_insert(held.clone()).file);
                control(file, libc::F_OFD_SETLK, *range).map(drop)
            }
        }
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<Owner, Held>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    pub(super) fn set_lock(&self, request: &Request, body: &mut Body<'_>) -> Result<(), Errno> {
        let wanted = LockRequest::read(body)?;
        let Some(lock) = self.lock_of(request.node, wanted)? else { return Ok(()) };
        self.locks.take(&lock)?;
        if wanted.kind != WRITE {
            // The lock was released, or now lets others read as well.
            self.locks.wake();
        }
        Ok(())
    }

    pub(super) fn set_lock_and_wait(&self, request: &Request, body: &mut Body<'_>) -> Outcome {
        let read = LockRequest::read(body);
        let (wanted, lock) = match read.and_then(|it| Ok((it, self.lock_of(request.node, it)?))) {
            Ok((wanted, Some(lock))) => (wanted, lock),
            Ok((_, None)) => return Outcome::Done(Ok(())),
            Err(error) => return Outcome::Done(Err(error)),
        };
        // Under the lock of the queue, so that no INTERRUPT is missed.
        let mut queue = self.locks.queue();
        if let Some(index) = queue.early.iter().position(|unique| *unique == request.unique) {
            queue.early.remove(index);
            return Outcome::Done(Err(Errno::INTR));
        }
        match self.locks.take(&lock) {
            Err(Errno::AGAIN) if queue.waiting.len() == WAITING_MAX => {
                Outcome::Done(Err(Errno::NOLCK))
            }
            Err(Errno::AGAIN) => {
                queue.waiting.push(Waiting { unique: request.unique, lock });
                self.locks.wake.notify_one();
                Outcome::Later
            }
            Ok(()) if wanted.kind != WRITE => {
                // `flock(2)` also releases with the request that may wait.
                drop(queue);
                self.locks.wake();
                Outcome::Done(Ok(()))
            }
            result => Outcome::Done(result),
        }
    }

    pub(super) fn get_lock(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let wanted = LockRequest::read(body)?;
        let handle = self.handles.get(wanted.handle, request.node)?;
        let own = self.locks.owners().get(&(request.node, wanted.owner)).cloned();
        let range = range(wanted)?;
        let found = match own {
            Some(held) => control(held.file, libc::F_OFD_GETLK, range)?,
            None => control(handle, libc::F_OFD_GETLK, range)?,
        };
        let start = found.l_start.cast_unsigned();
        let end = match found.l_len {
            0 => i64::MAX.cast_unsigned(),
            len => start.saturating_add(len.cast_unsigned()).saturating_sub(1),
        };
        reply.put_u64s([start, end]);
        // The process is unknown: it may be one of the host.
        reply.put_u32s([u32::try_from(found.l_type).map_err(|_| Errno::IO)?, 0]);
        Ok(())
    }

    /// INTERRUPT: a process got a signal while it waited.
    pub(super) fn interrupt(&self, body: &mut Body<'_>) -> Outcome {
        let Ok(unique) = body.u64() else { return Outcome::Silent };
        let mut queue = self.locks.queue();
        match queue.waiting.iter().position(|waiting| waiting.unique == unique) {
            Some(index) => {
                queue.waiting.swap_remove(index);
                Outcome::Interrupted(unique)
            }
            None => {
                if queue.early.len() == EARLY_MAX {
                    queue.early.pop_front();
                }
                queue.early.push_back(unique);
                Outcome::Silent
            }
        }
    }

    /// The lock that a request means; `None` if there is nothing to release.
    fn lock_of(&self, node: u64, wanted: LockRequest) -> Result<Option<Lock>, Errno> {
        let handle = self.handles.get(wanted.handle, node)?;
        if wanted.whole {
            let operation = match wanted.kind {
                READ => FlockOperation::NonBlockingLockShared,
                WRITE => FlockOperation::NonBlockingLockExclusive,
                _ => FlockOperation::Unlock,
            };
            return Ok(Some(Lock::Whole { handle, operation }));
        }
        let owner = (node, wanted.owner);
        let known = self.locks.owners().get(&owner).cloned();
        let held = match known {
            Some(held) => held,
            None if wanted.kind == UNLOCK => return Ok(None),
            None => {
                handle.locked_ranges.store(true, Ordering::Relaxed);
                let slot = self.slots.take()?;
                let file = Arc::new(slot.keep(self.open_for_locks(node)?));
                Held { file, handle: wanted.handle }
            }
        };
        Ok(Some(Lock::Range { owner, held, range: range(wanted)? }))
    }

    /// Opened for both kinds of lock if the file can be written at all.
    fn open_for_locks(&self, node: u64) -> Result<OwnedFd, Errno> {
        let inode = self.inodes.get(node)?;
        self.reopen(&inode, OFlags::RDWR | OFlags::NONBLOCK)
            .or_else(|_| self.reopen(&inode, OFlags::RDONLY | OFlags::NONBLOCK))
    }
}

fn range(wanted: LockRequest) -> Result<libc::flock, Errno> {
    let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::INVAL);
    let l_len = match wanted.end {
        // To the end of the file, however long it gets.
        end if end == i64::MAX.cast_unsigned() => 0,
        end => signed(end - wanted.start + 1)?,
    };
    Ok(libc::flock {
        l_type: libc::c_short::try_from(wanted.kind).map_err(|_| Errno::INVAL)?,
        l_whence: 0,
        l_start: signed(wanted.start)?,
        l_len,
        l_pid: 0,
    })
}

fn control(
    file: impl AsFd,
    command: libc::c_int,
    mut lock: libc::flock,
) -> Result<libc::flock, Errno> {
    // SAFETY: these commands read and write one `struct flock`, which outlives the call.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) })?;
    Ok(lock)
}
