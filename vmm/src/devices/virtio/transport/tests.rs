//! The registers as a driver uses them, in and out of order.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::super::mock::{self, Driver, HIGH_END, Part, Random};
use super::super::queue::GuestMemory;
use super::super::worker::Sources;
use super::super::{ConfigSpace, Context, Device, Identity, Ready, Serve, ServeError};
use super::*;

const SIZES: &[u16] = &[16, 16];
const FEATURE: u64 = 1 << 3;

const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_ADDRESSES: [u64; 3] = [0x080, 0x090, 0x0a0];
const GENERATION: u64 = 0x0fc;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// Completes every chain; fails at an "x".
#[derive(Debug)]
struct Mirror;

impl Serve for Mirror {
    const NAME: &'static str = "mirror";
    const SYSCALLS: &'static [i64] = &[];

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        let Ready::Queue(index) = ready else { return Ok(()) };
        let (memory, queue) = (context.memory, &mut context.queues[index]);
        while let Some(mut chain) = queue.pop(memory)? {
            let mut byte = [0];
            chain.readable.read(memory, &mut byte)?;
            if byte == *b"x" {
                return Err(ServeError::Request("x"));
            }
            queue.complete(memory, chain.head, 0)?;
            queue.signal(memory)?;
        }
        Ok(())
    }
}

/// A slot and a driver that knows its registers.
struct Machine {
    memory: GuestMemory,
    transport: Transport,
}

impl Machine {
    fn new() -> Self {
        let memory = mock::memory();
        let mut transport = Transport::new(Memory::new(memory.clone()));
        transport.attach(Self::device()).unwrap();
        Self { memory, transport }
    }

    fn device() -> Box<dyn VirtioDevice> {
        let identity = Identity { device_id: 42, features: FEATURE, queue_sizes: SIZES };
        Box::new(Device::new(identity, ConfigSpace::with_writable(vec![1, 2, 3, 4], 2..4), Mirror))
    }

