//! The entropy device, VIRTIO 1.2 §5.4: bytes from a file that is given, such as `/dev/urandom`.
//!
//! The bytes pass through a bounce buffer: the source never reads into guest memory, so all sources
//! behave alike.

use std::fs::File;
use std::io::{self, Read};

use super::{ConfigSpace, Context, Device, Identity, Ready, Serve, ServeError};

/// The device type, §5.4.1.
const DEVICE_ID: u32 = 4;
const QUEUE_SIZES: &[u16] = &[64];
/// The most that one request gets; §5.4.6.1 lets a device give less than was asked for.
const REQUEST_MAX: usize = 64 << 10;
/// Bytes read at once.
const CHUNK_BYTES: usize = 4096;

/// Makes a device that hands out what `source` gives.
pub(crate) fn device(source: File) -> Device<Rng> {
    let identity = Identity { device_id: DEVICE_ID, features: 0, queue_sizes: QUEUE_SIZES };
    Device::new(identity, ConfigSpace::read_only(Vec::new()), Rng { source })
}

/// The logic of the device.
#[derive(Debug)]
pub(crate) struct Rng<R = File> {
    source: R,
}

impl<R: Read + Send + 'static> Serve for Rng<R> {
    const NAME: &'static str = "rng";
    // Only the source is read, and the worker's own list has `read`.
    const SYSCALLS: &'static [i64] = &[];

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        let (Ready::Queue(0), [queue]) = (ready, &mut *context.queues) else { return Ok(()) };
        let memory = context.memory;
        queue.drain(memory, |chain| {
            // §5.4.6.2: the driver offers writable buffers only, and some room in them.
            if chain.readable.left() > 0 || chain.writable.left() == 0 {
                return Err(ServeError::Request("entropy request is not for writing"));
            }
            while chain.writable.left() > 0 && chain.writable.used() < REQUEST_MAX {
                let mut chunk = [0; CHUNK_BYTES];
                let room = chain.writable.left().min(CHUNK_BYTES);
                let room = room.min(REQUEST_MAX - chain.writable.used());
                let Some(chunk) = chunk.get_mut(..room) else { break };
                let count = read(&mut self.source, chunk)?;
                chain.writable.write(memory, chunk.get(..count).unwrap_or_default())?;
            }
            Ok(chain.writable.used())
        })
    }
}

/// Reads at least one byte: a source that ends would leave the guest without entropy.
fn read(source: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(chunk) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "source ended")),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::{self, Driver, Part};
    use super::*;

    fn sevens() -> Rng<io::Repeat> {
        Rng { source: io::repeat(7) }
    }

    #[test]
    fn every_byte_of_a_request_is_filled() {
        let memory = mock::memory();
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        let request = driver.add(0, &[Part::In(10), Part::In(5000)]);
        driver.call(&mut sevens(), Ready::Queue(0)).unwrap();
        assert_eq!(driver.used(0), [(request.head, 5010)]);
        assert_eq!(driver.written(&request, 5010), [7; 5010]);
    }

    #[test]
    fn a_large_request_gets_64_kib() {
        let memory = mock::memory();
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        let request = driver.add(0, &[Part::In(0x2_0000)]);
        driver.call(&mut sevens(), Ready::Queue(0)).unwrap();
        assert_eq!(driver.used(0), [(request.head, 0x1_0000)]);
    }

    #[test]
    fn a_request_that_cannot_be_written_fails_the_device() {
        for parts in [&[Part::Out(b"x")][..], &[Part::Out(b"x"), Part::In(8)], &[Part::In(0)]] {
            let memory = mock::memory();
            let mut driver = Driver::new(&memory, QUEUE_SIZES);
            driver.add(0, parts);
            assert!(driver.call(&mut sevens(), Ready::Queue(0)).is_err());
        }
    }

    #[test]
    fn a_source_that_ends_fails_the_device() {
        let memory = mock::memory();
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        driver.add(0, &[Part::In(8)]);
        let mut empty = Rng { source: io::empty() };
        assert!(matches!(driver.call(&mut empty, Ready::Queue(0)), Err(ServeError::Host(_))));
    }

    #[test]
    fn malformed_chains_are_survived() {
        mock::survives_malformed(QUEUE_SIZES, sevens);
        mock::survives_noise(QUEUE_SIZES, 300, sevens);
    }
}
