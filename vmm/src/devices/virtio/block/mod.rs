//! The block device, VIRTIO 1.2 §5.2: a file or block device of the host as a disk.
//!
//! There is one queue, which one thread serves in order. Image formats, several queues, geometry
//! and lifetimes are not offered: the bytes of the file are those of the disk.

use std::fs::File;
use std::io;

use super::{ConfigSpace, Device, Identity};

mod disk;
mod request;
mod serve;

use disk::{Disk, RawDisk};
use request::{DISCARD_SECTORS_MAX, SECTOR_BYTES, ZERO_SECTORS_MAX};
pub(crate) use serve::Block;

/// The device type, §5.2.1.
const DEVICE_ID: u32 = 2;
const QUEUE_SIZES: &[u16] = &[128];
/// Features, §5.2.3.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// Data buffers of one request: the size of the queue less header and status.
const BUFFERS_MAX: u32 = 126;
/// Ranges in one discard or request for zeroes.
const SEGMENTS_MAX: usize = 32;
/// Bytes of a serial, §5.2.6.
const SERIAL_BYTES: usize = 20;
const CONFIG_BYTES: usize = 60;

/// Makes a disk of `file`; the guest sees `serial` as its serial number.
///
/// # Errors
/// When `file` is neither a regular file nor a block device, or the serial is longer than 20
/// bytes.
pub(crate) fn device(file: File, read_only: bool, serial: &str) -> io::Result<Device<Block>> {
    let logic = logic(RawDisk::new(file)?, read_only, serial)?;
    let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
    features |= if read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
    let config = ConfigSpace::read_only(config(logic.disk.size()));
    let identity = Identity { device_id: DEVICE_ID, features, queue_sizes: QUEUE_SIZES };
    Ok(Device::new(identity, config, logic))
}

fn logic<D: Disk>(disk: D, read_only: bool, serial: &str) -> io::Result<Block<D>> {
    let mut padded = [0; SERIAL_BYTES];
    let Some(place) = padded.get_mut(..serial.len()) else {
        let what = format!("serial {serial:?} is longer than {SERIAL_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    };
    place.copy_from_slice(serial.as_bytes());
    Ok(Block { disk, read_only, serial: padded, write_through: true })
}

/// The configuration space, §5.2.4; fields of features that are not offered stay 0.
fn config(disk_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; CONFIG_BYTES];
    // An incomplete sector at the end of the disk does not count.
    bytes[0..8].copy_from_slice(&(disk_bytes / SECTOR_BYTES).to_le_bytes());
    let segments = 32_u32;
    for (offset, value) in [
        (12, BUFFERS_MAX),
        (20, 512),
        (36, DISCARD_SECTORS_MAX),
        (40, segments),
        (44, 1),
        (48, ZERO_SECTORS_MAX),
        (52, segments),
    ] {
        bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    // `write_zeroes_may_unmap`: zeroes may become holes.
    bytes[56] = 1;
    bytes
}

#[cfg(test)]
mod tests;
