//! What others do to files that the guest watches, `inotify(7)`.
//!
//! The guest's kernel says which inodes are watched (WATCH), and one of its requests waits here for
//! what happens to them (WATCH_EVENTS). Both are our own, by a patch of the guest's kernel:
//! `docs/decisions/0028-changes-by-others.md`.
//!
//! The host's kernel reports to an fanotify group ([`group`]). Unlike inotify, that tells which
//! events this process has caused itself: what the guest asked for, and has reported to its own
//! processes already. Events wait in the group, whose length the host's kernel bounds, until the
//! guest asks.

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, FileType, statat};
use rustix::io::{Errno, read};
use rustix::process::getpid;

use super::inodes::{Inode, Inodes};
use super::wire::{OUT_HEADER, Reply};
use event::{Event, Report, Subject, bit};
use group::{Group, Key};

mod event;
mod group;

/// How many inodes may be watched.
const WATCHES_MAX: usize = 1 << 16;
/// Bytes of events that are read at once.
const READ: usize = 4 << 10;
/// The longest reply that the guest has room for, `FUSE_WATCH_SIZE` of our patch.
const REPLY: usize = 8 << 10;

/// All watches of a guest.
#[derive(Debug)]
pub(super) struct Watches {
    /// `/proc/self/fd`: a file that is open only as a path is marked through its link there.
    links: Arc<OwnedFd>,
    /// Created by the first watch.
    group: OnceLock<Group>,
    /// Marks change only under this lock.
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The inodes of each file that is watched: one for each mount through which it is seen.
    nodes: HashMap<Key, Vec<u64>>,
    count: usize,
    /// The WATCH_EVENTS that waits.
    waiting: Option<u64>,
    /// What did not fit into the last reply.
    reports: VecDeque<Report>,
    cookie: u32,
}

/// That an inode is watched, until this is dropped. The inode's descriptor is still open then.
#[derive(Debug)]
pub(super) struct Watch {
    watches: Arc<Watches>,
    key: Key,
    node: u64,
    directory: bool,
    link: CString,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watches.end(self);
    }
}

impl Watches {
    pub(super) fn new(links: Arc<OwnedFd>) -> Arc<Self> {
        let (group, state, wake) = (OnceLock::new(), Mutex::default(), Condvar::new());
        Arc::new(Self { links, group, state, wake })
    }

    /// Watches an inode for these events of inotify(7); none ends the watch.
    pub(super) fn watch(self: &Arc<Self>, inode: &Inode, mask: u32) -> Result<(), Errno> {
        let mut watch = inode.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if mask == 0 {
            *watch = None;
            return Ok(());
        }
        let group = self.group()?;
        if watch.is_none() {
            *watch = Some(Box::new(self.begin(inode)?));
        }
        let Some(begun) = watch.as_deref() else { return Ok(()) };
        let marks = marks(mask, begun.directory);
        if marks == 0 {
            return Ok(());
        }
        let state = self.state();
        let added = group.add((self.links.as_fd(), &begun.link), marks);
        drop(state);
        if added.is_err() {
            *watch = None;
        }
        added
    }

    fn group(&self) -> Result<&Group, Errno> {
        if let Some(group) = self.group.get() {
            return Ok(group);
        }
        let group = Group::new()?;
        Ok(self.group.get_or_init(|| group))
    }

    /// Remembers whose events are those of a file.
    fn begin(self: &Arc<Self>, inode: &Inode) -> Result<Watch, Errno> {
        let key = Key::of(inode)?;
        let link = CString::new(inode.as_fd().as_raw_fd().to_string());
        let link = link.map_err(|_| Errno::INVAL)?;
        let mut state = self.state();
        if state.count == WATCHES_MAX {
            return Err(Errno::NOSPC);
        }
        state.count += 1;
        state.nodes.entry(key.clone()).or_default().push(inode.node);
        let directory = inode.kind == FileType::Directory;
        Ok(Watch { watches: Arc::clone(self), key, node: inode.node, directory, link })
    }

    fn end(&self, watch: &Watch) {
        let mut state = self.state();
        state.count -= 1;
        let Some(nodes) = state.nodes.get_mut(&watch.key) else { return };
        nodes.retain(|node| *node != watch.node);
        if nodes.is_empty() {
            state.nodes.remove(&watch.key);
            if let Some(group) = self.group.get() {
                // It has none if adding it failed.
                let all = marks(u32::MAX, watch.directory);
                let _ = group.remove((self.links.as_fd(), &watch.link), all);
            }
        }
    }

    /// Lets a request wait for events.
    pub(super) fn wait(&self, unique: u64) -> Result<(), Errno> {
        if self.group.get().is_none() {
            return Err(Errno::INVAL);
        }
        let mut state = self.state();
        if state.waiting.is_some() {
            return Err(Errno::BUSY);
        }
        state.waiting = Some(unique);
        self.wake.notify_one();
        Ok(())
    }

    /// Takes back the request that waits, and forgets what it was to be told.
    pub(super) fn stop(&self) -> Option<u64> {
        let mut state = self.state();
        state.reports.clear();
        state.waiting.take()
    }

