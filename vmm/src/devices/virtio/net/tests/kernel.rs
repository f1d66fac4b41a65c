//! vhost-net in place of the device, against a driver that breaks the rules. A packet socket sends
//! the frames, which vhost-net takes as well as a tap.

use std::fs::File;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::devices::virtio::{Activation, Context};

/// Token of the errors of vhost-net.
const BROKEN: Ready = Ready::Source(u32::MAX - 1);
const PATIENCE: Duration = Duration::from_secs(10);
const FEATURES: u64 = F_MRG_RXBUF | F_CTRL_VQ | 1 << VIRTIO_F_VERSION_1;

#[test]
#[ignore = "needs the test host"]
fn a_queue_that_the_kernel_finds_broken_fails_the_device_until_it_is_reset() {
    let memory = mock::memory();
    let shared = Memory::new(memory.clone());
    let vhost = File::options().read(true).write(true).open("/dev/vhost-net").unwrap();
    let kernel = Kernel::new(vec![vhost.into()], &shared).unwrap();
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None).unwrap();
    let tap = SocketTap { socket, offloads: Arc::default() };
    let (mut net, _) = logic(&config(1, RateLimit::default()), vec![tap], Some(kernel)).unwrap();
    for bad in [(u64::MAX - 64, 64, 0, 0), (mock::HIGH_START, 64, mock::NEXT, 999)] {
        let mut driver = Driver::new(&memory, &QUEUE_SIZES[..3]);
        for queue in &driver.queues[..2] {
            driver.sources.add(queue.kick(), 0, EventSet::IN).unwrap();
        }
        net.start(FEATURES, &driver.sources).unwrap();
        let (memory, queues) = (Arc::clone(&shared), std::mem::take(&mut driver.queues));
        let mut activation = Activation { memory, queues, features: FEATURES };
        net.delegate(&activation, &driver.sources).unwrap();
        let kick = activation.queues[1].kick().try_clone().unwrap();
        let mut complaint = || {
            let memory = &shared.snapshot();
            let (queues, sources) = (&mut activation.queues[..], &driver.sources);
            net.serve(BROKEN, &mut Context { memory, queues, sources })
        };
        complaint().unwrap();
        driver.store(1, 0, &[bad]);
        driver.offer(1, 0);
        kick.write(1).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while complaint().is_ok() {
            assert!(Instant::now() < deadline, "{bad:?}");
            thread::sleep(Duration::from_millis(10));
        }
        net.stop(&driver.sources);
    }
}
