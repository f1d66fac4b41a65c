//! Drivers that break the rules of a queue, for every device: chains that no driver may make, and
//! random noise.

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::super::queue::GuestMemory;
use super::super::{Ready, Serve};
use super::*;

/// A way to break a queue: its name and its descriptors from number 0 on.
pub(crate) type Malformed = (&'static str, Vec<Raw>);

/// Chains that no driver may make, of a queue with `size` descriptors. Those whose name says
/// "table" use an indirect table, which this writes to [`TABLES`].
pub(crate) fn malformed(memory: &GuestMemory, size: u16) -> Vec<Malformed> {
    let buffer = HIGH_START;
    let table = |at: u64, raw: &[Raw]| {
        for (index, &(addr, len, flags, next)) in raw.iter().enumerate() {
            let at = GuestAddress(at + index as u64 * 16);
            memory
                .write_obj(RawDescriptor::from(Descriptor::new(addr, len, flags, next)), at)
                .unwrap();
        }
        at
    };
    let nested = table(TABLES, &[(TABLES, 16, INDIRECT, 0)]);
    let looping = table(TABLES + 0x100, &[(buffer, 64, NEXT, 1), (buffer, 64, NEXT, 0)]);
    let cut_off = table(TABLES + 0x200, &[(buffer, 64, NEXT, 9)]);
    let outside = table(TABLES + 0x300, &[(LOW_END, 64, 0, 0)]);
    let mixed = table(TABLES + 0x400, &[(buffer, 64, NEXT | WRITE, 1), (buffer, 64, 0, 0)]);
    let long: Vec<Raw> = (1..=size + 1).map(|next| (buffer, 1, NEXT, next)).collect();
    let long_table = table(TABLES + 0x1000, &long);
    let long_bytes = u32::from(size + 1) * 16;
    vec![
        ("loop of one", vec![(buffer, 64, NEXT, 0)]),
        ("loop of two", vec![(buffer, 64, NEXT, 1), (buffer, 64, NEXT, 0)]),
        (
            "loop of two writable",
            vec![(buffer, 64, NEXT | WRITE, 1), (buffer, 64, NEXT | WRITE, 0)],
        ),
        ("next out of range", vec![(buffer, 64, NEXT, size)]),
        ("next far out of range", vec![(buffer, 64, NEXT, u16::MAX)]),
        ("readable after writable", vec![(buffer, 64, NEXT | WRITE, 1), (buffer, 64, 0, 0)]),
        ("in the hole", vec![(LOW_END, 64, 0, 0)]),
        ("into the hole", vec![(LOW_END - 32, 64, 0, 0)]),
        ("across the hole", vec![(LOW_END - 32, 0x10_0040, WRITE, 0)]),
        ("behind the end", vec![(HIGH_END, 1, WRITE, 0)]),
        ("over the end", vec![(HIGH_END - 16, 64, WRITE, 0)]),
        ("wrapping", vec![(u64::MAX - 16, 64, 0, 0)]),
        ("wrapping writable", vec![(u64::MAX - 16, 64, WRITE, 0)]),
        ("huge", vec![(0, u32::MAX, 0, 0)]),
        ("more than 4 GiB", vec![(0, u32::MAX, NEXT, 1), (0, u32::MAX, 0, 0)]),
        ("empty", vec![(buffer, 0, 0, 0)]),
        ("empty writable", vec![(buffer, 0, WRITE, 0)]),
        ("empty outside of memory", vec![(u64::MAX, 0, NEXT, 1), (LOW_END, 0, WRITE, 0)]),
        ("one byte", vec![(buffer, 1, 0, 0)]),
        ("one byte writable", vec![(buffer, 1, WRITE, 0)]),
        ("table empty", vec![(TABLES, 0, INDIRECT, 0)]),
        ("table of half a descriptor", vec![(TABLES, 8, INDIRECT, 0)]),
        ("table nested", vec![(nested, 16, INDIRECT, 0)]),
        ("table looping", vec![(looping, 32, INDIRECT, 0)]),
        ("table cut off", vec![(cut_off, 16, INDIRECT, 0)]),
        ("table names the hole", vec![(outside, 16, INDIRECT, 0)]),
        ("table mixed", vec![(mixed, 32, INDIRECT, 0)]),
        ("table in the hole", vec![(LOW_END, 64, INDIRECT, 0)]),
        ("table wrapping", vec![(u64::MAX - 15, 64, INDIRECT, 0)]),
        ("table oversized", vec![(TABLES, (1 << 20) + 16, INDIRECT, 0)]),
        ("table longer than the queue", vec![(long_table, long_bytes, INDIRECT, 0)]),
    ]
}

/// Feeds every malformed chain to every queue of a device; `make` gives a fresh one each time.
///
/// The device may answer or fail; it may neither panic nor write outside of what it was offered.
pub(crate) fn survives_malformed<S: Serve>(sizes: &[u16], make: impl Fn() -> S) {
    for queue in 0..sizes.len() {
        let count = malformed(&memory(), sizes[queue]).len();
        for case in 0..count {
            let memory = memory();
            let (name, raw) = malformed(&memory, sizes[queue]).swap_remove(case);
            let mut driver = Driver::new(&memory, sizes);
            let mut logic = make();
            logic.start(0, &driver.sources).unwrap();
            driver.store(queue, 0, &raw);
            driver.offer(queue, 0);
            let before = low_memory(&memory);
            let served = driver.call(&mut logic, Ready::Queue(queue));
            let after = low_memory(&memory);
            assert!(before == after, "{}: {name}: wrote where it must not", S::NAME);
            if served.is_ok() {
                let used = driver.used(queue);
                assert!(used.len() <= 1, "{}: {name}: gave back {used:?}", S::NAME);
            }
            logic.stop(&driver.sources);
        }
    }
}

/// Low memory behind the rings: no well-formed buffer lies there.
fn low_memory(memory: &GuestMemory) -> Vec<u8> {
    let start = RINGS + 8 * RING_BYTES;
    let mut bytes = vec![0; usize::try_from(LOW_END - start).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
    bytes
}

/// Feeds random descriptor tables to a device, the same ones each time.
pub(crate) fn survives_noise<S: Serve>(sizes: &[u16], rounds: u32, make: impl Fn() -> S) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..rounds {
        let memory = memory();
        let mut driver = Driver::new(&memory, sizes);
        let mut logic = make();
        logic.start(0, &driver.sources).unwrap();
        for _ in 0..4 {
            let queue = random.below(sizes.len() as u64);
            let queue = usize::try_from(queue).unwrap();
            let size = sizes[queue];
            for at in 0..size.min(16) {
                driver.store(queue, at, &[random.descriptor(size)]);
            }
            for _ in 0..random.below(4) {
                driver.offer(queue, random.number(u64::from(size.min(17))));
            }
            if random.below(64) == 0 {
                driver.set_available(queue, random.number(1 << 16));
            }
            if driver.call(&mut logic, Ready::Queue(queue)).is_err() {
                break;
            }
        }
        logic.stop(&driver.sources);
    }
}

/// A small random generator (xorshift64*): the same seed repeats a failure.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }

    /// Fewer than `limit` random bytes.
    pub(crate) fn bytes(&mut self, limit: u64) -> Vec<u8> {
        (0..self.below(limit)).map(|_| u8::try_from(self.below(256)).unwrap()).collect()
    }

    fn number(&mut self, limit: u64) -> u16 {
        u16::try_from(self.below(limit)).unwrap()
    }

    /// A random descriptor, often nearly valid.
    fn descriptor(&mut self, size: u16) -> Raw {
        let addr = match self.below(8) {
            0 => self.below(u64::MAX),
            1 => LOW_END - self.below(64),
            2 => HIGH_END - self.below(64),
            3 => TABLES + self.below(64),
            _ => HIGH_START + self.below(0x10_0000),
        };
        let len = match self.below(4) {
            0 => self.below(1 << 32),
            1 => self.below(64),
            _ => self.below(0x2000),
        };
        let flags = self.number(8) & if self.below(4) == 0 { 7 } else { NEXT | WRITE };
        let next = self.number(u64::from(size.min(18)) + 1);
        (addr, u32::try_from(len).unwrap(), flags, next)
    }
}
