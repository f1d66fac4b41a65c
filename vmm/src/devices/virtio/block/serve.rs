//! Answers the requests of a block device's queue.
//!
//! Data goes directly between guest memory and the disk. An error in a request is reported in its
//! status byte; the device fails only if a chain has no room for that byte.

use std::io;

use vm_memory::VolatileSlice;

use super::super::queue::{Chain, GuestMemory, QueueError};
use super::super::{Context, Ready, Serve, ServeError};
use super::disk::{Disk, RawDisk};
use super::request::{HEADER_BYTES, Range, Request, SEGMENT_BYTES, Segment, Status};
use super::{F_FLUSH, SEGMENTS_MAX, SERIAL_BYTES};
use crate::devices::rate_limit::guest_warn;

/// The most data that one request moves, so that it does not delay a reset for long.
const TRANSFER_MAX: usize = 64 << 20;

/// The logic of the device.
#[derive(Debug)]
pub(crate) struct Block<D = RawDisk> {
    pub(super) disk: D,
    pub(super) read_only: bool,
    pub(super) serial: [u8; SERIAL_BYTES],
    /// The driver did not negotiate flushes, so each write must be durable by itself, §5.2.6.2.
    pub(super) write_through: bool,
}

impl<D: Disk> Serve for Block<D> {
    const NAME: &'static str = "blk";
    const SYSCALLS: &'static [i64] = &[
        libc::SYS_preadv,    // reads
        libc::SYS_pwritev,   // writes
        libc::SYS_fdatasync, // flushes
        libc::SYS_fallocate, // discards and zeroes
        libc::SYS_pwrite64,  // zeroes where the file system has no other way
    ];

    fn start(&mut self, features: u64, _: &super::super::worker::Sources) -> io::Result<()> {
        self.write_through = features & F_FLUSH == 0;
        Ok(())
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        let (Ready::Queue(0), [queue]) = (ready, &mut *context.queues) else { return Ok(()) };
        let memory = context.memory;
        queue.drain(memory, |chain| self.answer(chain, memory))
    }
}

impl<D: Disk> Block<D> {
    /// Executes the request of a chain and writes its status; returns how many bytes were written
    /// without a gap.
    fn answer(&self, chain: &mut Chain, memory: &GuestMemory) -> Result<usize, ServeError> {
        let Some(room) = chain.writable.left().checked_sub(1) else {
            return Err(ServeError::Request("block request has no status byte"));
        };
        let result = self.execute(chain, memory, room)?;
        // The status is the last byte, whatever room is before it.
        chain.writable.slices(memory, chain.writable.left() - 1)?;
        let (status, filled) = result.map_or_else(|status| (status, 0), |n| (Status::Done, n));
        chain.writable.write(memory, &[status as u8])?;
        Ok(if filled == room { room + 1 } else { filled })
    }

    /// Executes the request of a chain; returns how much of its `room` for data was filled.
    fn execute(
        &self,
        chain: &mut Chain,
        memory: &GuestMemory,
        room: usize,
    ) -> Result<Result<usize, Status>, QueueError> {
        if chain.readable.left() < HEADER_BYTES {
            return Ok(Err(Status::Failed));
        }
        let mut header = [0; HEADER_BYTES];
        chain.readable.read(memory, &mut header)?;
        let request = match Request::parse(&header) {
            Ok(request) => request,
            Err(status) => return Ok(Err(status)),
        };
        Ok(match request {
            Request::Read(sector) => match self.range(sector, room) {
                Ok(range) => self.read(&chain.writable.slices(memory, room)?, range),
                Err(status) => Err(status),
            },
            Request::Write(sector) => match self.range(sector, chain.readable.left()) {
                Ok(range) if !self.read_only => {
                    let data = chain.readable.slices(memory, chain.readable.left())?;
                    self.write(&data, range)
                }
                _ => Err(Status::Failed),
            },
            Request::Flush => done(self.disk.flush()),
            Request::Identify if room >= SERIAL_BYTES => {
                chain.writable.write(memory, &self.serial)?;
                Ok(SERIAL_BYTES)
            }
            Request::Identify => Err(Status::Failed),
            Request::Discard | Request::Zero if self.read_only => Err(Status::Failed),
            Request::Discard | Request::Zero => self.segments(request, chain, memory)?,
        })
    }

    fn range(&self, sector: u64, len: usize) -> Result<Range, Status> {
        if len > TRANSFER_MAX {
            return Err(Status::Failed);
        }
        Range::new(sector, len as u64, self.disk.size())
    }

    fn read(&self, room: &[VolatileSlice<'_>], range: Range) -> Result<usize, Status> {
        transfer(room, range, |rest, offset| self.disk.read_at(rest, offset))
    }

    fn write(&self, data: &[VolatileSlice<'_>], range: Range) -> Result<usize, Status> {
        transfer(data, range, |rest, offset| self.disk.write_at(rest, offset))?;
        if self.write_through {
            done(self.disk.flush())?;
        }
        Ok(0)
    }

    /// Discards ranges or fills them with zeroes; all are checked before the first is touched.
    fn segments(
        &self,
        request: Request,
        chain: &mut Chain,
        memory: &GuestMemory,
    ) -> Result<Result<usize, Status>, QueueError> {
        let len = chain.readable.left();
        if len == 0 || !len.is_multiple_of(SEGMENT_BYTES) || len / SEGMENT_BYTES > SEGMENTS_MAX {
            return Ok(Err(Status::Failed));
        }
        let mut bytes = vec![0; len];
        chain.readable.read(memory, &mut bytes)?;
        let size = self.disk.size();
        let segments: Result<Vec<_>, Status> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|segment| Segment::parse(segment, request, size))
            .collect();
        Ok(segments.and_then(|segments| {
            for Segment { range: Range { start, len }, unmap } in segments {
                match request {
                    _ if len == 0 => Ok(0),
                    Request::Discard => done(self.disk.discard(start, len)),
                    _ => done(self.disk.zero(start, len, unmap)),
                }?;
            }
            if self.write_through { done(self.disk.flush()) } else { Ok(0) }
        }))
    }
}

/// Repeats a call until all of `slices` is moved.
fn transfer(
    slices: &[VolatileSlice<'_>],
    range: Range,
    call: impl Fn(&[VolatileSlice<'_>], u64) -> io::Result<usize>,
) -> Result<usize, Status> {
    let mut rest = slices.to_vec();
    let mut offset = range.start;
    let end = range.start + range.len;
    while offset < end {
        match call(&rest, offset) {
            // The file has shrunk.
            Ok(0) => return Err(Status::Failed),
            Ok(count) => {
                offset += count as u64;
                if offset < end {
                    skip(&mut rest, count);
                }
            }
            Err(error) => return done(Err(error)),
        }
    }
    usize::try_from(range.len).map_err(|_| Status::Failed)
}

/// Drops the first `count` bytes.
fn skip(slices: &mut Vec<VolatileSlice<'_>>, mut count: usize) {
    let whole = slices.iter().take_while(|slice| {
        let taken = slice.len() <= count;
        if taken {
            count -= slice.len();
        }
        taken
    });
    let whole = whole.count();
    slices.drain(..whole);
    if let Some(first) = slices.first_mut()
        && let Ok(rest) = first.offset(count)
    {
        *first = rest;
    }
}

/// Turns a failure of the host into a status, which is all that a guest may know.
fn done(result: io::Result<()>) -> Result<usize, Status> {
    match result {
        Ok(()) => Ok(0),
        Err(error) => {
            guest_warn!("blk: a request failed: {error}");
            Err(Status::Failed)
        }
    }
}
