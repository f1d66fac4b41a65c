//! Queues, configuration spaces and workers, against a driver that is not always well-behaved.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mock::{self, Driver, HIGH_END, HIGH_START, INDIRECT, LOW_END, NEXT, Part, WRITE};
use super::queue::GuestMemory;
use super::transport::Line;
use super::*;

const SIZES: &[u16] = &[16];

/// The result of popping a chain of these descriptors.
fn pop(raw: &[mock::Raw]) -> Result<Option<queue::Chain>, QueueError> {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    driver.store(0, 0, raw);
    driver.offer(0, 0);
    driver.queues[0].pop(&memory)
}

#[test]
fn a_chain_is_split_by_direction() {
    let raw = [
        (HIGH_START, 10, NEXT, 1),
        (HIGH_START + 10, 20, NEXT, 2),
        (HIGH_START + 100, 30, NEXT | WRITE, 3),
        (HIGH_START + 200, 0, WRITE, 0),
    ];
    let chain = pop(&raw).unwrap().unwrap();
    assert_eq!((chain.readable.left(), chain.writable.left()), (30, 30));
}

#[test]
fn buffers_end_where_memory_ends() {
    assert!(pop(&[(LOW_END - 16, 16, 0, 0)]).is_ok());
    assert!(pop(&[(HIGH_END - 16, 16, WRITE, 0)]).is_ok());
    for (addr, len) in [(LOW_END - 16, 17), (LOW_END, 1), (HIGH_END - 16, 17), (u64::MAX, 2)] {
        let result = pop(&[(addr, len, 0, 0)]);
        assert!(matches!(result, Err(QueueError::Buffer { .. })), "{addr:#x} {len}");
    }
}

#[test]
fn malformed_chains_have_their_errors() {
    let memory = mock::memory();
    for (name, raw) in mock::malformed(&memory, SIZES[0]) {
        let mut driver = Driver::new(&memory, SIZES);
        driver.store(0, 0, &raw);
        driver.offer(0, 0);
        let result = driver.queues[0].pop(&memory);
        let words: Vec<&str> = name.split(' ').collect();
        match words.as_slice() {
            // Valid for a queue, if not for most devices.
            ["empty" | "one", ..] => assert!(result.is_ok(), "{name}: {result:?}"),
            _ => assert!(result.is_err(), "{name}: {result:?}"),
        }
    }
}

#[test]
fn an_indirect_table_is_followed() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    driver.store(0, 4, &[(HIGH_START, 5, NEXT, 1), (HIGH_START + 5, 6, WRITE, 0)]);
    // The indirect table is the part of the queue's own table that was just written.
    let table = mock::queue(0, SIZES[0]).desc_table() + 4 * 16;
    driver.store(0, 0, &[(table, 32, INDIRECT, 0)]);
    driver.offer(0, 0);
    let chain = driver.queues[0].pop(&memory).unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.left(), chain.writable.left()), (0, 5, 6));
}

#[test]
fn a_head_outside_of_the_queue_is_an_error() {
    let memory = mock::memory();
    for head in [16, 17, u16::MAX] {
        let mut driver = Driver::new(&memory, SIZES);
        driver.offer(0, head);
        assert!(matches!(driver.queues[0].pop(&memory), Err(QueueError::Chain { .. })));
    }
}

#[test]
fn more_chains_than_the_queue_holds_are_an_error() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    driver.set_available(0, 17);
    assert!(matches!(driver.queues[0].pop(&memory), Err(QueueError::Rings(_))));
}

#[test]
fn a_chain_put_back_is_popped_again() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    let request = driver.add(0, &[Part::Out(b"again")]);
    for _ in 0..2 {
        let chain = driver.queues[0].pop(&memory).unwrap().unwrap();
        assert_eq!(chain.head, request.head);
        assert!(driver.queues[0].pop(&memory).unwrap().is_none());
        driver.queues[0].unpop();
    }
}

