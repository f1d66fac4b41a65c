//! What the guest sees beside its processors and memory.

use std::fs::File;
use std::io;

use vm_memory::GuestMemoryBackend;

use crate::arch::layout;
use crate::config::{DeviceConfig, Fd};
use crate::memory::Memory;
use crate::vm::Descriptors;

pub(crate) mod console;
pub(crate) mod rate_limit;
mod token_bucket;
pub(crate) mod virtio;

use virtio::{VirtioDevice, balloon, block, fs, mem, net, rng, vsock};

/// What the control socket needs of devices once they are attached.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    /// Opens streams to the guest.
    pub(crate) opener: Option<vsock::Opener>,
    /// Sets the balloon's size.
    pub(crate) balloon: Option<balloon::BalloonHandle>,
    /// Sets how much memory is plugged.
    pub(crate) mem: Option<mem::MemHandle>,
}

/// Makes the device that the configuration describes; `memory` is the machine's.
pub(crate) fn build(
    config: &DeviceConfig,
    fds: &mut Descriptors,
    handles: &mut Handles,
    memory: &Memory,
) -> io::Result<Box<dyn VirtioDevice>> {
    let mut take = |field, fd| fds.take(field, fd).map_err(io::Error::other);
    Ok(match config {
        DeviceConfig::Vsock { guest_cid } => {
            let (device, opener) = vsock::device(*guest_cid)?;
            handles.opener = Some(opener);
            Box::new(device)
        }
        DeviceConfig::Rng { source } => Box::new(rng::device(File::from(take("source", *source)?))),
        DeviceConfig::Fs { tag, server } => Box::new(fs::device(tag, take("server", *server)?)),
        DeviceConfig::Blk { disk, read_only, serial } => {
            let disk = File::from(take("disk", *disk)?);
            Box::new(block::device(disk, *read_only, serial)?)
        }
        DeviceConfig::Net(net) => {
            let mut all = |field, fds: &[Fd]| fds.iter().map(|fd| take(field, *fd)).collect();
            let taps: io::Result<_> = all("taps", &net.taps);
            let vhost: io::Result<_> = all("vhost", &net.vhost);
            Box::new(net::device(net, (taps?, vhost?), memory)?)
        }
        DeviceConfig::Balloon => {
            let (device, balloon) = balloon::device()?;
            handles.balloon = Some(balloon);
            Box::new(device)
        }
        DeviceConfig::Mem { region_mib } => {
            if handles.mem.is_some() {
                return Err(io::Error::other("the machine has a memory device"));
            }
            let (start, step) = layout::plugged_memory(memory.snapshot().last_addr().0 + 1);
            let region = mem::Region::new(start, step, *region_mib);
            let (device, mem) = mem::device(region)?;
            handles.mem = Some(mem);
            Box::new(device)
        }
    })
}
