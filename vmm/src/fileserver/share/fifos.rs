//! Requests about FIFOs: open them, and ask what is possible.

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Share;
use super::data::UNSHARED;
use crate::fileserver::fifos::Question;
use crate::fileserver::inodes::Inode;
use crate::fileserver::wire::{Body, Reply, Request};

impl Share {
    /// Opens a FIFO, without waiting for its other end.
    pub(super) fn open_fifo(
        &self,
        inode: &Inode,
        flags: u32,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        if inode.place.is_unshared() {
            // The guest has the pipe, and says nothing more of it.
            reply.put_u64s([0]);
            reply.put_u32s([UNSHARED, 0]);
            return Ok(());
        }
        let access = OFlags::from_bits_retain(flags) & OFlags::ACCMODE;
        let slot = self.slots.take()?;
        let file = self.reopen(inode, access | OFlags::NONBLOCK)?;
        self.put_open(inode, slot.keep(file), 0, reply);
        Ok(())
    }

    /// FIFO_POLL: `struct fuse_poll_in` and `fuse_poll_out`.
    pub(super) fn poll_fifo(
        &self,
        request: &Request,
        body: &mut Body<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let question = Question::read(body)?;
        let handle = self.handles.get(question.handle, request.node)?;
        if handle.kind != FileType::Fifo {
            return Err(Errno::INVAL);
        }
        reply.put_u32s([self.fifos.answer(question, &handle)?, 0]);
        Ok(())
    }
}