#[test]
fn buffers_are_consumed_front_to_back() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    let request = driver.add(0, &[Part::Out(b"abc"), Part::Out(b"defg"), Part::In(3), Part::In(9)]);
    let mut chain = driver.queues[0].pop(&memory).unwrap().unwrap();
    let (mut first, mut second) = ([0; 5], [0; 2]);
    chain.readable.read(&memory, &mut first).unwrap();
    chain.readable.read(&memory, &mut second).unwrap();
    assert_eq!((&first, &second), (b"abcde", b"fg"));
    assert_eq!((chain.readable.left(), chain.readable.used()), (0, 7));
    let short = chain.readable.read(&memory, &mut [0]);
    assert!(matches!(short, Err(QueueError::Short { has: 0, needs: 1 })));
    chain.writable.write(&memory, b"12345").unwrap();
    chain.writable.write(&memory, b"678").unwrap();
    assert!(chain.writable.write(&memory, &[0; 5]).is_err());
    assert_eq!(driver.written(&request, 8), b"12345678");
}

#[test]
fn slices_stop_where_the_buffers_do() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    driver.add(0, &[Part::In(3), Part::In(9)]);
    let mut chain = driver.queues[0].pop(&memory).unwrap().unwrap();
    let lengths = |slices: Vec<vm_memory::VolatileSlice<'_>>| {
        slices.iter().map(vm_memory::VolatileSlice::len).collect::<Vec<_>>()
    };
    assert_eq!(lengths(chain.writable.slices(&memory, 5).unwrap()), [3, 2]);
    assert_eq!(lengths(chain.writable.slices(&memory, usize::MAX).unwrap()), [7]);
    assert!(chain.writable.slices(&memory, 1).unwrap().is_empty());
}

/// A queue with event indices, and where the driver and the device write theirs.
fn with_event_index(memory: &GuestMemory) -> (DeviceQueue, Arc<Line>, GuestAddress, GuestAddress) {
    let mut queue = mock::queue(0, SIZES[0]);
    queue.set_event_idx(true);
    assert!(queue.is_valid(memory));
    let used_event = GuestAddress(queue.avail_ring() + 4 + 2 * u64::from(SIZES[0]));
    let avail_event = GuestAddress(queue.used_ring() + 4 + 8 * u64::from(SIZES[0]));
    let line = Arc::new(Line::new().unwrap());
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    (DeviceQueue::new(queue, kick, Arc::clone(&line)), line, used_event, avail_event)
}

#[test]
fn a_driver_is_interrupted_at_its_event_index_only() {
    let memory = mock::memory();
    let _driver = Driver::new(&memory, SIZES);
    let (mut queue, line, used_event, _) = with_event_index(&memory);
    memory.write_obj(2_u16, used_event).unwrap();
    let mut interrupts = Vec::new();
    for head in 0..5 {
        queue.complete(&memory, head, 0).unwrap();
        queue.signal(&memory).unwrap();
        interrupts.push(line.irq().read().is_ok());
    }
    assert_eq!(interrupts, [false, false, true, false, false]);
}

#[test]
fn a_batch_that_passes_the_event_index_interrupts_once() {
    let memory = mock::memory();
    let _driver = Driver::new(&memory, SIZES);
    let (mut queue, line, used_event, _) = with_event_index(&memory);
    memory.write_obj(2_u16, used_event).unwrap();
    for head in 0..5 {
        queue.complete(&memory, head, 0).unwrap();
    }
    queue.signal(&memory).unwrap();
    queue.signal(&memory).unwrap();
    assert_eq!(line.irq().read().unwrap(), 1);
}

/// Address of the driver's flags, by which it declines interrupts, VIRTIO 1.2 §2.7.6.
fn flags() -> GuestAddress {
    GuestAddress(mock::queue(0, SIZES[0]).avail_ring())
}

#[test]
fn a_driver_without_event_indices_is_not_interrupted_while_it_does_not_want_it() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    let mut interrupted = |flags_now: u16| {
        memory.write_obj(flags_now, flags()).unwrap();
        driver.queues[0].complete(&memory, 0, 0).unwrap();
        driver.queues[0].signal(&memory).unwrap();
        driver.line.irq().read().is_ok()
    };
    // The bits above are not used, and may be anything.
    assert_eq!([0, 1, 0xfffe, 0xffff, 0].map(&mut interrupted), [true, false, true, false, true]);
    // There is no interrupt if nothing was published.
    driver.queues[0].signal(&memory).unwrap();
    assert!(driver.line.irq().read().is_err());
}