    /// Answers the requests that wait: calls `send` with each reply. Returns if the host's kernel
    /// does not report.
    pub(super) fn run(&self, inodes: &Inodes, send: impl Fn(&[u8])) -> Result<(), Errno> {
        loop {
            let waits = |state: &mut State| state.waiting.is_none();
            let waiting = self.wake.wait_while(self.state(), waits);
            let all_told = waiting.unwrap_or_else(PoisonError::into_inner).reports.is_empty();
            let Some(group) = self.group.get() else { continue };
            if all_told {
                self.read(group, inodes)?;
            }
            self.reply(&send);
        }
    }

    /// Waits for events, and reports those that others have caused.
    fn read(&self, group: &Group, inodes: &Inodes) -> Result<(), Errno> {
        match poll(&mut [PollFd::new(group, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let mut buffer = [0; READ];
        let mut events = match read(group, &mut buffer) {
            Ok(length) => &buffer[..length],
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error),
        };
        let own = getpid().as_raw_nonzero().get();
        while let Some(event) = Event::take(&mut events) {
            if event.process != own {
                self.report(&event, inodes);
            }
        }
        Ok(())
    }

    /// Tells one event after the other, each to everybody who watches.
    fn report(&self, event: &Event, inodes: &Inodes) {
        let mask = event.mask;
        for subject in &event.subjects {
            match subject {
                Subject::From(key, name) => self.tell(key, mask, bit::MOVED_FROM, name),
                Subject::To(key, name) => self.tell(key, mask, bit::MOVED_TO, name),
                Subject::Named(..) | Subject::Itself(_) => {}
            }
        }
        for single in event::one_by_one(mask, self.is_there(event, inodes)) {
            for subject in &event.subjects {
                match subject {
                    Subject::Named(key, name) => {
                        self.tell(key, mask, single & bit::OF_NAMES, name);
                    }
                    Subject::Itself(key) => self.tell(key, mask, single & bit::ITSELF, b""),
                    Subject::From(..) | Subject::To(..) => {}
                }
            }
        }
        for subject in &event.subjects {
            // Not deleted while this process has it open, but for the guest it is.
            if let Subject::Itself(key) = subject
                && mask & bit::ATTRIB != 0
                && self.nodes(key).into_iter().any(|node| is_removed(inodes, node))
            {
                self.tell(key, mask, bit::DELETE_SELF, b"");
            }
        }
        let mut state = self.state();
        state.cookie = state.cookie.wrapping_add(1).max(1);
    }

    /// Reports a single event to those who watch a file.
    fn tell(&self, key: &Key, event: u32, single: u32, name: &[u8]) {
        if single == 0 {
            return;
        }
        let mut state = self.state();
        let State { nodes, reports, cookie, .. } = &mut *state;
        let cookie = if single & bit::MOVED == 0 { 0 } else { *cookie };
        let mask = single | event & bit::DIRECTORY;
        let report = |node: &u64| Report { node: *node, mask, cookie, name: name.to_vec() };
        reports.extend(nodes.get(key).into_iter().flatten().map(report));
    }

    fn nodes(&self, key: &Key) -> Vec<u64> {
        self.state().nodes.get(key).cloned().unwrap_or_default()
    }

    /// Whether a name that has been both created and deleted is there.
    fn is_there(&self, event: &Event, inodes: &Inodes) -> bool {
        let both = bit::CREATE | bit::DELETE;
        event.mask & both == both
            && event.subjects.iter().any(|subject| match subject {
                Subject::Named(key, name) => {
                    self.nodes(key).into_iter().any(|node| has_name(inodes, node, name))
                }
                _ => false,
            })
    }

    /// Sends as many reports as the guest has room for, if it still waits.
    fn reply(&self, send: impl Fn(&[u8])) {
        let mut state = self.state();
        if state.reports.is_empty() {
            return;
        }
        let Some(unique) = state.waiting.take() else { return };
        let mut buffer = [0; OUT_HEADER + REPLY];
        let mut reply = Reply::new(&mut buffer);
        while let Some(report) = state.reports.front() {
            if reply.body_len() + report.size() > REPLY {
                break;
            }
            report.put(&mut reply);
            state.reports.pop_front();
        }
        drop(state);
        send(reply.message(unique, Ok(())));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of fanotify(7) that lead to those of inotify(7).
fn marks(mask: u32, directory: bool) -> u64 {
    let itself = mask & bit::ITSELF;
    // See `is_removed`.
    let removed = if mask & bit::DELETE_SELF != 0 { bit::ATTRIB } else { 0 };
    if !directory {
        return u64::from(itself | removed);
    }
    let renamed = if mask & bit::MOVED != 0 { bit::RENAME } else { 0 };
    let names = mask & (bit::CREATE | bit::DELETE) | renamed;
    match itself | removed | names {
        0 => 0,
        events => u64::from(events | bit::ON_CHILD | bit::DIRECTORY),
    }
}

fn has_name(inodes: &Inodes, directory: u64, name: &[u8]) -> bool {
    let (Ok(directory), Ok(name)) = (inodes.get(directory), CString::new(name)) else {
        return false;
    };
    statat(&*directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Whether a file, which is still open here, has no name any more.
fn is_removed(inodes: &Inodes, node: u64) -> bool {
    let attributes = inodes.get(node).and_then(|inode| inode.stat());
    attributes.is_ok_and(|attributes| attributes.stx_nlink == 0)
}

#[cfg(test)]
mod tests;
