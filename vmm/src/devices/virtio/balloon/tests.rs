//! Which pages are given back and which stay.

use vm_memory::Bytes;

use super::super::VirtioDevice;
use super::super::mock::{self, Driver, HIGH_END, HIGH_START, LOW_END, Part};
use super::*;

const PAGES: u64 = 16;

fn logic() -> Balloon {
    Balloon { changed: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()) }
}

/// Memory whose last pages are all ones.
fn filled() -> GuestMemory {
    let memory = mock::memory();
    let len = usize::try_from(PAGES * PAGE_BYTES).unwrap();
    memory.write_slice(&vec![1; len], GuestAddress(HIGH_END - PAGES * PAGE_BYTES)).unwrap();
    memory
}

/// Which of those pages were given back.
fn gone(memory: &GuestMemory) -> Vec<u64> {
    let value = |page| {
        let addr = GuestAddress(HIGH_END - (PAGES - page) * PAGE_BYTES);
        memory.read_obj::<u8>(addr).unwrap()
    };
    (0..PAGES).filter(|&page| value(page) == 0).collect()
}

fn list(pages: &[u64]) -> Vec<u8> {
    let first = HIGH_END / PAGE_BYTES - PAGES;
    pages.iter().flat_map(|page| u32::try_from(first + page).unwrap().to_le_bytes()).collect()
}

#[test]
fn inflated_pages_are_given_back_and_no_others() {
    for pages in [&[1, 2, 3, 7][..], &[7, 3, 2, 1], &[0, 15], &[5, 5, 6, 4]] {
        let memory = filled();
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        let list = list(pages);
        let (front, back) = list.split_at(list.len() / 2);
        let request = driver.add(INFLATE, &[Part::Out(front), Part::Out(back)]);
        driver.call(&mut logic(), Ready::Queue(INFLATE)).unwrap();
        assert_eq!(driver.used(INFLATE), [(request.head, 0)]);
        let mut expected = pages.to_vec();
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(gone(&memory), expected);
    }
}

#[test]
fn a_long_list_is_served() {
    let memory = filled();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let pages: Vec<u64> = (0..1000).map(|at| at % PAGES).collect();
    driver.add(INFLATE, &[Part::Out(&list(&pages))]);
    driver.call(&mut logic(), Ready::Queue(INFLATE)).unwrap();
    assert_eq!(gone(&memory).len() as u64, PAGES);
}

#[test]
fn deflating_changes_nothing() {
    let memory = filled();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    driver.add(DEFLATE, &[Part::Out(&list(&[1, 2]))]);
    driver.call(&mut logic(), Ready::Queue(DEFLATE)).unwrap();
    assert_eq!(driver.used(DEFLATE).len(), 1);
    assert!(gone(&memory).is_empty());
}

#[test]
fn reported_ranges_are_given_back_by_whole_pages() {
    let memory = filled();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let base = HIGH_END - PAGES * PAGE_BYTES;
    let ranges = [
        (base + 100, 3 * 4096, mock::WRITE | mock::NEXT, 1),
        (base + 8 * 4096, 2 * 4096, mock::WRITE, 0),
    ];
    driver.store(REPORTING, 0, &ranges);
    driver.offer(REPORTING, 0);
    driver.call(&mut logic(), Ready::Queue(REPORTING)).unwrap();
    assert_eq!(gone(&memory), [1, 2, 8, 9]);
}

#[test]
fn pages_outside_of_memory_fail_the_device() {
    for page in [LOW_END, HIGH_START - PAGE_BYTES, HIGH_END, u64::from(u32::MAX) * PAGE_BYTES] {
        let memory = filled();
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        let number = u32::try_from(page / PAGE_BYTES).unwrap();
        driver.add(INFLATE, &[Part::Out(&number.to_le_bytes())]);
        assert!(driver.call(&mut logic(), Ready::Queue(INFLATE)).is_err());
        assert!(gone(&memory).is_empty());
    }
}

#[test]
fn a_run_into_the_hole_fails_the_device() {
    let memory = filled();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let last = u32::try_from(HIGH_END / PAGE_BYTES - 1).unwrap();
    let list = [last.to_le_bytes(), (last + 1).to_le_bytes()].concat();
    driver.add(INFLATE, &[Part::Out(&list)]);
    assert!(driver.call(&mut logic(), Ready::Queue(INFLATE)).is_err());
    assert!(gone(&memory).is_empty());
}

#[test]
fn lists_of_a_wrong_length_fail_the_device() {
    for list in [vec![0; 3], vec![0; 4 * REQUEST_PAGES_MAX + 4]] {
        let memory = filled();
        let mut driver = Driver::new(&memory, QUEUE_SIZES);
        driver.add(INFLATE, &[Part::Out(&list)]);
        assert!(driver.call(&mut logic(), Ready::Queue(INFLATE)).is_err());
    }
}

#[test]
fn a_new_target_is_shown_to_the_driver() {
    let memory = mock::memory();
    let mut driver = Driver::new(&memory, QUEUE_SIZES);
    let (device, handle) = device().unwrap();
    handle.set_target_mib(3).unwrap();
    assert!(handle.set_target_mib(u32::MAX).is_err());
    let mut config = [0; 8];
    device.config().read(0, &mut config);
    assert_eq!(config, [0, 3, 0, 0, 0, 0, 0, 0]);
    let mut logic = Balloon { changed: Arc::clone(&handle.changed) };
    logic.start(0, &driver.sources).unwrap();
    driver.call(&mut logic, Ready::Source(TARGET)).unwrap();
    assert_eq!(driver.line.irq().read().unwrap(), 1);
    assert!(handle.changed.read().is_err(), "the event was not cleared");
}

#[test]
fn a_driver_may_write_the_actual_size_only() {
    let (device, handle) = device().unwrap();
    device.config().write(0, &[0xff; 8]);
    assert_eq!(handle.config.u32(NUM_PAGES), 0);
    assert_eq!(handle.actual_mib(), u32::MAX / 256);
}

#[test]
fn malformed_chains_are_survived() {
    mock::survives_malformed(QUEUE_SIZES, logic);
    mock::survives_noise(QUEUE_SIZES, 300, logic);
}