#[test]
fn a_driver_with_event_indices_is_interrupted_whatever_its_flags() {
    let memory = mock::memory();
    let _driver = Driver::new(&memory, SIZES);
    let (mut queue, line, used_event, _) = with_event_index(&memory);
    memory.write_obj(0_u16, used_event).unwrap();
    memory.write_obj(1_u16, flags()).unwrap();
    queue.complete(&memory, 0, 0).unwrap();
    queue.signal(&memory).unwrap();
    assert!(line.irq().read().is_ok());
}

#[test]
fn arming_asks_for_the_next_chain_and_notices_one_that_came() {
    let memory = mock::memory();
    let driver = Driver::new(&memory, SIZES);
    let (mut queue, _, _, avail_event) = with_event_index(&memory);
    assert!(!queue.arm(&memory).unwrap());
    driver.store(0, 0, &[(HIGH_START, 1, 0, 0)]);
    driver.offer(0, 0);
    assert!(queue.arm(&memory).unwrap());
    queue.pop(&memory).unwrap().unwrap();
    assert!(!queue.arm(&memory).unwrap());
    assert_eq!(memory.read_obj::<u16>(avail_event).unwrap(), 1);
}

#[test]
fn a_driver_that_never_ceases_does_not_keep_the_worker() {
    let memory = mock::memory();
    let driver = Driver::new(&memory, SIZES);
    let (mut queue, line, ..) = with_event_index(&memory);
    driver.store(0, 0, &[(HIGH_START, 1, 0, 0)]);
    driver.offer(0, 0);
    let mut served = 0;
    let answer = |_: &mut queue::Chain| {
        served += 1;
        assert!(served < 1000, "the queue is never left");
        driver.offer(0, 0);
        Ok(0)
    };
    queue.drain(&memory, answer).unwrap();
    assert!(queue.kick().read().is_ok(), "nobody comes back to the queue");
    assert!(line.irq().read().is_ok(), "the driver is not told");
}

#[test]
fn a_configuration_space_reads_as_zero_outside() {
    let config = ConfigSpace::read_only(vec![1, 2, 3]);
    let mut bytes = [9; 4];
    config.read(1, &mut bytes);
    assert_eq!(bytes, [2, 3, 0, 0]);
    config.read(u64::MAX - 1, &mut bytes[..1]);
    assert_eq!(bytes[0], 0);
}

#[test]
fn a_driver_writes_the_writable_range_only() {
    let config = ConfigSpace::with_writable(vec![0; 8], 4..6);
    config.write(0, &[1; 16]);
    let mut bytes = [0; 8];
    config.read(0, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 0, 1, 1, 0, 0]);
    config.write(u64::MAX - 3, &[1; 4]);
    assert_eq!(config.generation(), 0);
    config.set_u32(0, 0x0403_0201);
    assert_eq!((config.u32(0), config.generation()), (0x0403_0201, 1));
    config.set_u32(6, 1);
    assert_eq!(config.generation(), 1);
}

/// Counts calls; fails when it reads an "x".
#[derive(Debug, Default)]
struct Counter {
    served: Arc<AtomicU32>,
    stopped: Arc<AtomicU32>,
}

impl Serve for Counter {
    const NAME: &'static str = "counter";
    const SYSCALLS: &'static [i64] = &[];

