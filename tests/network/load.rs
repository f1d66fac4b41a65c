//! A network under load: whichever process is killed, the network is restored, and a flood does not
//! keep others from working.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::memory::pss_kib;
use bulkhead_tests::netns::{HERE, Serving, THERE, Wired};
use bulkhead_tests::runtime::{Runtime, comes_true, kill_9};

/// Sends small datagrams as fast as it can.
const DATAGRAMS: &str = env!("CARGO_BIN_EXE_datagrams");
/// A timeout for hangs; generous because of emulation.
const PATIENCE: Duration = Duration::from_secs(60);
/// The number of frames that shows that traffic flows.
const FLOW: u64 = 200;

/// A container that floods the host.
fn flooding(wired: &Wired) -> Bundle {
    let bundle = Bundle::script(&format!("/mnt/datagrams flood {HERE} 9 & exec sleep 1000"));
    let program = bind(Path::new(DATAGRAMS), "/mnt/datagrams", &["ro"]);
    wired.pod.of(bundle.unwrap().mount(program).unwrap()).unwrap()
}

/// Starts a flood from the host to the container.
fn flooded() -> Serving {
    let mut command = Command::new(DATAGRAMS);
    command.args(["flood", THERE, "9"]);
    Serving::start(command).unwrap()
}

/// How many frames have come from the container, and how many have gone to it.
fn passed() -> [u64; 2] {
    ["rx_packets", "tx_packets"].map(|count| {
        let path = format!("/sys/class/net/here/statistics/{count}");
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    })
}

/// Waits until frames pass in both directions.
fn wait_for_flow() {
    let before = passed();
    let flows = || (0..2).all(|way| passed()[way] >= before[way] + FLOW);
    assert!(comes_true(PATIENCE, flows), "{before:?} frames, then {:?}", passed());
}

#[test]
#[ignore = "long: --suite network_long"]
fn whoever_is_killed_under_load_the_network_is_as_it_was_and_good_for_the_next() {
    let wired = Wired::new().unwrap();
    let before = wired.pod.seen().unwrap();
    let bundle = flooding(&wired);
    let runtime = Runtime::new().unwrap();
    for victim in [" supervise", "bulkhead-vmm", "bulkhead-fs", "bulkhead-stand-in"] {
        runtime.create("victim", &bundle).unwrap();
        runtime.ok(&["start", "victim"]).unwrap();
        let flood = flooded();
        wait_for_flow();
        let [process] = runtime.processes(victim).unwrap()[..] else { panic!("one {victim}") };
        kill_9(process).unwrap();
        // The remaining process restores the interface by itself.
        let given_back = || wired.pod.seen().unwrap() == before;
        assert!(comes_true(PATIENCE, given_back), "{victim}: {}", wired.pod.seen().unwrap());
        drop(flood);
        runtime.ok(&["delete", "--force", "victim"]).unwrap();
        assert_eq!(wired.pod.seen().unwrap(), before, "{victim}");
        runtime.assert_clean().unwrap();
    }
}

#[test]
#[ignore = "long: --suite network_long"]
fn a_flood_from_both_sides_lets_others_work_and_takes_no_memory() {
    // First the kernel moves the frames, then the monitor.
    for switch in ["1", "0"] {
        works_in_a_flood(&Runtime::new().unwrap().with("BULKHEAD_VHOST_NET", switch));
    }
}

fn works_in_a_flood(runtime: &Runtime) {
    let wired = Wired::new().unwrap();
    let bundle = flooding(&wired);
    runtime.create("flooded", &bundle).unwrap();
    runtime.ok(&["start", "flooded"]).unwrap();
    let flood = flooded();
    wait_for_flow();
    let [monitor] = runtime.processes("bulkhead-vmm").unwrap()[..] else { panic!("one monitor") };
    runtime.ok(&["exec", "flooded", "true"]).unwrap();
    let (before, _) = pss_kib(monitor).unwrap();
    for _ in 0..3 {
        let asked = Instant::now();
        assert_eq!(runtime.ok(&["exec", "flooded", "echo", "works"]).unwrap(), "works\n");
        assert!(asked.elapsed() < PATIENCE, "{:?}", asked.elapsed());
        wait_for_flow();
    }
    let (after, _) = pss_kib(monitor).unwrap();
    assert!(after <= before + 128.0, "{before} KiB before, {after} KiB after");
    drop(flood);
    runtime.ok(&["delete", "--force", "flooded"]).unwrap();
    runtime.assert_clean().unwrap();
}