    fn read(&self, register: u64) -> u32 {
        let mut bytes = [0xaa; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn select_features(&mut self, features: u64) {
        for select in [0, 1] {
            self.write(DRIVER_FEATURES_SELECT, select);
            self.write(DRIVER_FEATURES, half(features, select));
        }
    }

    /// All steps up to FEATURES_OK.
    fn negotiate(&mut self, features: u64) {
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.select_features(features);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_queue(&mut self, index: u16, addresses: [u64; 3]) {
        self.write(QUEUE_SELECT, index.into());
        self.write(QUEUE_SIZE, SIZES[usize::from(index)].into());
        for (register, address) in QUEUE_ADDRESSES.into_iter().zip(addresses) {
            self.write(register, half(address, 0));
            self.write(register + 4, half(address, 1));
        }
        self.write(QUEUE_READY, 1);
    }

    /// A running device, and the driver of its queues.
    fn start(&mut self) -> u32 {
        self.negotiate(1 << VIRTIO_F_VERSION_1);
        for index in 0..2 {
            self.set_queue(index, addresses(index));
        }
        self.drive()
    }

    fn drive(&mut self) -> u32 {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.read(STATUS)
    }

    fn wait_for_interrupt(&self) {
        let (line, _) = self.transport.wiring().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while line.irq().read().is_err() {
            assert!(Instant::now() < deadline, "no interrupt came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn addresses(index: u16) -> [u64; 3] {
    let queue = mock::queue(index.into(), SIZES[usize::from(index)]);
    [queue.desc_table(), queue.avail_ring(), queue.used_ring()]
}

const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn a_placeholder_has_no_device() {
    let mut machine = Machine::new();
    machine.transport.detach().unwrap();
    let registers: Vec<u32> = [0x000, 0x004, 0x008, 0x00c].map(|at| machine.read(at)).into();
    assert_eq!(registers, [0x7472_6976, 2, 0, VENDOR]);
    machine.write(STATUS, ACKNOWLEDGE);
    assert_eq!(machine.read(STATUS), 0);
    assert_eq!(machine.read(CONFIG), 0);
    assert!(machine.transport.wiring().is_none());
}

#[test]
fn a_slot_takes_one_device_at_a_time() {
    let mut machine = Machine::new();
    assert_eq!(machine.read(0x008), 42);
    assert!(machine.transport.attach(Machine::device()).is_err());
    assert!(machine.transport.detach().is_some());
    assert!(machine.transport.detach().is_none());
    assert!(machine.transport.attach(Machine::device()).is_ok());
}

#[test]
fn features_are_read_in_halves() {
    let mut machine = Machine::new();
    let mut halves = Vec::new();
    for select in [0, 1, 2, u32::MAX] {
        machine.write(DEVICE_FEATURES_SELECT, select);
        halves.push(machine.read(DEVICE_FEATURES));
    }
    let low = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | FEATURE;
    assert_eq!(halves, [half(low, 0), 1, 0, 0]);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let version = 1 << VIRTIO_F_VERSION_1;
    for (features, accepted) in
        [(version, true), (version | FEATURE, true), (FEATURE, false), (version | 1 << 40, false)]
    {
        let mut machine = Machine::new();
        machine.negotiate(features);
        assert_eq!(machine.read(STATUS) & FEATURES_OK != 0, accepted, "{features:#x}");
    }
}

#[test]
fn features_are_fixed_once_accepted() {
    let mut machine = Machine::new();
    machine.negotiate(1 << VIRTIO_F_VERSION_1);
    machine.select_features(u64::MAX);
    for index in 0..2 {
        machine.set_queue(index, addresses(index));
    }
    assert_eq!(machine.drive(), RUNNING);
}

#[test]
fn a_device_runs_and_stops_and_runs_again() {
    let mut machine = Machine::new();
    for _ in 0..3 {
        assert_eq!(machine.start(), RUNNING);
        let memory = machine.memory.clone();
        let mut driver = Driver::new(&memory, SIZES);
        let request = driver.add(1, &[Part::Out(b"a")]);
        machine.write(QUEUE_NOTIFY, 1);
        machine.wait_for_interrupt();
        assert_eq!(machine.read(INTERRUPT_STATUS), INTERRUPT_QUEUE);
        machine.write(INTERRUPT_ACK, INTERRUPT_QUEUE);
        assert_eq!(machine.read(INTERRUPT_STATUS), 0);
        assert_eq!(driver.used(1), [(request.head, 0)]);
        machine.write(STATUS, 0);
        assert_eq!(machine.read(STATUS), 0);
        assert_eq!(machine.read(QUEUE_READY), 0);
    }
}

#[test]
fn a_device_that_fails_says_so_until_it_is_reset() {
    let mut machine = Machine::new();
    machine.start();
    let memory = machine.memory.clone();
    Driver::new(&memory, SIZES).add(0, &[Part::Out(b"x")]);
    machine.write(QUEUE_NOTIFY, 0);
    machine.wait_for_interrupt();
    assert_eq!(machine.read(STATUS), RUNNING | NEEDS_RESET);
    assert_eq!(machine.read(INTERRUPT_STATUS), INTERRUPT_CONFIG);
    machine.write(STATUS, 0);
    assert_eq!(machine.read(STATUS), 0);
    // The rings of the old driver are still in memory; the new driver starts with empty ones.
    let _driver = Driver::new(&memory, SIZES);
    assert_eq!(machine.start(), RUNNING);
}

/// A [`Mirror`] whose `start` and `delegate` fail as often as they are told to.
#[derive(Debug)]
struct Reluctant {
    /// How often each fails before it works.
    start: u32,
    delegate: u32,
    /// How often it was stopped.
    stopped: Arc<AtomicU32>,
}

fn fail(times: &mut u32) -> io::Result<()> {
    let Some(left) = times.checked_sub(1) else { return Ok(()) };
    *times = left;
    Err(io::Error::other("not yet"))
}

impl Serve for Reluctant {
    const NAME: &'static str = "reluctant";
    const SYSCALLS: &'static [i64] = &[];

    fn start(&mut self, _: u64, _: &Sources) -> io::Result<()> {
        fail(&mut self.start)
    }

    fn delegate(&mut self, _: &Activation, _: &Sources) -> io::Result<()> {
        fail(&mut self.delegate)
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        Mirror.serve(ready, context)
    }

    fn stop(&mut self, _: &Sources) {
        self.stopped.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_device_whose_activation_failed_works_after_a_reset() {
    for (start, delegate) in [(1, 0), (0, 1), (2, 2)] {
        let stopped = Arc::<AtomicU32>::default();
        let logic = Reluctant { start, delegate, stopped: Arc::clone(&stopped) };
        let identity = Identity { device_id: 42, features: FEATURE, queue_sizes: SIZES };
        let device = Device::new(identity, ConfigSpace::read_only(vec![]), logic);
        let mut machine = Machine::new();
        machine.transport.detach().unwrap();
        machine.transport.attach(Box::new(device)).unwrap();
        for attempt in 1..=start + delegate {
            assert_eq!(machine.start(), RUNNING | NEEDS_RESET, "attempt {attempt}");
            assert_eq!(stopped.load(Ordering::Relaxed), attempt, "what was begun is undone");
            machine.write(STATUS, 0);
            assert_eq!(machine.read(STATUS), 0);
        }
        assert_eq!(machine.start(), RUNNING);
        let memory = machine.memory.clone();
        let mut driver = Driver::new(&memory, SIZES);
        let request = driver.add(1, &[Part::Out(b"a")]);
        // The eventfd still has the interrupt that reported the failure.
        let _ = machine.transport.wiring().unwrap().0.irq().read();
        machine.write(QUEUE_NOTIFY, 1);
        machine.wait_for_interrupt();
        assert_eq!(driver.used(1), [(request.head, 0)]);
    }
}

#[test]
fn a_line_that_the_kernel_raises_too_always_tells_of_queues() {
    let mut machine = Machine::new();
    machine.start();
    let line = Arc::clone(machine.transport.wiring().unwrap().0);
    line.leave_to_kernel();
    for _ in 0..2 {
        assert_eq!(machine.read(INTERRUPT_STATUS), INTERRUPT_QUEUE);
        machine.write(INTERRUPT_ACK, INTERRUPT_QUEUE);
    }
    line.raise_config().unwrap();
    assert_eq!(machine.read(INTERRUPT_STATUS), INTERRUPT_QUEUE | INTERRUPT_CONFIG);
    machine.write(STATUS, 0);
    assert_eq!(machine.read(INTERRUPT_STATUS), 0);
}

#[test]
fn steps_left_out_make_the_device_fail() {
    for status in [DRIVER_OK, ACKNOWLEDGE | DRIVER | DRIVER_OK, FEATURES_OK | DRIVER_OK] {
        let mut machine = Machine::new();
        machine.select_features(1 << VIRTIO_F_VERSION_1);
        machine.write(STATUS, status);
        assert!(machine.read(STATUS) & NEEDS_RESET != 0, "{status}");
    }
    let mut machine = Machine::new();
    machine.write(STATUS, FAILED);
    assert!(machine.start() & NEEDS_RESET != 0);
}

#[test]
fn queues_must_lie_in_memory() {
    let good = addresses(0);
    for place in 0..3 {
        for bad in [HIGH_END, HIGH_END - 16, mock::LOW_END, 1 << 60, u64::MAX - 15] {
            let mut machine = Machine::new();
            machine.negotiate(1 << VIRTIO_F_VERSION_1);
            let mut wrong = good;
            wrong[place] = bad;
            machine.set_queue(0, wrong);
            // Some wrong addresses are not accepted at all; the queue then has none.
            let status = machine.drive();
            let taken = status & NEEDS_RESET == 0;
            if taken {
                machine.write(QUEUE_NOTIFY, 0);
                machine.wait_for_interrupt();
                assert!(machine.read(STATUS) & NEEDS_RESET != 0, "{place} {bad:#x}");
            }
        }
    }
}

#[test]
fn a_queue_without_use_may_be_left_alone() {
    let mut machine = Machine::new();
    machine.negotiate(1 << VIRTIO_F_VERSION_1);
    machine.set_queue(0, addresses(0));
    assert_eq!(machine.drive(), RUNNING);
    // A driver must not kick a queue that it did not set up.
    machine.write(QUEUE_NOTIFY, 1);
    machine.wait_for_interrupt();
    assert_eq!(machine.read(STATUS), RUNNING | NEEDS_RESET);
}

#[test]
fn queues_are_set_up_between_features_and_start_only() {
    let mut machine = Machine::new();
    machine.set_queue(0, addresses(0));
    assert_eq!(machine.read(QUEUE_READY), 0);
    machine.start();
    machine.write(QUEUE_SELECT, 0);
    machine.write(QUEUE_READY, 0);
    assert_eq!(machine.read(QUEUE_READY), 1);
}

#[test]
fn a_queue_that_does_not_exist_has_no_size() {
    let mut machine = Machine::new();
    let mut sizes = Vec::new();
    for index in [0, 1, 2, u32::MAX] {
        machine.write(QUEUE_SELECT, index);
        sizes.push(machine.read(QUEUE_SIZE_MAX));
        machine.write(QUEUE_NOTIFY, index);
    }
    assert_eq!(sizes, [16, 16, 0, 0]);
}

#[test]
fn registers_have_32_bits_and_their_own_offset() {
    let mut machine = Machine::new();
    machine.transport.write(STATUS, &[1]);
    machine.transport.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    machine.write(STATUS + 1, 1);
    assert_eq!(machine.read(STATUS), 0);
    let mut byte = [7];
    machine.transport.read(STATUS, &mut byte);
    assert_eq!(byte, [0], "nothing of what was there before");
}

#[test]
fn the_configuration_space_has_any_width() {
    let mut machine = Machine::new();
    machine.transport.write(CONFIG, &[9; 8]);
    let mut bytes = [0; 8];
    machine.transport.read(CONFIG, &mut bytes);
    assert_eq!(bytes, [1, 2, 9, 9, 0, 0, 0, 0]);
    machine.transport.read(CONFIG + 1, &mut bytes[..1]);
    assert_eq!(bytes[0], 2);
    machine.transport.read(u64::MAX, &mut bytes[..1]);
    assert_eq!((bytes[0], machine.read(GENERATION)), (0, 0));
}

#[test]
fn shared_memory_does_not_exist() {
    let machine = Machine::new();
    for register in [0x0b0, 0x0b4, 0x0b8, 0x0bc] {
        assert_eq!(machine.read(register), u32::MAX);
    }
}

#[test]
fn no_sequence_of_accesses_breaks_a_slot() {
    let mut random = Random(7);
    let memory = mock::memory();
    let registers = [
        DEVICE_FEATURES_SELECT,
        DRIVER_FEATURES,
        DRIVER_FEATURES_SELECT,
        QUEUE_SELECT,
        QUEUE_SIZE,
        QUEUE_READY,
        QUEUE_NOTIFY,
        INTERRUPT_ACK,
        STATUS,
        STATUS,
    ];
    for _ in 0..50 {
        let mut transport = Transport::new(Memory::new(memory.clone()));
        transport.attach(Machine::device()).unwrap();
        for _ in 0..200 {
            let offset = match random.below(4) {
                0 => random.below(SLOT_BYTES),
                1 => QUEUE_ADDRESSES[usize::try_from(random.below(3)).unwrap()],
                _ => {
                    let index = random.below(registers.len() as u64);
                    registers[usize::try_from(index).unwrap()]
                }
            };
            let value = match random.below(3) {
                0 => random.below(1 << 32),
                1 => random.below(256),
                _ => random.below(64) << 12,
            };
            let len = if random.below(8) == 0 { random.below(9) } else { 4 };
            let len = usize::try_from(len).unwrap();
            transport.write(offset, &value.to_le_bytes()[..len]);
            transport.read(offset, &mut [0; 8][..len]);
        }
    }
    // The device wrote nothing where none of its queues could be.
    assert_eq!(memory.read_obj::<u64>(GuestAddress(HIGH_END - 8)).unwrap(), 0);
}