    fn serve(&mut self, _: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        while let Some(mut chain) = context.queues[0].pop(context.memory)? {
            let mut byte = [0];
            chain.readable.read(context.memory, &mut byte)?;
            if byte == *b"x" {
                return Err(ServeError::Request("x"));
            }
            context.queues[0].complete(context.memory, chain.head, 0)?;
            self.served.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn stop(&mut self, _: &Sources) {
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_worker_serves_kicks_fails_alone_and_can_start_again() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, SIZES);
    let line = Arc::clone(&driver.line);
    let (served, stopped) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
    let logic = Counter { served: Arc::clone(&served), stopped: Arc::clone(&stopped) };
    let identity = Identity { device_id: 1, features: 0, queue_sizes: SIZES };
    let mut device = Device::new(identity, ConfigSpace::read_only(vec![]), logic);
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let activate = |device: &mut Device<Counter>| {
        let queue = mock::queue(0, SIZES[0]);
        let queues = vec![DeviceQueue::new(queue, Arc::clone(&kick), Arc::clone(&line))];
        device.activate(Activation { memory: Memory::new(memory.clone()), queues, features: 0 })
    };
    activate(&mut device).unwrap();
    assert!(activate(&mut device).is_err(), "activated twice");
    driver.add(0, &[Part::Out(b"a")]);
    kick.write(1).unwrap();
    wait_for("serving", || served.load(Ordering::SeqCst) == 1);
    assert_eq!(line.notifications(), 1);
    driver.add(0, &[Part::Out(b"x")]);
    kick.write(1).unwrap();
    wait_for("failing", || line.failed());
    driver.add(0, &[Part::Out(b"a")]);
    kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(served.load(Ordering::SeqCst), 1, "a failed device served");
    device.reset();
    assert_eq!(stopped.load(Ordering::SeqCst), 1);
    device.reset();
    let mut driver = Driver::new(&memory, SIZES);
    driver.add(0, &[Part::Out(b"a")]);
    activate(&mut device).unwrap();
    wait_for("serving again", || served.load(Ordering::SeqCst) == 2);
    drop(device);
    assert_eq!(stopped.load(Ordering::SeqCst), 2);
}

#[test]
fn a_running_device_reaches_memory_that_is_new() {
    const NEW: u64 = 1 << 32;
    let memory = mock::memory();
    let driver = Driver::new(&memory, SIZES);
    let served = Arc::<AtomicU32>::default();
    let logic = Counter { served: Arc::clone(&served), ..Counter::default() };
    let identity = Identity { device_id: 1, features: 0, queue_sizes: SIZES };
    let mut device = Device::new(identity, ConfigSpace::read_only(vec![]), logic);
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let line = Arc::clone(&driver.line);
    let queue = DeviceQueue::new(mock::queue(0, SIZES[0]), Arc::clone(&kick), Arc::clone(&line));
    let shared = Memory::new(memory.clone());
    let activation = Activation { memory: Arc::clone(&shared), queues: vec![queue], features: 0 };
    device.activate(activation).unwrap();
    let region = GuestRegionMmap::from_range(GuestAddress(NEW), 4096, None).unwrap();
    shared.publish(memory.insert_region(Arc::new(region)).unwrap());
    shared.settle().unwrap();
    driver.store(0, 0, &[(NEW, 1, 0, 0), (NEW + 4096, 1, 0, 0)]);
    driver.offer(0, 0);
    kick.write(1).unwrap();
    wait_for("serving", || served.load(Ordering::SeqCst) == 1);
    assert!(!line.failed());
    driver.offer(0, 1);
    kick.write(1).unwrap();
    wait_for("failing", || line.failed());
}

#[test]
fn somebody_else_is_told_where_rings_are_if_each_is_in_one_piece() {
    let memory = mock::memory();
    let driver = Driver::new(&memory, SIZES);
    let rings = driver.queues[0].rings(&memory).unwrap();
    let queue = mock::queue(0, SIZES[0]);
    let start = memory.iter().next().unwrap().as_ptr() as u64;
    let expected = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
    assert_eq!([rings.descriptors, rings.available, rings.used].map(|it| it - start), expected);
    assert_eq!((rings.size, rings.next), (SIZES[0], 0));
    // Two adjacent regions, which meet in the middle of the table.
    let meet = usize::try_from(queue.desc_table()).unwrap() + 16;
    let ranges = [(GuestAddress(0), meet), (GuestAddress(meet as u64), 1 << 20)];
    let memory = GuestMemory::from_ranges(&ranges).unwrap();
    assert!(matches!(driver.queues[0].rings(&memory), Err(QueueError::Pieces { len, .. })
        if len == 16 * usize::from(SIZES[0])));
}
